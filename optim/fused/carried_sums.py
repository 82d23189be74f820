"""Sums that a fused step leaves for the next one.

Of the sums that Apollo's step begins with, only that of g * d has the new gradient in it. The others are of numbers
that the step before wrote, and are taken then, while the numbers are at hand. They are no state: where they are missing
(after a resume, or a step of another kind), or somebody has written to a parameter or its state since, they are taken
anew. Autograd's version counters tell. They do not see what is written through `.data` or a numpy view.

Rebound "belief", whose first pass has to read everything in any case, and decay "stable" carry nothing.
"""

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# By a direction tensor: what a step has worked on (settings and `marks`), and the sums it has left. On the CPU these
# are of each large parameter, an array; on CUDA of a whole list, by its first direction, a tensor of its chunks' sums.
left_by_steps: WeakIdKeyDictionary = WeakIdKeyDictionary()


def marks(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """What stays the same as long as nobody writes to the tensors: where they are, and their versions."""
    return [(x.data_ptr(), x._version) for x in tensors]
