"""Multi-head attention: projections fused into one product, then torch's scaled_dot_product_attention.

Hidden states are rows (nmt/rows.py), which the size of the batch tells apart.
"""

import torch
from overrides import override
from torch.nn.functional import scaled_dot_product_attention

from nmt.decoding_state import DecodingState
from nmt.dropout import Dropout
from nmt.rows import to_rows

Size = tuple[int, int]  # of a batch: sentences and words, or sentences and hypotheses


class Projections(torch.nn.Linear):
    """`count` projections of the same vectors in one matrix product: rows to [B, heads, T, width / heads] each."""

    def __init__(self, width: int, heads: int, count: int) -> None:
        super().__init__(width, count * width)
        self.heads, self.count = heads, count

    @override(check_signature=False)
    def forward(self, x: torch.Tensor, size: Size) -> tuple[torch.Tensor, ...]:
        batch, words = size
        projected = super().forward(x)[: batch * words]
        return projected.view(batch, words, self.count, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()


class Attention(torch.nn.Module):
    """What self-attention and attention to the source share: everything after the projections."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.output = torch.nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool = False,
    ) -> torch.Tensor:
        """[B, heads, T, width / heads] to rows; `mask` is boolean, True where a query may look."""
        if queries.device.type == "cpu" and queries.requires_grad:
            attended = self._spelled_out(queries, keys, values, mask, causal)
        else:
            p = self.dropout.p if self.training else 0.0
            attended = scaled_dot_product_attention(queries, keys, values, mask, p, causal)
        return self.output(to_rows(attended.transpose(1, 2).flatten(2)))

    def _spelled_out(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        """The same for training on the CPU, where the fused kernel is slow backwards on sentences and has no dropout.

        Its other kernel converts everything to float32 and back.
        """
        scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return self.dropout(scores.softmax(-1)) @ values


class SelfAttention(Attention):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, dropout)
        self.projections = Projections(width, heads, 3)

    @override(check_signature=False)
    def forward(
        self, x: torch.Tensor, size: Size, mask: torch.Tensor | None = None, causal: bool = False
    ) -> torch.Tensor:
        return self.attend(*self.projections(x, size), mask, causal)

    def step(self, x: torch.Tensor, size: Size, state: DecodingState, layer: int) -> torch.Tensor:
        """For the newest words alone, of size [B, K]; `layer` is the number of the decoder layer in the state."""
        queries, keys, values = self.projections(x, size)
        return self.attend(queries, *state.append(layer, keys, values), state.mask)


class CrossAttention(Attention):
    """Of target words to the source."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, dropout)
        self.query_projection = Projections(width, heads, 1)
        self.memory_projections = Projections(width, heads, 2)

    def keys_values(self, memory: torch.Tensor, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the source words, [B, heads, S, width / heads] each: they serve every word of the translation."""
        return self.memory_projections(memory, size)

    @override(check_signature=False)
    def forward(
        self, x: torch.Tensor, size: Size, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return self.attend(*self.query_projection(x, size), keys, values, mask)
