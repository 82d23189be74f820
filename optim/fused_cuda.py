"""Apollo's fused step on a GPU: three Triton launches for a whole list of tensors, five with decay "stable".

    sum      a program for each chunk of the list: its part of the three sums (and the largest |g - m|)
    scalars  a program for each tensor: adds up its chunks, makes the scalars of its update, counts the step
    update   a program for each chunk: m, B, d, p

The programs find their tensors through a table of addresses on the device, which is sent there when an address has
changed, and kept otherwise. Nothing waits for the device: counts, a gradient scaler's verdict (found_inf) and learning
rates that are tensors are read there. Chunks are added up in their order, so a step repeated is the same bit for bit.
See optim/apollo.py for the algorithm and its letters; importing this file needs Triton.
"""

import math
from collections import OrderedDict
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from .layout import lay_out_like
from .sharded import ProcessGroups, join_sums

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CHUNK = 16384  # elements of a chunk
BLOCK = 1024  # elements that a program has in registers at a time
JOIN = 1024  # chunks added up at a time

# Columns of the table of tensors.
PARAM, GRAD, EXP_AVG, HESSIAN, DIRECTION, SIGMA, STEP, NUMEL, WHOLE_NUMEL, FIRST_CHUNK, CHUNKS, COLUMNS = (
    tl.constexpr(i) for i in range(12)
)
# Columns of the scalars of a tensor's step. D = max(|B|, bound) + offset, in the step before and in this one.
LR, ALPHA, DELTA, BOUND_BEFORE, OFFSET_BEFORE, BOUND, OFFSET, DECAY, SCALARS = (tl.constexpr(i) for i in range(9))
# Columns of the sums over a tensor or chunk.
D4, GD, BDD, MAX, CURVATURE, SUMS = (tl.constexpr(i) for i in range(6))


