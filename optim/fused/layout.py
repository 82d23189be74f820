"""The order of elements in memory: the fused steps pair elements by address."""

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill a range of memory, each once, in any order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def lay_out_states(params: list[Tensor], *states: list[Tensor]) -> None:
    """Brings states, in place, into the order of their dense parameters.

    Loading, or another memory format of the model, may have changed it.
    """
    for i, param in enumerate(params):
        for state in states:
            if _layout(state[i]) != _layout(param):
                state[i].data = torch.empty_like(param, dtype=state[i].dtype).copy_(state[i])


def laid_out(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The gradients, copied if needed into the order of their parameters."""
    if list(map(Tensor.stride, params)) == list(map(Tensor.stride, grads)):  # nearly always
        return grads
    return [
        grad if _layout(grad) == _layout(param) else torch.empty_like(param).copy_(grad)
        for param, grad in zip(params, grads, strict=True)
    ]


def _layout(x: Tensor) -> list[int]:
    """The strides of dimensions longer than one."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
