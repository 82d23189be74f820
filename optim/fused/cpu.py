"""Apollo's fused step on the CPU: one call into apollo_cpu.cpp for a list of tensors.

The C++ is compiled at first use, or earlier by `python -m optim.fused.cpu`.
"""

import ctypes
from array import array
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..native import compile_library, load_library
from ..settings import Settings
from ..sharded import join_sums
from ..step_tensors import StepTensors
from .carried_sums import CarriedSums, are_carried, note_of
from .layout import laid_out

SOURCE = Path(__file__).with_name("apollo_cpu.cpp")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SUM, UPDATE, DIRECTION = 1, 2, 4
GRAD, KNOWN, COLUMNS = 1, 9, 10  # of struct ApolloTensor, in words of 64 bits
LARGE = 65536  # most elements of a tensor done in one go, in cache: p, g, B and d in float32 are 1 MiB

_carried = CarriedSums()  # an array for each large parameter, owned by its direction


class _Settings(ctypes.Structure):
    """struct ApolloSettings of apollo_cpu.h."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta", "eps", "sigma", "init_lr", "l2", "decay", "grad_factor")),
        *((name, ctypes.c_int64) for name in ("warmup", "belief", "stable", "stored", "uncut")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled step. If it cannot be compiled: None, after one warning."""
    arguments = [ctypes.c_void_p] * 3 + [ctypes.POINTER(_Settings)] + [ctypes.c_int64] * 4
    return load_library(SOURCE, {"apollo_step": (None, arguments)}, "Apollo takes the slower foreach step")


def _fused_cpu_apollo(
    tensors: StepTensors, settings: Settings, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The step for parameters of one dtype without gaps in memory."""
    if found_inf is not None and found_inf.item():
        return
    s, params, kept = settings, tensors.params, tensors.kept
    tensors = replace(tensors, grads=laid_out(params, tensors.grads))
    if "rows" not in kept or kept["belief"] != s.belief:
        kept["rows"], kept["belief"] = _rows(tensors, s), s.belief
        kept["large"] = [i for i, param in enumerate(params) if param.numel() > LARGE]
    rows = kept["rows"]
    rows[GRAD::COLUMNS] = array("q", map(Tensor.data_ptr, tensors.grads))

    def note(i: int) -> tuple:
        return note_of(s, [params[i], *(state[i] for state in tensors.states)])

    carrying = kept["large"] if are_carried(s) else []
    state_sums = array("d", bytes(32 * len(params)))  # four numbers for each tensor
    known = array("q", bytes(8 * len(params)))
    for i in carrying:
        left = _carried.take(tensors.directions[i], note(i))
        if left is not None:
            state_sums[4 * i : 4 * i + 4], known[i] = left, 1
    rows[KNOWN::COLUMNS] = known

    sums = torch.zeros(len(params), 5, dtype=torch.float64)
    factor = (-1.0 if s.maximize else 1.0) / (1.0 if grad_scale is None else grad_scale.item())
    numbers = float(s.lr), s.beta, s.eps, s.sigma, s.init_lr, s.l2, s.decay, factor
    struct = _Settings(*numbers, int(s.warmup), s.belief, s.stable, tensors.stores_average, LARGE)

    def run(stages: int) -> None:
        arrays = rows.buffer_info()[0], sums.data_ptr(), state_sums.buffer_info()[0]
        dtype = DTYPES[params[0].dtype]
        library().apollo_step(*arrays, struct, len(params), dtype, stages, torch.get_num_threads())

    increment_version(params)  # autograd does not see native writes
    if not any(tensors.shards):
        run(SUM | UPDATE | DIRECTION if s.stable else SUM | UPDATE)
    else:
        run(SUM)
        join_sums(sums[:, :3], tensors.shards)
        if s.belief:
            join_sums(sums[:, 4:], tensors.shards, largest=True)
        run(UPDATE)
        if s.stable:
            join_sums(sums[:, 3:4], tensors.shards)
            run(DIRECTION)
    for i in carrying:
        _carried.leave(tensors.directions[i], note(i), state_sums[4 * i : 4 * i + 4])


def _rows(tensors: StepTensors, settings: Settings) -> array:
    """A struct ApolloTensor for each tensor."""
    nothing = [None] * len(tensors.params)
    addresses = [tensors.params, nothing, tensors.exp_avgs, tensors.hessians, tensors.directions]
    addresses += [tensors.sigmas if settings.belief else nothing, tensors.steps]
    columns = [[0 if x is None else x.data_ptr() for x in column] for column in addresses]
    columns += [list(map(Tensor.numel, tensors.params)), tensors.numels, [0] * len(tensors.params)]
    return array("q", chain.from_iterable(zip(*columns, strict=True)))


if __name__ == "__main__":
    print(compile_library(SOURCE))
