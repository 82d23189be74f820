"""What decoding remembers between two words: keys and values.

To copy these to a hypothesis's children would be slow. So a sentence's K hypotheses share one cache, with a slot for
each of them and each step, and only the mask of ancestors is reordered.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

FIRST_STEPS = 32  # words in the first cache

Pair = tuple[Tensor, Tensor]


@dataclass
class DecodingState:
    """Caches of all decoder layers for K hypotheses of each of B sentences."""

    hypotheses: int  # K
    cross: list[Pair]  # of each layer: the source's keys and values, [B, heads, S, width / heads]
    source_mask: Tensor | None  # [B, 1, 1, S]
    own: list[Pair] = field(default_factory=list)  # of each layer: as `cross`, with K slots a step
    slots: Tensor | None = None  # [B, 1, K, slots]: a hypothesis's ancestors, and itself
    length: int = 0  # words so far

    @property
    def mask(self) -> Tensor | None:
        """Slots to attend to, [B, 1, K, slots so far]. None means all."""
        return None if self.hypotheses == 1 else self.slots[..., : self.length * self.hypotheses]

    def next_word(self) -> None:
        start, k = self.length * self.hypotheses, self.hypotheses
        if k > 1:
            if self.slots is None:
                batch, device = self.cross[0][0].shape[0], self.cross[0][0].device
                self.slots = torch.zeros(batch, 1, k, FIRST_STEPS * k, dtype=torch.bool, device=device)
            elif start == self.slots.shape[-1]:
                self.slots = _doubled(self.slots, 3)
            self.slots[..., start : start + k] = torch.eye(k, dtype=torch.bool, device=self.slots.device)
        self.length += 1

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """Store the newest word's keys and values, [B, heads, K, width / heads]; returns those of all words."""
        end, k = self.length * self.hypotheses, self.hypotheses
        if layer == len(self.own):
            shape = (*keys.shape[:2], FIRST_STEPS * k, keys.shape[3])
            self.own.append((keys.new_empty(shape), values.new_empty(shape)))
        elif end > self.own[layer][0].shape[2]:
            self.own[layer] = tuple(_doubled(cache, 2) for cache in self.own[layer])
        for cache, new in zip(self.own[layer], (keys, values), strict=True):
            cache[:, :, end - k : end] = new
        return tuple(cache[:, :, :end] for cache in self.own[layer])

    def reorder(self, parents: Tensor) -> None:
        """Hypothesis k of sentence b continues hypothesis parents[b, k], [B, K] int64."""
        if self.hypotheses > 1:
            past = self.slots[..., : self.length * self.hypotheses]
            past.copy_(past.gather(2, parents[:, None, :, None].expand_as(past)))

    def keep(self, sentences: Tensor) -> None:
        """Keep these sentences alone, int64 [B']."""
        self.cross = [(keys[sentences], values[sentences]) for keys, values in self.cross]
        self.own = [(keys[sentences], values[sentences]) for keys, values in self.own]
        self.source_mask = None if self.source_mask is None else self.source_mask[sentences]
        self.slots = None if self.slots is None else self.slots[sentences]


def _doubled(cache: Tensor, dim: int) -> Tensor:
    return torch.cat((cache, torch.zeros_like(cache)), dim)
