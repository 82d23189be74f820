"""Dropout with cheap random numbers on the CPU, where torch's Bernoulli draws take a sixth of a training step.

These take a sixth of that. One 64-bit random number decides about four elements, so the probability p is rounded to a
multiple of 2**-16, also in the scale 1 / (1 - p).
"""

import torch
from overrides import override
from torch import Tensor, nn

LEVELS = 2**16


class Dropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"a dropout probability is at least 0 and below 1, not {p}")
        self.p = p
        self.dropped_levels = min(round(p * LEVELS), LEVELS - 1)

    @override(check_signature=False)
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped_levels:
            return x
        if x.device.type != "cpu":
            return nn.functional.dropout(x, self.p)
        return x * self.mask(x)

    def mask(self, x: Tensor) -> Tensor:
        """0 or 1 / (1 - p), in the shape and dtype of `x`."""
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = levels.ge_(self.dropped_levels - LEVELS // 2)
        return kept.to(x.dtype).mul_(LEVELS / (LEVELS - self.dropped_levels))

    @override
    def extra_repr(self) -> str:
        return f"p={self.p}"
