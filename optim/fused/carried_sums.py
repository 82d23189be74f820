"""Sums that a fused step leaves for the next one.

Of the sums that Apollo's step begins with, only that of g * d has the new gradient in it. The others are of numbers
that the step before wrote, and are taken then, while the numbers are at hand. They are no state: where they are missing
(after a resume, or a step of another kind), or somebody has written to a parameter or its state since, they are taken
anew. Autograd's version counters tell. They do not see what is written through `.data` or a numpy view, which is what
the setting carry_sums=False is for.

Rebound "belief", whose first pass has to read everything in any case, and decay "stable" carry nothing.
"""

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..settings import Settings


class CarriedSums:
    """What steps have left, each with a note of what it is of, by a tensor that it goes with and is forgotten with."""

    def __init__(self) -> None:
        self._left: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def leave(self, owner: Tensor, note: tuple, sums: Any) -> None:
        self._left[owner] = note, sums

    def take(self, owner: Tensor, note: tuple) -> Any | None:
        """The sums left with this owner, which are then gone; None where there are none, or the note is another."""
        left_note, sums = self._left.pop(owner, (None, None))
        return sums if left_note == note else None


def are_carried(settings: Settings) -> bool:
    return settings.carry_sums and not settings.belief and not settings.stable


def note_of(settings: Settings, tensors: list[Tensor]) -> tuple:
    """What stays the same as long as sums hold: the settings in them, and where tensors are and in which version."""
    return settings.l2 != 0, settings.sigma, [(x.data_ptr(), x._version) for x in tensors]
