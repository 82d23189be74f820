"""The adaptive softmax (Grave et al. 2017, arXiv 1609.04309), as training needs it.

The most frequent words are in its head, the others in clusters (tails) with smaller projections.
"""

from collections.abc import Sequence
from typing import Any

import torch
from overrides import override
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, pad

ROWS = 32  # a cluster computes a multiple of this many rows


def create_softmax(hidden: int, words: int, cutoffs: Sequence[int], div_value: float) -> nn.AdaptiveLogSoftmaxWithLoss:
    """torch's module. ValueError for cutoffs that do not fit the vocabulary or the `hidden` features."""
    cutoffs = list(cutoffs)
    if not cutoffs or cutoffs != sorted(set(cutoffs)) or not 0 < cutoffs[0] <= cutoffs[-1] < words:
        raise ValueError(f"cutoffs={cutoffs} must rise, from 1 on, and stay below the vocabulary's {words:,} words")
    if hidden < div_value ** len(cutoffs):
        raise ValueError(f"hidden={hidden} leaves no dimension to the last of {len(cutoffs)} clusters behind cutoffs")
    return nn.AdaptiveLogSoftmaxWithLoss(hidden, words, cutoffs, div_value)


def cluster_sizes(softmax: nn.AdaptiveLogSoftmaxWithLoss, targets: Tensor) -> list[int]:
    """How many of `targets`, int64, each cluster has. The host waits for a GPU."""
    return torch.bincount(_clusters(softmax, targets.flatten()), minlength=len(softmax.cutoffs)).tolist()


def _clusters(softmax: nn.AdaptiveLogSoftmaxWithLoss, targets: Tensor) -> Tensor:
    return sum((targets >= cutoff).long() for cutoff in softmax.cutoffs[:-1])


def adaptive_log_prob(
    softmax: nn.AdaptiveLogSoftmaxWithLoss, hidden: Tensor, targets: Tensor, sizes: Sequence[int] | None = None
) -> Tensor:
    """The `output` of softmax(hidden, targets), float32 [N], for `hidden` [N, features] and `targets` int64 [N].

    It differs from the module's forward in four ways:
    - Under autocast only matrix products are in half precision.
    - With `sizes`, the targets' cluster_sizes, the host does not wait for the device.
    - A cluster without targets gets zero gradients. The module gives it none, and ranks could then disagree.
    - Each cluster takes a multiple of ROWS rows. On CPUs, oneDNN compiles a kernel for each shape. Padding saves a
      fifth of an update's time there, and memory stays flat.
    """
    sizes = cluster_sizes(softmax, targets) if sizes is None else sizes
    cluster = _clusters(softmax, targets)
    order = cluster.argsort(stable=True)
    hidden, targets, cluster = hidden[order], targets[order], cluster[order]

    in_head = torch.where(cluster == 0, targets, softmax.shortlist_size + cluster - 1)
    log_prob = _LogProb.apply(softmax.head(hidden), in_head)
    low, begin, total = softmax.cutoffs[0], sizes[0], len(targets)
    for index, (tail, high, size) in enumerate(zip(softmax.tail, softmax.cutoffs[1:], sizes[1:], strict=True), start=1):
        rows = min(total, -(-size // ROWS) * ROWS)
        first = min(begin, total - rows)
        some = slice(first, first + rows)  # a few do not count
        in_tail = _LogProb.apply(tail(hidden[some]), (targets[some] - low).clamp(0, high - low - 1))
        in_tail = torch.where(cluster[some] == index, in_tail, 0.0)
        log_prob = log_prob + pad(in_tail, (first, total - first - rows))
        low, begin = high, begin + size
    return log_prob[order.argsort()]


class _LogProb(torch.autograd.Function):
    """Log-probabilities, float32 [N], of `targets` [N] under `logits` [N, classes] of any precision.

    The gradient, one-hot minus softmax, takes half the time and memory of log_softmax and nll_loss.
    """

    @staticmethod
    @override(check_signature=False)  # torch declares *args
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_prob = log_softmax(logits, 1, dtype=torch.float32)
        ctx.save_for_backward(log_prob, targets[:, None])
        ctx.dtype = logits.dtype
        return log_prob.gather(1, targets[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    @override(check_signature=False)
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        log_prob, targets = ctx.saved_tensors
        gradient = gradient[:, None]
        to_logits = log_prob.exp().mul_(-gradient).scatter_add_(1, targets, gradient)
        return to_logits.to(ctx.dtype), None
