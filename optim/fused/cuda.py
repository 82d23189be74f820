"""Apollo's fused step on a GPU: three Triton launches for a list of tensors, five with decay "stable".

    sum_chunks      for each chunk: its part of the sums that are not carried over
    make_scalars    for each tensor: adds up its chunks, makes the scalars of its update, counts the step
    update_chunks   for each chunk: m, B, d, p

The kernels find the tensors through a table of addresses on the device, sent only when an address has changed. Nothing
waits for the device: step counts, found_inf and tensor learning rates are read there. With capturable=True no sums are
carried over (carried_sums.py): the replay of a CUDA graph cannot check them.
"""

import math
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, chain

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ..apollo_math import norm_eps
from ..settings import Settings
from ..sharded import join_sums
from ..step_tensors import StepTensors
from .carried_sums import CarriedSums, are_carried, note_of
from .layout import laid_out
from .triton_kernels import (
    COLUMNS,
    CURVATURE,
    MAX,
    SCALARS,
    SUMS,
    direct_chunks,
    join_chunks,
    make_scalars,
    make_stable_decay,
    sum_chunks,
    update_chunks,
)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CHUNK = 16384  # elements of a chunk
BLOCK = 1024  # elements in registers at a time
JOIN = 1024  # chunks added up at a time

_carried = CarriedSums()  # of a whole list's chunks, owned by its first direction


