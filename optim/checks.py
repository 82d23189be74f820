"""Checks the tensors of a step, so that no step reads or writes outside a tensor.

Between steps any code may give a tensor another shape, dtype, order or memory, or load another parameter's state, and
the fused steps work with addresses. The check is slow, so it is repeated only when `facts` have changed.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .step_tensors import StepTensors

NameOf = Callable[[int], str]  # what an error calls parameter i of a list
Ranges = tuple[list[int], list[int]]  # of memory: their sorted beginnings, and their ends

SHAPE, DTYPE = attrgetter("shape"), attrgetter("dtype")


def state_dtype(param: Tensor) -> torch.dtype:
    return torch.float32 if param.dtype.itemsize < 4 else param.dtype


def facts(tensors: StepTensors) -> tuple[list[Any], ...]:
    """If this changes, `check_tensors` must be repeated. It is compared at every step, so it is short.

    With equal address, dtype, number of elements and strides, elements are where they were.
    """
    large, small = list(_of_shape(tensors)), list(_scalars(tensors))
    return (
        *(list(map(fact, large)) for fact in (Tensor.data_ptr, DTYPE, Tensor.numel, Tensor.stride)),
        *(list(map(fact, small)) for fact in (Tensor.data_ptr, DTYPE)),
        *(list(map(fact, tensors.grads)) for fact in (SHAPE, DTYPE)),
    )


def check_tensors(tensors: StepTensors, name_of: NameOf) -> None:
    """Raises RuntimeError, with the parameter's name, if a tensor does not fit its parameter or shares memory."""
    for i, param in enumerate(tensors.params):
        if not param.is_floating_point() or param.layout is not torch.strided:
            raise RuntimeError(f"Apollo takes dense floating-point parameters: {name_of(i)} is {_form(param)}")
        state, dtype = _state(tensors, i), state_dtype(param)
        for key, x in [("gradient", tensors.grads[i]), *state.items()]:
            if not isinstance(x, Tensor):
                raise RuntimeError(f"Apollo: {key} of {name_of(i)} must be a tensor, not {type(x).__name__}")
            scalar = key in ("sigma", "step")
            wanted = torch.float32 if key == "step" else x.dtype if key == "gradient" else dtype
            fits = x.numel() == 1 if scalar else x.shape == param.shape
            fits = fits and x.dtype == wanted and x.is_floating_point() and x.layout is torch.strided
            if not fits or (key != "step" and x.device != param.device):  # dispatch.py moves steps
                shape = "one element" if scalar else f"shape {tuple(param.shape)}"
                raise RuntimeError(
                    f"Apollo: {key} of {name_of(i)} is {_form(x)}, not {wanted} of {shape} on {param.device}; "
                    "was the parameter changed after its first step, or the state loaded from another model?"
                )
    _check_overlap(tensors, name_of)


def written_ranges(tensors: StepTensors) -> Ranges:
    """The ranges of memory that a step writes to, joined where they overlap."""
    ranges = [_range_of(x) for x in chain(_of_shape(tensors), _scalars(tensors)) if x.numel()]
    clusters = list(_clusters(ranges))
    return [cluster[0][0] for cluster in clusters], [max(end for _, end in cluster) for cluster in clusters]


def apart_from(ranges: Ranges, grads: list[Tensor], known: list[int]) -> list[Tensor]:
    """The gradients as a kernel may read them: copied if they have a pending sign or overlap what the step writes.

    `known` keeps the addresses of gradients that needed no copy.
    """
    addresses = list(map(Tensor.data_ptr, grads))
    if addresses == known:
        return grads
    begins, ends = ranges
    found = []
    for i, grad in enumerate(grads):
        begin, end = _range_of(grad)
        last = bisect_left(begins, end) - 1
        if (last >= 0 and ends[last] > begin) or grad.is_neg():  # the sign of is_neg() is not in memory
            found.append(i)
    if not found:
        known[:] = addresses
        return grads
    grads = list(grads)
    for i in found:
        grads[i] = grads[i].clone().resolve_neg()
    return grads


def _of_shape(tensors: StepTensors) -> Iterable[Tensor]:
    averages = (x for x in tensors.exp_avgs if x is not None)
    return chain(tensors.params, tensors.hessians, tensors.directions, averages)


def _scalars(tensors: StepTensors) -> Iterable[Tensor]:
    return chain(tensors.steps, (x for x in tensors.sigmas if x is not None))


def _state(tensors: StepTensors, i: int) -> dict[str, Any]:
    state = {"exp_avg": tensors.exp_avgs[i], "hessian": tensors.hessians[i], "direction": tensors.directions[i]}
    state |= {"sigma": tensors.sigmas[i], "step": tensors.steps[i]}
    return {key: x for key, x in state.items() if x is not None or key not in ("exp_avg", "sigma")}


def _form(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} on {x.device}"


def _range_of(x: Tensor) -> tuple[int, int]:
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.itemsize


def _check_overlap(tensors: StepTensors, name_of: NameOf) -> None:
    named = []  # a range of memory, a tensor, and its name
    for i, param in enumerate(tensors.params):
        for key, x in [("", param), *_state(tensors, i).items()]:
            if x.numel() and x.data_ptr():
                named.append((*_range_of(x), x, f"{key} of {name_of(i)}" if key else name_of(i)))
    for cluster in _clusters(named):
        if len(cluster) > 1 or not cluster[0][2].is_contiguous():
            _check_cluster(cluster)


def _clusters(entries: list[tuple]) -> Iterator[list[tuple]]:
    """The entries (begin, end, ...) in clusters of overlapping memory."""
    cluster, stop = [], 0
    for entry in sorted(entries, key=lambda entry: entry[:2]):
        if cluster and entry[0] >= stop:
            yield cluster
            cluster = []
        stop = max(stop, entry[1])
        cluster.append(entry)
    if cluster:
        yield cluster


def _check_cluster(cluster: list[tuple]) -> None:
    """Compares addresses of elements, as ranges can interleave: two views of every other column do."""
    start = cluster[0][0]
    seen: list[Tensor] = []
    for k, (begin, _, x, name) in enumerate(cluster):
        offsets = torch.full((1,), begin - start)
        for size, stride in zip(x.shape, x.stride(), strict=True):
            offsets = (offsets[:, None] + torch.arange(size) * (stride * x.itemsize)).flatten()
        offsets = (offsets[:, None] + torch.arange(x.itemsize)).flatten()
        if offsets.unique().numel() < offsets.numel():
            raise RuntimeError(f"Apollo: elements of {name} share memory with each other; give the optimizer a copy")
        for other, (*_, other_name) in zip(seen, cluster[:k], strict=True):
            if torch.isin(offsets, other).any():
                raise RuntimeError(f"Apollo: {name} and {other_name} share memory; give the optimizer one of them")
        seen.append(offsets)
