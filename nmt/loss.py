"""Label-smoothed cross entropy of a vocabulary projection, without the logits of a whole batch.

The logits of 8,192 tokens over 40,624 words are 1.3 GB in float32, and the plain way holds three such tensors. Here the
forward pass computes the gradients too, block by block.
"""

import math

import torch
from overrides import override
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import pad

from nmt.rows import product_dtype, rounded

BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}  # logits at a time: a CPU's cache, 1 GiB on a GPU


def smoothed_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Sums over tokens, in nats, of the label-smoothed loss, -sum q log p, and of nll, -log p[target].

    As in torch.nn.functional.cross_entropy, q has label_smoothing / V on every word, and the rest on the right word.

    Args:
        hidden: [N, width] float.
        weight: [V, width], the output embeddings.
        target: [N] int64, without padding.
        label_smoothing: in [0, 1).

    Returns:
        Two 0-d float32 tensors. Only the first has gradients.
    """
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return _SmoothedCrossEntropy.apply(hidden, weight, target, label_smoothing, dtype)


class _SmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    @override(check_signature=False)
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, target: Tensor, label_smoothing: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        training = hidden.requires_grad
        words = len(weight)
        cast_weight, cast_hidden = weight.to(dtype), hidden.to(dtype)
        nll, uniform = hidden.new_zeros(2, dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if training else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if training else None

        blocks = math.ceil(len(target) * words / BLOCK_ELEMENTS[hidden.device.type])
        size = rounded(math.ceil(len(target) / max(1, blocks)), dtype, hidden.device)
        for start in range(0, len(target), max(1, size)):
            block = slice(start, start + size)
            t = target[block, None]
            idle = size - len(t)
            h = _with_rows(cast_hidden[block], idle)
            log_p = torch.log_softmax((h @ cast_weight.T)[: len(t)], dim=1, dtype=torch.float32)
            nll -= log_p.gather(1, t).sum()
            uniform -= log_p.sum() / words
            if training:
                grad = log_p.exp_().sub_(label_smoothing / words)  # p - q
                grad.scatter_add_(1, t, grad.new_full(t.shape, label_smoothing - 1))
                grad = _with_rows(grad.to(dtype), idle)
                grad_hidden[block] = (grad @ cast_weight)[: len(t)]
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll)
        return (1 - label_smoothing) * nll + label_smoothing * uniform, nll

    @staticmethod
    @once_differentiable
    @override(check_signature=False)
    def backward(ctx: FunctionCtx, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale, grad_weight * scale, None, None, None


def _with_rows(x: Tensor, rows: int) -> Tensor:
    """`x` with `rows` rows of zeros below. For 0 rows `pad` would copy it."""
    return pad(x, (0, 0, 0, rows)) if rows else x
