"""Sums that a fused step leaves for the next one.

Of the sums that Apollo's step begins with, only that of g * d has the new gradient in it. The others are of numbers
that the step before wrote, and are taken then, while the numbers are at hand. They are no state: where they are missing
(after a resume, or a step of another kind), or somebody has written to a parameter or its state since, they are taken
anew. Autograd's version counters tell. They do not see what is written through `.data`.
"""

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# The marks of what a step has worked on, and what it has left; by a parameter's direction, or that of a list's first.
left_by_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()


def marks(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """What stays the same as long as nobody writes to the tensors: where they are, and their versions."""
    return [(x.data_ptr(), x._version) for x in tensors]
