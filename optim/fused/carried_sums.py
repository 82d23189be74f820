"""Sums that a fused step leaves for the next one.

Apollo's step begins with several sums. Only the sum of g * d needs the new gradient. The other sums are over numbers
that the last step wrote, so that step computes them while the numbers are in cache or registers. They are not state.
They are computed anew if they are missing (after a resume or a step of another kind), or if a parameter or its state
was written to since then. Autograd's version counters show such a write. They do not see a write through `.data` or a
numpy view; the setting carry_sums=False is for code that writes in these ways.

Rebound "belief" carries nothing, because its first pass must read everything anyway. Decay "stable" carries nothing
either.
"""

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..settings import Settings


class CarriedSums:
    """Sums that steps have left, by an owner tensor, and forgotten with it. A note tells whether they are valid."""

    def __init__(self) -> None:
        self._left: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def leave(self, owner: Tensor, note: tuple, sums: Any) -> None:
        self._left[owner] = note, sums

    def take(self, owner: Tensor, note: tuple) -> Any | None:
        """Removes and returns the sums left with this owner; None if there are none, or if their note differs."""
        left_note, sums = self._left.pop(owner, (None, None))
        return sums if left_note == note else None


def are_carried(settings: Settings) -> bool:
    return settings.carry_sums and not settings.belief and not settings.stable


def note_of(settings: Settings, tensors: list[Tensor]) -> tuple:
    """Is equal as long as the sums are valid: the settings in them, and the addresses and versions of the tensors."""
    return settings.l2 != 0, settings.sigma, [(x.data_ptr(), x._version) for x in tensors]
