"""The Triton kernels of Apollo's fused step on a GPU. cuda.py launches them."""

import triton
import triton.language as tl

PARAM, GRAD, EXP_AVG, HESSIAN, DIRECTION, SIGMA, STEP, NUMEL, WHOLE_NUMEL, FIRST_CHUNK, CHUNKS, COLUMNS = (
    tl.constexpr(i) for i in range(12)
)
# Columns of a tensor's scalars. D = max(|B|, bound) + offset, before this step and in it.
LR, ALPHA, DELTA, BOUND_BEFORE, OFFSET_BEFORE, BOUND, OFFSET, DECAY, SCALARS = (tl.constexpr(i) for i in range(9))
# Columns of the sums over a tensor or chunk: of d^4, B d^2, m d and (with L2 decay) p d, which a step may leave for the
# next one; of g d (g without L2 decay), the maximum of |g - m|, and the sum of D.
D4, BDD, MD, PD, GD, MAX, CURVATURE, SUMS = (tl.constexpr(i) for i in range(8))


@triton.jit
def _address(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # lets the compiler load 16 bytes at a time
    return pointer


@triton.jit
def _addresses(row, P: tl.constexpr, ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr):
    p = _address(row, PARAM, P, ALIGNED)
    g = _address(row, GRAD, P, GRAD_ALIGNED)
    m = _address(row, EXP_AVG, tl.float32, ALIGNED)
    h = _address(row, HESSIAN, tl.float32, ALIGNED)
    d = _address(row, DIRECTION, tl.float32, ALIGNED)
    return p, g, m, h, d


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
def _sum_state(param, average, hessian, direction, d4, bdd, md, pd, L2: tl.constexpr):
    """Adds a block's part of the sums that need no gradient."""
    square = direction * direction
    if L2:
        pd += param * direction
    return d4 + square * square, bdd + hessian * square, md + average * direction, pd


@triton.jit
def _store_state_sums(out, d4, bdd, md, pd):
    # In float64 the order in which a kernel adds up the lanes does not matter.
    tl.store(out + D4, tl.sum(d4.to(tl.float64), 0))
    tl.store(out + BDD, tl.sum(bdd.to(tl.float64), 0))
    tl.store(out + MD, tl.sum(md.to(tl.float64), 0))
    tl.store(out + PD, tl.sum(pd.to(tl.float64), 0))


@triton.jit
def _sum_block(
    p, g, m, h, d, offsets, mask, l2, factor, bound, offset, d4, bdd, md, pd, gd, largest,
    L2: tl.constexpr, STORED: tl.constexpr, BELIEF: tl.constexpr, CARRIED: tl.constexpr,
):  # fmt: skip
    grad = _load(g, offsets, mask) * factor
    before = _load(d, offsets, mask)
    gd += grad * before
    if not CARRIED:
        hessian = _load(h, offsets, mask)
        param = 0.0
        if L2:
            param = _load(p, offsets, mask)
        if STORED:
            average = _load(m, offsets, mask)
        else:
            average = before * _rectify(hessian, bound, offset)
        d4, bdd, md, pd = _sum_state(param, average, hessian, before, d4, bdd, md, pd, L2)
        if BELIEF:
            largest = tl.maximum(largest, tl.abs(grad + l2 * param - average))
    return d4, bdd, md, pd, gd, largest


@triton.jit
def sum_chunks(
    table, chunks, partials, l2, factor, sigma, eps, log_beta, one_minus_beta, grad_scale,
    P: tl.constexpr, L2: tl.constexpr, STORED: tl.constexpr, BELIEF: tl.constexpr, CARRIED: tl.constexpr,
    SCALED: tl.constexpr, ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * chunk) * COLUMNS
    begin = tl.load(chunks + 2 * chunk + 1) * CHUNK
    p, g, m, h, d = _addresses(row, P, ALIGNED, GRAD_ALIGNED)
    if SCALED:
        factor = factor / tl.load(grad_scale)
    bound = sigma
    offset = 0.0
    if BELIEF:
        bound = tl.load(_address(row, SIGMA, tl.float32, False))
        before = tl.load(_address(row, STEP, tl.float32, False)).to(tl.float64)
        offset = (eps * (1 - tl.exp(before * log_beta)) / one_minus_beta).to(tl.float32)

    zeros = tl.zeros([BLOCK], tl.float32)
    d4, bdd, md, pd, gd, largest = zeros, zeros, zeros, zeros, zeros, zeros
    here = tl.minimum(tl.load(row + NUMEL) - begin, CHUNK).to(tl.int32)
    full = here // BLOCK * BLOCK
    for i in range(0, full, BLOCK):
        offsets = begin + i + tl.arange(0, BLOCK)
        d4, bdd, md, pd, gd, largest = _sum_block(
            p, g, m, h, d, offsets, None, l2, factor, bound, offset, d4, bdd, md, pd, gd, largest,
            L2, STORED, BELIEF, CARRIED,
        )  # fmt: skip
    if full < here:
        rest = full + tl.arange(0, BLOCK)
        d4, bdd, md, pd, gd, largest = _sum_block(
            p, g, m, h, d, begin + rest, rest < here, l2, factor, bound, offset, d4, bdd, md, pd, gd, largest,
            L2, STORED, BELIEF, CARRIED,
        )  # fmt: skip
    out = partials + chunk * SUMS
    tl.store(out + GD, tl.sum(gd.to(tl.float64), 0))
    if not CARRIED:
        _store_state_sums(out, d4, bdd, md, pd)
        tl.store(out + MAX, tl.max(largest, 0).to(tl.float64))


@triton.jit
def _joined(partials, row, COLUMN: tl.constexpr, JOIN: tl.constexpr, LARGEST: tl.constexpr):
    """The sum (or maximum) of one column over a tensor's chunks."""
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
    """Sums over this rank's part of a sharded tensor."""
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * COLUMNS
    out = sums + tensor * SUMS
    for column in tl.static_range(SUMS):
        tl.store(out + column, _joined(partials, row, column, JOIN, column == MAX))


@triton.jit
def _sum_of(sums, partials, row, tensor, COLUMN: tl.constexpr, SHARDED: tl.constexpr, JOIN: tl.constexpr):
    """One sum over a tensor, joined over the ranks if it is sharded."""
    if SHARDED:
        total = tl.load(sums + tensor * SUMS + COLUMN)
    else:
        total = _joined(partials, row, COLUMN, JOIN, COLUMN == MAX)
    return total


@triton.jit
def make_scalars(
    table, partials, sums, scalars, lr, init_lr, warmup, log_beta, one_minus_beta, eps, norm_eps, sigma, l2, decay,
    found_inf, L2: tl.constexpr, LR_TENSOR: tl.constexpr, BELIEF: tl.constexpr, SHARDED: tl.constexpr,
    FOUND_INF: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * COLUMNS
    d4 = _sum_of(sums, partials, row, tensor, D4, SHARDED, JOIN)
    bdd = _sum_of(sums, partials, row, tensor, BDD, SHARDED, JOIN)
    gd = _sum_of(sums, partials, row, tensor, GD, SHARDED, JOIN)
    gd -= _sum_of(sums, partials, row, tensor, MD, SHARDED, JOIN)
    if L2:
        gd += l2 * _sum_of(sums, partials, row, tensor, PD, SHARDED, JOIN)
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
    lr = tl.where((before < warmup) & (lr != 0), init_lr + (lr - init_lr) * before / tl.maximum(warmup, 1), lr)

    out = scalars + tensor * SCALARS
    tl.store(out + LR, lr.to(tl.float32))
    tl.store(out + ALPHA, (1 / inverse_alpha).to(tl.float32))
    tl.store(out + DELTA, delta.to(tl.float32))
    tl.store(out + DECAY, decay)
    if BELIEF:
        largest = _sum_of(sums, partials, row, tensor, MAX, SHARDED, JOIN)
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
    p, g, m, h, d, offsets, mask, l2, factor, lr, alpha, delta, bound_before, offset_before, bound, offset, decay,
    curvatures, d4, bdd, md, pd, L2: tl.constexpr, STORED: tl.constexpr, STABLE: tl.constexpr, CARRY: tl.constexpr,
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
            curvatures += curvature
        else:
            curvatures += tl.where(mask, curvature, 0.0)
    else:
        direction = average / curvature
        if STORED:
            direction += decay * param
        rounded = (param - lr * direction).to(p.dtype.element_ty)
        tl.store(d + offsets, direction, mask)
        tl.store(p + offsets, rounded, mask)
        if CARRY:  # the same bits as a sum computed anew
            if not STORED:
                average = direction * curvature
            d4, bdd, md, pd = _sum_state(rounded.to(tl.float32), average, hessian, direction, d4, bdd, md, pd, L2)
    return curvatures, d4, bdd, md, pd


@triton.jit
def update_chunks(
    table, chunks, partials, scalars, l2, factor, grad_scale, found_inf,
    P: tl.constexpr, L2: tl.constexpr, STORED: tl.constexpr, STABLE: tl.constexpr, CARRY: tl.constexpr,
    SCALED: tl.constexpr, FOUND_INF: tl.constexpr, ALIGNED: tl.constexpr, GRAD_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Begins with the last chunks: their g and d may still be in the L2 cache after sum_chunks."""
    chunk = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    tensor = tl.load(chunks + 2 * chunk)
    row = table + tensor * COLUMNS
    begin = tl.load(chunks + 2 * chunk + 1) * CHUNK
    p, g, m, h, d = _addresses(row, P, ALIGNED, GRAD_ALIGNED)
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
    zeros = tl.zeros([BLOCK], tl.float32)
    curvatures, d4, bdd, md, pd = zeros, zeros, zeros, zeros, zeros
    for i in range(0, full, BLOCK):
        offsets = begin + i + tl.arange(0, BLOCK)
        curvatures, d4, bdd, md, pd = _update_block(
            p, g, m, h, d, offsets, None, l2, factor, lr, alpha, delta, bound_before, offset_before, bound, offset,
            decay, curvatures, d4, bdd, md, pd, L2, STORED, STABLE, CARRY,
        )  # fmt: skip
    if full < here:
        rest = full + tl.arange(0, BLOCK)
        curvatures, d4, bdd, md, pd = _update_block(
            p, g, m, h, d, begin + rest, rest < here, l2, factor, lr, alpha, delta, bound_before, offset_before, bound,
            offset, decay, curvatures, d4, bdd, md, pd, L2, STORED, STABLE, CARRY,
        )  # fmt: skip
    out = partials + chunk * SUMS
    if STABLE:
        tl.store(out + CURVATURE, tl.sum(curvatures, 0).to(tl.float64))
    if CARRY:  # noqa: SIM102  (older Tritons do not compile both at once)
        if here > 0:  # a skipped step leaves the sums as they are
            _store_state_sums(out, d4, bdd, md, pd)


@triton.jit
def make_stable_decay(table, partials, sums, scalars, decay, SHARDED: tl.constexpr, JOIN: tl.constexpr):
    """Decay "stable": divides the coefficient by the mean of D."""
    tensor = tl.program_id(0).to(tl.int64)
    row = table + tensor * COLUMNS
    total = _sum_of(sums, partials, row, tensor, CURVATURE, SHARDED, JOIN)
    mean = total / tl.load(row + WHOLE_NUMEL).to(tl.float64)
    tl.store(scalars + tensor * SCALARS + DECAY, (decay / mean).to(tl.float32))


@triton.jit
def direct_chunks(
    table, chunks, scalars, found_inf,
    P: tl.constexpr, FOUND_INF: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decay "stable": computes d and p, which update_chunks left out."""
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * chunk)
    row = table + tensor * COLUMNS
    begin = tl.load(chunks + 2 * chunk + 1) * CHUNK
    p, _, m, h, d = _addresses(row, P, ALIGNED, False)
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
