"""Reads the trajectories of tests/golden and runs an optimizer along one of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
APOLLO = sorted(path.stem for path in FOLDER.glob("apollo_*.npz"))


class Golden(NamedTuple):
    grads: np.ndarray
    curvature: np.ndarray
    params: np.ndarray
    shapes: list[list[int]]
    settings: dict
    lr_drop: int

    @property
    def sizes(self) -> list[int]:
        return [int(np.prod(shape)) for shape in self.shapes]


def load(name: str) -> Golden:
    """The trajectory `name`. The file's name completes its settings (era, decoupled decay)."""
    with np.load(FOLDER / f"{name}.npz") as file:
        settings = json.loads(str(file["settings"]))
        if name.startswith("apollo"):
            settings["sigma"] = 1.0 if "2020" in name else 0.01
            if name.endswith("decoupled"):
                settings["weight_decay_type"] = "decoupled"
        arrays = (file["grads"], file["curvature"], file["params"])
        return Golden(*arrays, json.loads(str(file["shapes"])), settings, int(file["lr_times_0p1_before_step"]))


def follow(
    golden: Golden,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    dtype: torch.dtype = torch.float64,
    steps: int = 80,
) -> np.ndarray:
    """Parameters [steps + 1, 74] in float64 of the optimizer that `make` makes."""
    start = torch.tensor(golden.params[0], dtype=dtype).split(golden.sizes)
    params = [torch.nn.Parameter(x.reshape(shape)) for x, shape in zip(start, golden.shapes, strict=True)]
    grads, curvature = torch.tensor(golden.grads, dtype=dtype), torch.tensor(golden.curvature, dtype=dtype)
    optimizer = make(params)
    trajectory = [flat(params)]
    for t in range(steps):
        if t == golden.lr_drop:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        grad = grads[t] + curvature * flat(params)
        for param, part in zip(params, grad.split(golden.sizes), strict=True):
            param.grad = part.reshape(param.shape)
        optimizer.step()
        trajectory.append(flat(params))
    return torch.stack(trajectory).double().numpy()


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.detach().reshape(-1) for x in tensors])


def errors(golden: Golden, trajectory: np.ndarray) -> np.ndarray:
    """The largest error of each tensor at each step, [steps + 1, 4], relative to the tensor's largest entry."""
    edges = np.cumsum(golden.sizes)[:-1]
    reference = golden.params[: len(trajectory)]
    difference = np.split(np.abs(trajectory - reference), edges, axis=1)
    scale = np.split(np.abs(reference), edges, axis=1)
    return np.stack([d.max(axis=1) / s.max() for d, s in zip(difference, scale, strict=True)], axis=1)
