"""Apollo's fused step on the CPU: one call into apollo_cpu.cpp for a whole list of tensors.

It is compiled at first use (optim/native.py); `python -m optim.fused.cpu` does so beforehand. Large tensors carry sums
over from step to step (carried_sums.py), which are the same bits when they are taken anew.
"""

import ctypes
import warnings
from array import array
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..native import NotCompiled, compile_library
from ..sharded import ProcessGroups, join_sums
from .carried_sums import left_by_steps, marks
from .layout import lay_out_like

SOURCE = Path(__file__).with_name("apollo_cpu.cpp")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SUM, UPDATE, DIRECTION = 1, 2, 4
LARGE = 65536  # elements; up to here a tensor is done in one go, in cache: float32 p, g, B and d are 1 MiB then


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta", "eps", "sigma", "init_lr", "l2", "decay", "grad_factor")),
        *((name, ctypes.c_int64) for name in ("warmup", "belief", "stable", "whole")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled step, or None, after one warning, where it cannot be compiled."""
    try:
        loaded = ctypes.CDLL(str(compile_library(SOURCE)))
    except NotCompiled as error:
        warnings.warn(
            f"Apollo's fused CPU step could not be compiled, the slower foreach step is used instead: {error}",
            stacklevel=2,
        )
        return None
    loaded.apollo_step.argtypes = [ctypes.c_void_p] * 3 + [ctypes.POINTER(_Settings)] + [ctypes.c_int64] * 4
    loaded.apollo_step.restype = None
    return loaded


def _fused_cpu_apollo(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor | None],
    hessians: list[Tensor],
    directions: list[Tensor],
    sigmas: list[Tensor | None],
    steps: list[Tensor],
    shards: list[ProcessGroups],
    numels: list[int],
    *,
    lr: float | Tensor,
    beta: float,
    eps: float,
    sigma: float,
    warmup: int,
    init_lr: float,
    weight_decay: float,
    weight_decay_type: str,
    rebound: str,
    maximize: bool,
    capturable: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The step of parameters of one dtype whose memory has no gaps. See optim/apollo.py for the arguments."""
    if found_inf is not None and found_inf.item():
        return
    stored, belief = exp_avgs[0] is not None, rebound == "belief"
    stable = weight_decay != 0 and weight_decay_type == "stable"
    l2, decay = (weight_decay, 0.0) if weight_decay_type == "L2" else (0.0, weight_decay)
    states = [hessians, directions, exp_avgs] if stored else [hessians, directions]
    grads = lay_out_like(params, grads, *states)

    def worked_on(i: int) -> tuple:
        return l2 != 0, sigma, marks([x[i] for x in (params, *states)])

    here = list(map(Tensor.numel, params))
    large = [] if stable or belief else [i for i, numel in enumerate(here) if numel > LARGE]
    carried = array("d", bytes(32 * len(params)))  # four numbers a tensor
    is_carried = [0] * len(params)
    for i in large:
        found = left_by_steps.get(directions[i])
        if found is not None and found[0] == worked_on(i):
            carried[4 * i : 4 * i + 4], is_carried[i] = found[1], 1

    tensors = (params, grads, exp_avgs if stored else None, hessians, directions, sigmas if belief else None, steps)
    columns = [[0] * len(params) if column is None else list(map(Tensor.data_ptr, column)) for column in tensors]
    columns += [here, numels, is_carried]
    table = array("q", chain.from_iterable(zip(*columns, strict=True)))  # rows are the struct ApolloTensor

    sums = torch.zeros(len(params), 5, dtype=torch.float64)
    factor = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else grad_scale.item())
    settings = _Settings(float(lr), beta, eps, sigma, init_lr, l2, decay, factor, int(warmup), belief, stable, LARGE)

    def run(stages: int) -> None:
        library().apollo_step(
            table.buffer_info()[0],
            sums.data_ptr(),
            carried.buffer_info()[0],
            settings,
            len(params),
            DTYPES[params[0].dtype],
            stages,
            torch.get_num_threads(),
        )

    increment_version(params)  # written to behind autograd's back
    if not any(shards):
        run(SUM | UPDATE | DIRECTION if stable else SUM | UPDATE)
    else:
        run(SUM)
        join_sums(sums[:, :3], shards)
        if belief:
            join_sums(sums[:, 4:], shards, largest=True)
        run(UPDATE)
        if stable:
            join_sums(sums[:, 3:4], shards)
            run(DIRECTION)
    for i in large:
        left_by_steps[directions[i]] = worked_on(i), carried[4 * i : 4 * i + 4]


if __name__ == "__main__":
    print(compile_library(SOURCE))
