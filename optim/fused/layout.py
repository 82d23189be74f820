"""The order of tensors' elements in memory, for the fused steps, which pair up elements by address."""

from itertools import chain

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a range of memory, each once, in whatever order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def lay_out_like(params: list[Tensor], grads: list[Tensor], *states: list[Tensor]) -> list[Tensor]:
    """Brings states, in place, and gradients, returned, into the order of their dense parameters.

    They have it as a rule. State has not where it was loaded from elsewhere, or is older than a change of the model's
    memory format: it is laid out anew, once. A gradient is copied.
    """
    if all(map(Tensor.is_contiguous, chain(params, grads, *states))):
        return grads
    grads = list(grads)
    for i, param in enumerate(params):
        layout = _layout(param)
        for state in states:
            if _layout(state[i]) != layout:
                state[i].data = torch.empty_like(param, dtype=state[i].dtype).copy_(state[i])
        if _layout(grads[i]) != layout:
            grads[i] = torch.empty_like(param).copy_(grads[i])
    return grads


def _layout(x: Tensor) -> list[int]:
    """The strides that matter: of dimensions longer than one."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
