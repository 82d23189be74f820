"""Sums that a fused step leaves for the next one.

A step begins with sums, of which only that of g * d needs the new gradient. The last step computes the others while
their numbers are in cache or registers. They are computed anew if they are missing (after a resume or a step of another
kind), or if autograd's version counters show a write to a parameter or its state. Writes through `.data` or a numpy
view are not seen (carry_sums=False is for these).
"""

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..settings import Settings


class CarriedSums:
    """Sums by their owner tensor, which are forgotten with it."""

    def __init__(self) -> None:
        self._left: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def leave(self, owner: Tensor, note: tuple, sums: Any) -> None:
        self._left[owner] = note, sums

    def take(self, owner: Tensor, note: tuple) -> Any | None:
        """Removes and returns the sums of this owner; None if there are none, or their note differs."""
        left_note, sums = self._left.pop(owner, (None, None))
        return sums if left_note == note else None


def are_carried(settings: Settings) -> bool:
    return settings.carry_sums and not settings.belief and not settings.stable


def note_of(settings: Settings, tensors: list[Tensor]) -> tuple:
    """Is equal while the sums are valid."""
    return settings.l2 != 0, settings.sigma, [(x.data_ptr(), x._version) for x in tensors]
