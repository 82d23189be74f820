"""Chooses the implementation of Apollo's step: single-tensor, foreach or fused."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import WeakIdKeyDictionary

from .apollo_foreach import _multi_tensor_apollo
from .apollo_single import _single_tensor_apollo
from .checks import NameOf, Ranges, apart_from, check_tensors, facts, written_ranges
from .fused import cpu as fused_cpu
from .fused.layout import is_dense, lay_out_states
from .settings import Settings
from .step_tensors import StepTensors

UNFUSED = (_single_tensor_apollo, _multi_tensor_apollo)  # they take their scalars on the host


def apollo(
    tensors: StepTensors,
    settings: Settings,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    name_of: NameOf = "parameter {}".format,
) -> None:
    """`Apollo`'s step, in place.

    Gradients are divided by `grad_scale`, and nothing changes if `found_inf` is not 0 (both 1-element tensors).

    Raises:
        RuntimeError: a tensor's shape, dtype or device does not fit its parameter, or tensors share memory.
    """
    if not tensors.params:
        return
    owner, tensors = tensors.params[0], tensors.local()
    if is_compiling():  # torch's own operators check their tensors
        lists = _lists(tensors, settings)
    else:
        plan = _plan(owner, tensors, settings, name_of)
        lists, tensors.grads = plan.lists, apart_from(plan.written, tensors.grads, plan.apart)
    for step, device, indices, kept in lists:
        part = tensors if len(lists) == 1 else tensors.part(indices)
        part.kept = kept
        scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
        if step not in UNFUSED:
            step(part, settings, scale, None if found_inf is None else found_inf.to(device, non_blocking=True))
        elif found_inf is None or not found_inf.item():
            on_host = isinstance(settings.lr, Tensor) and not settings.capturable
            step(part, replace(settings, lr=settings.lr.item()) if on_host else settings, scale)


class _List(NamedTuple):
    """Parameters of one kind, and what their step function keeps."""

    step: Callable[..., None]
    device: torch.device
    indices: list[int]
    kept: dict[str, Any]


class _Plan(NamedTuple):
    """A group's lists, valid while `key` is the same."""

    key: tuple
    lists: list[_List]
    written: Ranges
    apart: list[int]  # addresses of gradients that need no copy


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by a group's first parameter


def _plan(owner: Tensor, tensors: StepTensors, settings: Settings, name_of: NameOf) -> _Plan:
    try:
        key = facts(tensors), settings.foreach, settings.fused, settings.capturable
    except (AttributeError, TypeError, RuntimeError):  # an entry is no tensor, or has no memory
        check_tensors(tensors, name_of)
        raise
    plan = _plans.get(owner)
    if plan is None or plan.key != key:
        check_tensors(tensors, name_of)
        plan = _plans[owner] = _Plan(key, _lists(tensors, settings), written_ranges(tensors), [])
    return plan


def _lists(tensors: StepTensors, settings: Settings) -> list[_List]:
    kinds: dict[tuple, list[int]] = {}
    for i, (param, grad) in enumerate(zip(tensors.params, tensors.grads, strict=True)):
        plain = grad.dtype is param.dtype and not is_compiling() and _has_plain_memory(tensors, i)
        kind = param.device, param.dtype, grad.dtype, tensors.exp_avgs[i] is None, plain
        kinds.setdefault(kind, []).append(i)
    lists = []
    for (device, dtype, _, _, plain), indices in kinds.items():
        step = _implementation(device, dtype, settings, plain)
        if not is_compiling():
            fused = step not in UNFUSED
            if fused:
                part = tensors.part(indices)
                lay_out_states(part.params, *part.states)
            on_device = settings.capturable or (device.type == "cuda" and fused)
            for i in indices:  # they are elsewhere after a change of settings
                if tensors.steps[i].is_cuda != (on_device and device.type == "cuda"):
                    tensors.steps[i].data = tensors.steps[i].to(device if on_device else "cpu")
        lists.append(_List(step, device, indices, {}))
    return lists


def _has_plain_memory(tensors: StepTensors, i: int) -> bool:
    """Whether kernels may use the addresses of parameter i: no gaps, no pending sign, no wrapper of other tensors."""
    param = tensors.params[i]
    mine = [param, tensors.grads[i], tensors.hessians[i], tensors.directions[i], tensors.exp_avgs[i]]
    return is_dense(param) and not any(x.is_neg() or (x.numel() and not x.data_ptr()) for x in mine if x is not None)


def _implementation(device: torch.device, dtype: torch.dtype, s: Settings, plain: bool) -> Callable[..., None]:
    if s.fused or (s.fused is None and s.foreach is None):
        return (plain and fused_step(device, dtype)) or _multi_tensor_apollo
    return _multi_tensor_apollo if s.foreach else _single_tensor_apollo


def fused_step(device: torch.device, dtype: torch.dtype) -> Callable[..., None] | None:
    if device.type == "cpu":
        return fused_cpu._fused_cpu_apollo if dtype in fused_cpu.DTYPES and fused_cpu.library() else None
    if device.type == "cuda" and _triton_works():
        from .fused import cuda as fused_cuda  # not at the top: it needs Triton

        return fused_cuda._fused_cuda_apollo if dtype in fused_cuda.DTYPES else None
    return None


@cache
def _triton_works() -> bool:
    """Whether Triton can launch kernels; a warning if not. It is tried once, as Triton then compiles its driver."""
    if not find_spec("triton"):
        return False
    try:
        from .fused import cuda as fused_cuda

        fused_cuda.launch_one()
    except Exception as error:  # compiler, headers or driver are missing
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"Triton cannot launch kernels, Apollo takes the slower foreach step: {reason}", stacklevel=2)
        return False
    return True
