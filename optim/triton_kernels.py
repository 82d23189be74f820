"""The Triton kernels of Apollo's fused step on a GPU; fused_cuda.py launches them, and says how they fit together.

Each program finds its tensor through a row of a table of addresses, and works on a chunk of it, a block at a time, or
on the few numbers that its chunks have summed to. See optim/apollo.py for the algorithm and its letters.
"""

import triton
import triton.language as tl

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
    before = _load(d, offsets, mask)
    hessian = _load(h, offsets, mask)
    if STORED:
        average = _load(m, offsets, mask)
    else:
        average = before * _rectify(hessian, bound, offset)
    delta_g = grad - average
    square = before * before
    if BELIEF:
        largest = tl.maximum(largest, tl.abs(delta_g))
    return d4 + square * square, gd + delta_g * before, bdd + hessian * square, largest


@triton.jit
def sum_chunks(
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
def join_chunks(table, partials, sums, JOIN: tl.constexpr):
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
def make_scalars(
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
    before = _load(d, offsets, mask)
    hessian = _load(h, offsets, mask)
    if STORED:
        average = _load(m, offsets, mask)
    else:
        average = before * _rectify(hessian, bound_before, offset_before)
    average += alpha * (grad - average)
    hessian += delta * (before * before)
    if STORED:
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
def update_chunks(
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
def make_stable_decay(table, partials, sums, scalars, decay, SHARDED: tl.constexpr, JOIN: tl.constexpr):
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
def direct_chunks(
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
