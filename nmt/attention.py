"""Multi-head attention. Hidden states are rows (nmt/rows.py).

Queries, keys and values have one matrix each, as published: Apollo's sums go over a whole tensor, so a joint matrix
would be another method.
"""

import torch
from overrides import override
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nmt.decoding_state import DecodingState
from nmt.dropout import Dropout
from nmt.rows import to_rows

Size = tuple[int, int]  # sentences and words, or sentences and hypotheses


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.dropout = Dropout(dropout)

    @torch.no_grad()
    def initialise(self) -> None:
        """As in fairseq's MultiheadAttention.reset_parameters. Other biases stay Linear's."""
        for projection in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(projection.weight, gain=2**-0.5)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def split(self, rows: Tensor, size: Size) -> Tensor:
        """Rows as [B, heads, T, width / heads]."""
        batch, words = size
        return rows[: batch * words].view(batch, words, self.heads, -1).transpose(1, 2)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool = False
    ) -> Tensor:
        """[B, heads, T, width / heads] to rows. `mask` is True where a query may look."""
        if queries.device.type == "cpu" and queries.requires_grad:
            attended = self._spelled_out(queries, keys, values, mask, causal)
        else:
            p = self.dropout.p if self.training else 0.0
            attended = scaled_dot_product_attention(queries, keys, values, mask, p, causal)
        return self.output(to_rows(attended.transpose(1, 2).flatten(2)))

    def _spelled_out(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """On the CPU the fused kernel has no dropout, and its backward pass is slow on sentences."""
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return self.dropout(scores.softmax(-1)) @ values


class SelfAttention(Attention):
    @override(check_signature=False)
    def forward(self, x: Tensor, size: Size, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        return self.attend(*self._project(x, size), mask, causal)

    def step(self, x: Tensor, size: Size, state: DecodingState, layer: int) -> Tensor:
        """Attention of the newest words, of size [B, K]. `layer` is this layer's number."""
        queries, keys, values = self._project(x, size)
        return self.attend(queries, *state.append(layer, keys, values), state.mask)

    def _project(self, x: Tensor, size: Size) -> tuple[Tensor, ...]:
        return tuple(self.split(projection(x), size) for projection in (self.query, self.key, self.value))


class CrossAttention(Attention):
    def keys_values(self, memory: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Keys and values of the source, [B, heads, S, width / heads] each."""
        return self.split(self.key(memory), size), self.split(self.value(memory), size)

    @override(check_signature=False)
    def forward(self, x: Tensor, size: Size, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        return self.attend(self.split(self.query(x), size), keys, values, mask)
