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
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _gradient(g, p, offsets, mask, factor, l2, L2: tl.constexpr):
    grad = tl.load(g + offsets, mask, other=0).to(tl.float32) * factor
    if L2:
        grad += l2 * tl.load(p + offsets, mask, other=0).to(tl.float32)
    return grad


@triton.jit
def _factor(factor, grad_scale, SCALED: tl.constexpr):
    if SCALED:
        factor = factor / tl.load(grad_scale)
    return factor


@triton.jit
def _sum(
    table, chunks, partials, l2, factor, sigma, eps, log_beta, one_minus_beta, grad_scale,
    P: tl.constexpr, L2: tl.constexpr, STORED: tl.constexpr, BELIEF: tl.constexpr, SCALED: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * chunk) * COLUMNS
    begin = tl.load(chunks + 2 * chunk + 1) * CHUNK
    numel = tl.load(row + NUMEL)
    p = _address(row, PARAM, P, ALIGNED)
    g = _address(row, GRAD, P, ALIGNED)
    m = _address(row, EXP_AVG, tl.float32, ALIGNED)
    h = _address(row, HESSIAN, tl.float32, ALIGNED)
    factor = _factor(factor, grad_scale, SCALED)
    bound = sigma
    offset = 0.0
    if BELIEF:
        bound = tl.load(_address(row, SIGMA, tl.float32, False))
        before = tl.load(_address(row, STEP, tl.float32, False))
        offset = eps * (1 - tl.exp(before * log_beta)) / one_minus_beta

    d4 = tl.zeros([BLOCK], tl.float32)
    gd = tl.zeros([BLOCK], tl.float32)
    bdd = tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    for i in range(0, CHUNK, BLOCK):
        offsets = begin + i + tl.arange(0, BLOCK)