@triton.jit
def _address(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # lets the compiler load 16 bytes at a time
    return pointer


@triton.jit
def _rectify(b, bound, offset):
    a = tl.abs(b)
    return tl.where(a < bound, bound, a) + offset  # a NaN stays one


@triton.jit
def _load(pointer, offsets, mask):
    if mask is None:
        x = tl.load(pointer + offsets)
    else:
        x = tl.load(pointer + offsets, mask, other=0)
    return x.to(tl.float32)


@triton.jit
def _sum_block(
    p, g, m, h, d, offsets, mask, l2, factor, bound, offset, d4, gd, bdd, largest,
    L2: tl.constexpr, STORED: tl.constexpr, BELIEF: tl.constexpr,
):  # fmt: skip
    grad = _load(g, offsets, mask) * factor
    if L2:
        grad += l2 * _load(p, offsets, mask)
    average = _load(m, offsets, mask)
    hessian = _load(h, offsets, mask)
    if STORED:
        before = _load(d, offsets, mask)
    else:
        before = average / _rectify(hessian, bound, offset)
    delta_g = grad - average
    square = before * before
    if BELIEF:
        largest = tl.maximum(largest, tl.abs(delta_g))
    return d4 + square * square, gd + delta_g * before, bdd + hessian * square, largest


@triton.jit
def _sum(
    table, chunks, partials, l2, factor, sigma, eps, log_beta, one_minus_beta, grad_scale,
    P: tl.constexpr, L2: tl.constexpr, STORED: tl.constexpr, BELIEF: tl.constexpr, SCALED: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * chunk) * COLUMNS
    begin = tl.load(chunks + 2 * chunk + 1) * CHUNK
    p = _address(row, PARAM, P, ALIGNED)
    g = _address(row, GRAD, P, ALIGNED)
    m = _address(row, EXP_AVG, tl.float32, ALIGNED)
    h = _address(row, HESSIAN, tl.float32, ALIGNED)
    d = _address(row, DIRECTION, tl.float32, ALIGNED)
    if SCALED:
        factor = factor / tl.load(grad_scale)
    bound = sigma
    offset = 0.0
    if BELIEF:
        bound = tl.load(_address(row, SIGMA, tl.float32, False))
        before = tl.load(_address(row, STEP, tl.float32, False)).to(tl.float64)
        offset = (eps * (1 - tl.exp(before * log_beta)) / one_minus_beta).to(tl.float32)

    d4 = tl.zeros([BLOCK], tl.float32)
    gd = tl.zeros([BLOCK], tl.float32)
    bdd = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    here = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    full = here // BLOCK * BLOCK
    for i in range(0, full, BLOCK):
        offsets = begin + i + tl.arange(0, BLOCK)
        d4, gd, bdd, largest = _sum_block(
            p, g, m, h, d, offsets, None, l2, factor, bound, offset, d4, gd, bdd, largest, L2, STORED, BELIEF
        )
    if full < here:
        rest = full + tl.arange(0, BLOCK)
        d4, gd, bdd, largest = _sum_block(
            p, g, m, h, d, begin + rest, rest < here, l2, factor, bound, offset, d4, gd, bdd, largest,
            L2, STORED, BELIEF,
        )  # fmt: skip
    out = partials + chunk * SUMS
    tl.store(out + D4, tl.sum(d4, 0).to(tl.float64))
    tl.store(out + GD, tl.sum(gd, 0).to(tl.float64))
    tl.store(out + BDD, tl.sum(bdd, 0).to(tl.float64))
    tl.store(out + MAX, tl.max(largest, 0).to(tl.float64))


@triton.jit
def _joined(partials, row, COLUMN: tl.constexpr, JOIN: tl.constexpr, LARGEST: tl.constexpr):
    """The sum, or the largest, of one column of a tensor's chunks."""
    first = tl.load(row + FIRST_CHUNK)
    count = tl.load(row + CHUNKS)
    total = tl.zeros([JOIN], tl.float64)
    for i in range(0, count, JOIN):
        k = i + tl.arange(0, JOIN)
        x = tl.load(partials + (first + k) * SUMS + COLUMN, k < count, other=0.0)
        if LARGEST:
            total = tl.maximum(total, x)
        else:
            total += x
    if LARGEST:
        result = tl.max(total, 0)
    else:
        result = tl.sum(total, 0)
    return result


@triton.jit
def _join(table, partials, sums, JOIN: tl.constexpr):
    """Sums over this rank's part of a sharded tensor, which all ranks' are then added to."""
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * COLUMNS
    out = sums + tensor * SUMS
    tl.store(out + D4, _joined(partials, row, D4, JOIN, False))
    tl.store(out + GD, _joined(partials, row, GD, JOIN, False))
    tl.store(out + BDD, _joined(partials, row, BDD, JOIN, False))
    tl.store(out + CURVATURE, _joined(partials, row, CURVATURE, JOIN, False))
    tl.store(out + MAX, _joined(partials, row, MAX, JOIN, True))


@triton.jit
def _scalars(
    table, partials, sums, scalars, lr, init_lr, warmup, log_beta, one_minus_beta, eps, norm_eps, sigma, decay,
    found_inf, LR_TENSOR: tl.constexpr, BELIEF: tl.constexpr, SHARDED: tl.constexpr, FOUND_INF: tl.constexpr,
    JOIN: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * COLUMNS
    if SHARDED:
        d4 = tl.load(sums + tensor * SUMS + D4)
        gd = tl.load(sums + tensor * SUMS + GD)
        bdd = tl.load(sums + tensor * SUMS + BDD)
    else:
        d4 = _joined(partials, row, D4, JOIN, False)
        gd = _joined(partials, row, GD, JOIN, False)
        bdd = _joined(partials, row, BDD, JOIN, False)
    if LR_TENSOR:
        lr = tl.load(lr)
    counted = 1.0
    if FOUND_INF:
        counted = tl.where(tl.load(found_inf) == 0, 1.0, 0.0)

    step = _address(row, STEP, tl.float32, False)
    before = tl.load(step).to(tl.float64)
    offset_before = eps * (1 - tl.exp(before * log_beta)) / one_minus_beta
    inverse_alpha = (1 - tl.exp((before + 1) * log_beta)) / one_minus_beta
    norm = tl.sqrt(tl.sqrt(d4)) + norm_eps
    delta = -(gd / inverse_alpha + bdd) / (norm * norm) / (norm * norm)
    lr = tl.where(before < warmup, init_lr + (lr - init_lr) * before / tl.maximum(warmup, 1), lr)

    out = scalars + tensor * SCALARS
    tl.store(out + LR, lr.to(tl.float32))
    tl.store(out + ALPHA, (1 / inverse_alpha).to(tl.float32))
    tl.store(out + DELTA, delta.to(tl.float32))
    tl.store(out + DECAY, decay)
    if BELIEF:
        if SHARDED:
            largest = tl.load(sums + tensor * SUMS + MAX)
        else:
            largest = _joined(partials, row, MAX, JOIN, True)
        state = _address(row, SIGMA, tl.float32, False)
        sigma_before = tl.load(state)
        bound = tl.where(counted > 0, largest.to(tl.float32), sigma_before)
        tl.store(out + BOUND_BEFORE, sigma_before)
        tl.store(out + OFFSET_BEFORE, offset_before.to(tl.float32))
        tl.store(out + BOUND, bound)
        tl.store(out + OFFSET, (eps * inverse_alpha).to(tl.float32))
        tl.store(state, bound)
    else:
        tl.store(out + BOUND_BEFORE, sigma)
        tl.store(out + OFFSET_BEFORE, 0.0)
        tl.store(out + BOUND, sigma)
        tl.store(out + OFFSET, 0.0)
    tl.store(step, (before + counted).to(tl.float32))


@triton.jit
def _update_block(
    p, g, m, h, d, offsets, mask, l2, factor, lr, alpha, delta, bound_before, offset_before, bound, offset, decay, sum,
    L2: tl.constexpr, STORED: tl.constexpr, STABLE: tl.constexpr,
):  # fmt: skip
    param = _load(p, offsets, mask)
    grad = _load(g, offsets, mask) * factor
    if L2:
        grad += l2 * param
    average = _load(m, offsets, mask)
    hessian = _load(h, offsets, mask)
    if STORED:
        before = _load(d, offsets, mask)
    else:
        before = average / _rectify(hessian, bound_before, offset_before)
    average += alpha * (grad - average)
    hessian += delta * (before * before)
    tl.store(m + offsets, average, mask)
    tl.store(h + offsets, hessian, mask)
    curvature = _rectify(hessian, bound, offset)
    if STABLE:
        if mask is None:
            sum += curvature
        else:
            sum += tl.where(mask, curvature, 0.0)
    else:
        direction = average / curvature
        if STORED:
            direction += decay * param
            tl.store(d + offsets, direction, mask)
        tl.store(p + offsets, (param - lr * direction).to(p.dtype.element_ty), mask)
    return sum


@triton.jit
def _update(
    table, chunks, partials, scalars, l2, factor, grad_scale, found_inf,
    P: tl.constexpr, L2: tl.constexpr, STORED: tl.constexpr, STABLE: tl.constexpr, SCALED: tl.constexpr,
    FOUND_INF: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * chunk)
    row = table + tensor * COLUMNS
    begin = tl.load(chunks + 2 * chunk + 1) * CHUNK
    p = _address(row, PARAM, P, ALIGNED)
    g = _address(row, GRAD, P, ALIGNED)
    m = _address(row, EXP_AVG, tl.float32, ALIGNED)
    h = _address(row, HESSIAN, tl.float32, ALIGNED)
    d = _address(row, DIRECTION, tl.float32, ALIGNED)
    if SCALED:
        factor = factor / tl.load(grad_scale)
    values = scalars + tensor * SCALARS
    lr = tl.load(values + LR)
    alpha = tl.load(values + ALPHA)
    delta = tl.load(values + DELTA)
    bound_before = tl.load(values + BOUND_BEFORE)
    offset_before = tl.load(values + OFFSET_BEFORE)
    bound = tl.load(values + BOUND)
    offset = tl.load(values + OFFSET)
    decay = tl.load(values + DECAY)

    here = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    if FOUND_INF:
        here = tl.where(tl.load(found_inf) == 0, here, 0)
    full = here // BLOCK * BLOCK
    sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, full, BLOCK):
        offsets = begin + i + tl.arange(0, BLOCK)
        sum = _update_block(
            p, g, m, h, d, offsets, None, l2, factor, lr, alpha, delta, bound_before, offset_before, bound, offset,
            decay, sum, L2, STORED, STABLE,
        )  # fmt: skip
    if full < here:
        rest = full + tl.arange(0, BLOCK)
        sum = _update_block(
            p, g, m, h, d, begin + rest, rest < here, l2, factor, lr, alpha, delta, bound_before, offset_before, bound,
            offset, decay, sum, L2, STORED, STABLE,
        )  # fmt: skip
    if STABLE:
        tl.store(partials + chunk * SUMS + CURVATURE, tl.sum(sum, 0).to(tl.float64))


@triton.jit
def _stable_decay(table, partials, sums, scalars, decay, SHARDED: tl.constexpr, JOIN: tl.constexpr):
    """Decay "stable": the coefficient is divided by the mean of D over the tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * COLUMNS
    if SHARDED:
        total = tl.load(sums + tensor * SUMS + CURVATURE)
    else:
        total = _joined(partials, row, CURVATURE, JOIN, False)
    mean = total / tl.load(row + WHOLE_NUMEL).to(tl.float64)
    tl.store(scalars + tensor * SCALARS + DECAY, (decay / mean).to(tl.float32))


@triton.jit
def _direct(
    table, chunks, scalars, found_inf,
    P: tl.constexpr, FOUND_INF: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decay "stable": d and p, which the update has left."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * chunk)
    row = table + tensor * COLUMNS
    begin = tl.load(chunks + 2 * chunk + 1) * CHUNK
    p = _address(row, PARAM, P, ALIGNED)
    m = _address(row, EXP_AVG, tl.float32, ALIGNED)
    h = _address(row, HESSIAN, tl.float32, ALIGNED)
    d = _address(row, DIRECTION, tl.float32, ALIGNED)
    values = scalars + tensor * SCALARS
    lr = tl.load(values + LR)
    bound = tl.load(values + BOUND)
    offset = tl.load(values + OFFSET)
    decay = tl.load(values + DECAY)
    here = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    if FOUND_INF:
        here = tl.where(tl.load(found_inf) == 0, here, 0)
    for i in range(0, here, BLOCK):
        inside = i + tl.arange(0, BLOCK)
        mask = inside < here
        param = _load(p, begin + inside, mask)
        curvature = _rectify(_load(h, begin + inside, mask), bound, offset)
        direction = _load(m, begin + inside, mask) / curvature + decay * param
        tl.store(d + begin + inside, direction, mask)
        tl.store(p + begin + inside, (param - lr * direction).to(P), mask)


def _fused_cuda_apollo(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    directions: list[Tensor | None],
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
    """The step of parameters of one device and dtype, their memory without gaps. For the arguments see apollo.py."""
    device = params[0].device
    stored, belief, sharded = directions[0] is not None, rebound == "belief", any(shards)
    stable = weight_decay != 0 and weight_decay_type == "stable"
    l2, decay = (weight_decay, 0.0) if weight_decay_type == "L2" else (0.0, weight_decay)

    grads = lay_out_like(params, grads, exp_avgs, hessians, *([directions] if stored else []))
    chunks, first_chunks, counts = _chunks(tuple(param.numel() for param in params), device)
    tensors = [params, grads, exp_avgs, hessians, directions if stored else None, sigmas if belief else None, steps]
    columns = [[0] * len(params) if column is None else [x.data_ptr() for x in column] for column in tensors]
    aligned = all(address % 16 == 0 for column in columns[:5] for address in column)
    columns += [[param.numel() for param in params], numels, first_chunks, counts]
    table = _on_device(tuple(x for row in zip(*columns, strict=True) for x in row), device)
    if _is_capturing(device):
        _captured.append((chunks, table))

    partials = torch.empty(len(chunks), SUMS.value, dtype=torch.float64, device=device)
    sums = torch.empty(len(params), SUMS.value, dtype=torch.float64, device=device)
    scalars = torch.empty(len(params), SCALARS.value, dtype=torch.float32, device=device)
    lr_tensor = isinstance(lr, Tensor)
    if lr_tensor:
        lr = lr.to(device, torch.float32, non_blocking=True)
    factor = -1.0 if maximize else 1.0
    log_beta, one_minus_beta = math.log(beta) if beta > 0 else -1e30, 1 - beta
    norm_eps = eps if belief else eps / sigma
    flags = {"SCALED": grad_scale is not None, "ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK}
    flags |= {"P": DTYPES[params[0].dtype], "L2": l2 != 0, "STORED": stored}
    found = {"FOUND_INF": found_inf is not None}

    increment_version(params)  # written to behind autograd's back
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if len(chunks):
            _sum[(len(chunks),)](
                table, chunks, partials, l2, factor, sigma, eps, log_beta, one_minus_beta, grad_scale,
                BELIEF=belief, **flags,
            )  # fmt: skip
        if sharded:
            _join[(len(params),)](table, partials, sums, JOIN=JOIN)
            join_sums(sums[:, :3], shards)
            if belief:
                join_sums(sums[:, 3:4], shards, largest=True)
        _scalars[(len(params),)](
            table, partials, sums, scalars, lr, init_lr, warmup, log_beta, one_minus_beta, eps, norm_eps, sigma, decay,
            found_inf, LR_TENSOR=lr_tensor, BELIEF=belief, SHARDED=sharded, JOIN=JOIN, **found,
        )  # fmt: skip
        if len(chunks):
            _update[(len(chunks),)](
                table, chunks, partials, scalars, l2, factor, grad_scale, found_inf, STABLE=stable, **flags, **found
            )
        if not stable:
            return
        if sharded:
            _join[(len(params),)](table, partials, sums, JOIN=JOIN)
            join_sums(sums[:, 4:], shards)
        _stable_decay[(len(params),)](table, partials, sums, scalars, decay, SHARDED=sharded, JOIN=JOIN)
        if len(chunks):
            _direct[(len(chunks),)](
                table, chunks, scalars, found_inf, P=flags["P"], ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, **found
            )


@lru_cache(maxsize=64)
def _chunks(numels: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int], list[int]]:
    """Of every chunk its tensor and place, [chunks, 2] on the device; of tensors their first chunk and their count."""
    counts = [-(-numel // CHUNK) for numel in numels]
    first = [0, *accumulate(counts)][:-1]
    places = [(i, k) for i, count in enumerate(counts) for k in range(count)]
    return torch.tensor(places, dtype=torch.int64).view(-1, 2).to(device), first, counts


# Tables on the device by what is in them, the latest last; and, by size, one pinned and one device buffer in reserve:
# neither should be allocated while a CUDA graph is being captured.
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_reserve: dict[tuple, tuple[Tensor, Tensor]] = {}
_captured: list[tuple[Tensor, ...]] = []  # what graphs go on reading


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """`values` as int64 on the device, sent there without waiting for it, and only where they have changed."""
    key, size = (device, values), (device, len(values))
    table = _tables.get(key)
    if table is not None:
        _tables.move_to_end(key)
    elif _is_capturing(device):
        if size not in _reserve:
            raise RuntimeError("Apollo: make a few steps before the one that is captured, as torch.cuda.graph asks")
        pinned, table = _reserve.pop(size)
        table.copy_(pinned.copy_(torch.tensor(values)), non_blocking=True)
        _captured.append((pinned,))
    else:
        pinned = torch.tensor(values)
        if device.type == "cuda":
            pinned = pinned.pin_memory()
            if size not in _reserve:
                _reserve[size] = torch.empty_like(pinned).pin_memory(), torch.empty_like(pinned, device=device)
        table = _tables[key] = pinned.to(device, non_blocking=True)
        if len(_tables) > 16:
            _tables.popitem(last=False)
    return table