def _fused_cuda_apollo(
    tensors: StepTensors, settings: Settings, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """The step for parameters of one device and dtype without gaps in memory."""
    s, params, device = settings, tensors.params, tensors.params[0].device
    stored, sharded = tensors.stores_average, any(tensors.shards)

    tensors = replace(tensors, grads=laid_out(params, tensors.grads))
    here = tuple(map(Tensor.numel, params))
    chunks, first_chunks, counts = _chunks(here, device)
    grads, kept = _addresses(tensors.grads), tensors.kept
    if kept.get("table_of") != (grads, s.belief):
        nothing = [0] * len(params)
        addresses = [
            _addresses(params),
            grads,
            _addresses(tensors.exp_avgs) if stored else nothing,
            _addresses(tensors.hessians),
            _addresses(tensors.directions),
            _addresses(tensors.sigmas) if s.belief else nothing,
            _addresses(tensors.steps),
        ]
        columns = [*addresses, here, tensors.numels, first_chunks, counts]
        kept["table_of"] = grads, s.belief
        kept["table"] = tuple(chain.from_iterable(zip(*columns, strict=True)))
        kept["aligned"] = all(address % 16 == 0 for column in (addresses[0], *addresses[2:5]) for address in column)
        # Gradients apart: DistributedDataParallel's buckets have no gaps, and after a short bias they would cost the
        # other tensors their loads of 16 bytes.
        kept["grad_aligned"] = all(address % 16 == 0 for address in grads)
    table = _on_device(kept["table"], device)
    if _is_capturing(device):
        _captured.append((chunks, table))

    def note() -> tuple:
        return note_of(s, [*params, *chain.from_iterable(tensors.states)])

    carry = are_carried(s) and not s.capturable
    partials = _carried.take(tensors.directions[0], note()) if carry else None
    known = partials is not None
    if not known:
        partials = torch.empty(len(chunks), SUMS.value, dtype=torch.float64, device=device)
    sums = torch.empty(len(params), SUMS.value, dtype=torch.float64, device=device)
    scalars = torch.empty(len(params), SCALARS.value, dtype=torch.float32, device=device)
    lr = s.lr.to(device, torch.float32, non_blocking=True) if isinstance(s.lr, Tensor) else s.lr
    factor = -1.0 if s.maximize else 1.0
    log_beta, one_minus_beta = math.log(s.beta) if s.beta > 0 else -1e30, 1 - s.beta
    common = {"P": DTYPES[params[0].dtype], "ALIGNED": kept["aligned"], "CHUNK": CHUNK, "BLOCK": BLOCK}
    flags = {"L2": s.l2 != 0, "STORED": stored, "SCALED": grad_scale is not None, "GRAD_ALIGNED": kept["grad_aligned"]}
    # Without fused multiply-adds, carried and newly computed sums have the same bits.
    flags |= {**common, "enable_fp_fusion": False}
    skipping = {"FOUND_INF": found_inf is not None}

    increment_version(params)  # autograd does not see the writes of kernels
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if len(chunks):
            sum_chunks[(len(chunks),)](
                table, chunks, partials, s.l2, factor, s.sigma, s.eps, log_beta, one_minus_beta, grad_scale,
                BELIEF=s.belief, CARRIED=known, **flags,
            )  # fmt: skip
        if sharded:
            join_chunks[(len(params),)](table, partials, sums, JOIN=JOIN)
            join_sums(sums[:, : MAX.value], tensors.shards)
            if s.belief:
                join_sums(sums[:, MAX.value : CURVATURE.value], tensors.shards, largest=True)
        make_scalars[(len(params),)](
            table, partials, sums, scalars, lr, s.init_lr, s.warmup, log_beta, one_minus_beta, s.eps,
            norm_eps(s.eps, s.sigma, s.rebound), s.sigma, s.l2, s.decay, found_inf,
            L2=s.l2 != 0, LR_TENSOR=isinstance(lr, Tensor), BELIEF=s.belief, SHARDED=sharded, JOIN=JOIN, **skipping,
        )  # fmt: skip
        if len(chunks):
            update_chunks[(len(chunks),)](
                table, chunks, partials, scalars, s.l2, factor, grad_scale, found_inf,
                STABLE=s.stable, CARRY=carry, **flags, **skipping,
            )  # fmt: skip
        if carry:
            _carried.leave(tensors.directions[0], note(), partials)
        if not s.stable:
            return
        if sharded:
            join_chunks[(len(params),)](table, partials, sums, JOIN=JOIN)
            join_sums(sums[:, CURVATURE.value :], tensors.shards)
        make_stable_decay[(len(params),)](table, partials, sums, scalars, s.decay, SHARDED=sharded, JOIN=JOIN)
        if len(chunks):
            direct_chunks[(len(chunks),)](table, chunks, scalars, found_inf, **common, **skipping)


def launch_one() -> None:
    """Launches the smallest kernel on one empty tensor. Raises Triton's error if that fails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's interpreter runs it
    table = torch.zeros(1, COLUMNS.value, dtype=torch.int64, device=device)
    sums = torch.empty(1, SUMS.value, dtype=torch.float64, device=device)
    join_chunks[(1,)](table, sums, sums, JOIN=JOIN)


def _addresses(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


@lru_cache(maxsize=64)
def _chunks(numels: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int], list[int]]:
    """Tensor and place of each chunk, [chunks, 2] on the device; first chunk and count for each tensor."""
    counts = [-(-numel // CHUNK) for numel in numels]
    first = [0, *accumulate(counts)][:-1]
    places = [(i, k) for i, count in enumerate(counts) for k in range(count)]
    return torch.tensor(places, dtype=torch.int64).view(-1, 2).to(device), first, counts


# For each size a pinned and a device buffer are in reserve: the capture of a CUDA graph should not allocate them.
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_reserve: dict[tuple, tuple[Tensor, Tensor]] = {}
_captured: list[tuple[Tensor, ...]] = []  # tensors that CUDA graphs still read


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _pinned(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory() if device.type == "cuda" else values


def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """`values` as int64 on the device."""
    key, size, capturing = (device, values), (device, len(values)), _is_capturing(device)
    table = _tables.get(key)
    if table is not None:
        _tables.move_to_end(key)
    elif capturing:
        if size not in _reserve:
            raise RuntimeError("Apollo: make a step before each one that is captured, as torch.cuda.graph asks")
        pinned, table = _reserve.pop(size)
        table.copy_(pinned.copy_(torch.tensor(values)), non_blocking=True)
        _captured.append((pinned,))
    else:
        table = _tables[key] = _pinned(torch.tensor(values), device).to(device, non_blocking=True)
        if len(_tables) > 16:
            _tables.popitem(last=False)
    if not capturing and size not in _reserve:  # in every step, as a capture may follow
        empty = torch.empty(len(values), dtype=torch.int64)
        _reserve[size] = _pinned(empty, device), torch.empty_like(empty, device=device)
    return table
