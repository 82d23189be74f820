"""The published language model: an embedding, an LSTM (or GRU, or plain RNN), and an adaptive softmax over all words.

The network's state is one float32 tensor [parts, layers, rows, hidden]. The parts are h and c for an LSTM, and only h
for the others. The state is detached; the training loop keeps it, and a checkpoint contains it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from overrides import override
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, pad

ROWS = 32  # each cluster of the softmax computes a multiple of this many rows
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class LanguageModel(nn.Module):
    """Predicts each token from those before it.

    Args:
        words: size of the vocabulary. The ids go from the most to the least frequent word.
        cell: lstm, gru or rnn (tanh).
        embedding, hidden, layers: sizes; published: 300, 2048, 2.
        dropout: on the embeddings, between the layers, and on the last layer's output.
        cutoffs: ids where the adaptive softmax starts a new cluster; published: 60000, 100000, 640000. The projection
            of cluster i = 1, 2, ... after the first cutoff has hidden / div_value**i dimensions.

    Raises:
        ValueError: an unknown cell, or cutoffs that do not fit the vocabulary.
    """

    def __init__(
        self,
        words: int,
        cell: str = "lstm",
        *,
        embedding: int = 300,
        hidden: int = 2048,
        layers: int = 2,
        dropout: float = 0.1,
        cutoffs: Sequence[int] = (60_000, 100_000, 640_000),
        div_value: float = 4.0,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"unknown cell '{cell}'; valid: {', '.join(CELLS)}")
        cutoffs = list(cutoffs)
        if not cutoffs or cutoffs != sorted(set(cutoffs)) or not 0 < cutoffs[0] <= cutoffs[-1] < words:
            raise ValueError(f"cutoffs={cutoffs} must rise, from 1 on, and stay below the vocabulary's {words:,} words")
        if hidden < div_value ** len(cutoffs):
            raise ValueError(
                f"hidden={hidden} leaves no dimension to the last of {len(cutoffs)} clusters behind cutoffs"
            )
        self.parts = 2 if cell == "lstm" else 1
        self.embedding = nn.Embedding(words, embedding)
        self.rnn = CELLS[cell](embedding, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(hidden, words, cutoffs, div_value)
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    def _initialise(self) -> None:
        """Published: He-uniform embedding, Xavier-uniform recurrent matrices, zero biases. The softmax keeps torch's.

        An LSTM has two bias vectors per layer. The forget gate's quarter of each is 1, so together they add 2.
        """
        nn.init.kaiming_uniform_(self.embedding.weight)
        for parameter in self.rnn.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
                if isinstance(self.rnn, nn.LSTM):
                    nn.init.ones_(parameter.data.chunk(4)[1])  # the gates' order is input, forget, cell, output

    def zero_state(self, rows: int) -> Tensor:
        """The state at the start of a text."""
        shape = self.parts, self.rnn.num_layers, rows, self.rnn.hidden_size
        return self.embedding.weight.new_zeros(shape, dtype=torch.float32)

    @override(check_signature=False)  # torch declares that forward returns None
    def forward(self, tokens: Tensor, targets: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of `targets`, float32 [steps, rows], and the state after the last step.

        `tokens` and `targets`: int64 [steps, rows]. A target is the token that follows.
        """
        embedded = self.dropout(self.embedding(tokens))
        if self.parts == 2:
            lacking = embedded.device.type == "cpu" and torch.is_autocast_enabled("cpu") and not cpu_has_bf16_lstm()
            with torch.autocast("cpu", enabled=False) if lacking else nullcontext():
                output, (h, c) = self.rnn(embedded, (state[0].contiguous(), state[1].contiguous()))
            state = torch.stack([h, c])
        else:
            output, h = self.rnn(embedded, state[0].contiguous())
            state = h[None]
        output = self.dropout(output).flatten(0, 1)
        log_prob = adaptive_log_prob(self.softmax, output, targets.flatten())
        return log_prob.view_as(targets), state.detach().float()


@cache
def cpu_has_bf16_lstm() -> bool:
    """Whether an LSTM runs in bfloat16 on this processor. If not, it stays in float32 while the rest is in bfloat16.

    On x86, oneDNN's bfloat16 LSTM needs AVX-512, and torch calls it without checking that.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        try:
            nn.LSTM(1, 1)(torch.zeros(1, 1, 1))
        except RuntimeError:
            return False
    return True


def adaptive_log_prob(softmax: nn.AdaptiveLogSoftmaxWithLoss, hidden: Tensor, targets: Tensor) -> Tensor:
    """The `output` of softmax(hidden, targets), float32 [N], for `hidden` [N, features] and `targets` int64 [N].

    It differs from the module's own forward in four ways:
    - Under autocast only the matrix products are in half precision. Log-probabilities are float32.
    - It waits for the device once, not once per cluster.
    - A cluster without targets gets a gradient of zeros. The module gives it none, and ranks could then disagree.
    - Each cluster takes a multiple of ROWS rows. On CPUs, oneDNN compiles a kernel for each new shape, and blocks of
      many sizes fragment the memory. Padding saves a fifth of an update's time there, and memory stays flat.
    """
    cluster = sum((targets >= cutoff).long() for cutoff in softmax.cutoffs[:-1])
    sizes = torch.bincount(cluster, minlength=len(softmax.cutoffs)).tolist()
    order = cluster.argsort(stable=True)
    hidden, targets, cluster = hidden[order], targets[order], cluster[order]

    in_head = torch.where(cluster == 0, targets, softmax.shortlist_size + cluster - 1)
    log_prob = _LogProb.apply(softmax.head(hidden), in_head)
    low, begin, total = softmax.cutoffs[0], sizes[0], len(targets)
    for index, (tail, high, size) in enumerate(zip(softmax.tail, softmax.cutoffs[1:], sizes[1:], strict=True), start=1):
        rows = min(total, -(-size // ROWS) * ROWS)
        first = min(begin, total - rows)
        some = slice(first, first + rows)  # the cluster's rows, and a few of other clusters, which do not count
        in_tail = _LogProb.apply(tail(hidden[some]), (targets[some] - low).clamp(0, high - low - 1))
        in_tail = torch.where(cluster[some] == index, in_tail, 0.0)
        log_prob = log_prob + pad(in_tail, (first, total - first - rows))
        low, begin = high, begin + size
    return log_prob[order.argsort()]


class _LogProb(torch.autograd.Function):
    """Log-probabilities, float32 [N], of `targets` [N] under `logits` [N, classes] of any precision.

    The gradient, one-hot minus softmax, is computed in one step. This takes half the time and memory of log_softmax and
    nll_loss, whose two gradients are each as large as the logits in float32.
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
