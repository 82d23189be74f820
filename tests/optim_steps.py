"""Random parameters, and steps of several optimizers with the same gradients."""

import torch
from torch import nn


def random_parameters(shapes=((6, 5), (9,), (2, 3, 4, 4)), dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for shape in shapes]


def clones(params) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty_like(param).copy_(param.detach())) for param in params]


def step_together(*pairs, steps: int, seed: int = 0) -> None:
    """Take `steps` steps with each (optimizer, params)."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for first, *others in zip(*(params for _, params in pairs), strict=True):
            grad = torch.randn(first.shape, generator=draw)
            for param in (first, *others):
                param.grad = torch.empty_like(param).copy_(grad)
        for optimizer, _ in pairs:
            optimizer.step()
