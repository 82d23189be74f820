"""Rules that forms of Apollo's step share. Scalars are numbers, or 0-d tensors if the step is capturable."""

from typing import Any

import torch
from torch import Tensor


def averaging_weight(beta: float, step: float | Tensor) -> float | Tensor:
    """alpha_t = (1 - beta) / (1 - beta^t), the bias-corrected weight of the newest gradient; `step` t counts from 1."""
    return (1 - beta) / (1 - beta**step)


def warmed_up_lr(lr: float | Tensor, init_lr: float, warmup: int, steps_before: float | Tensor) -> float | Tensor:
    """lr after `steps_before` steps: linear from `init_lr` over `warmup` steps, then `lr`. An lr of 0 stays 0."""
    if warmup == 0:
        return lr
    ramp = init_lr + (lr - init_lr) * steps_before / warmup
    if isinstance(steps_before, Tensor):
        return torch.where((steps_before < warmup) & (lr != 0), ramp, lr)
    return ramp if steps_before < warmup and lr != 0 else lr


def norm_eps(eps: float, sigma: float, rebound: str) -> float:
    """The constant added to ||d||_4. With a constant bound sigma it scales with 1 / sigma, as d does."""
    return eps / sigma if rebound == "constant" else eps


def curvature_offset(eps: float, beta: float, step: float | Tensor, rebound: str) -> float | Tensor:
    """What rebound "belief" adds to the rectified curvature D: eps / alpha_t, as a product that is 0 before step 1."""
    return eps * (1 - beta**step) / (1 - beta) if rebound == "belief" else 0.0


def average_of(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """m = d * D, for state that does not store m."""
    bound = float(state["sigma"]) if group["rebound"] == "belief" else group["sigma"]
    offset = curvature_offset(group["eps"], group["beta"], float(state["step"]), group["rebound"])
    return state["direction"] * (state["hessian"].abs().clamp_(min=bound) + offset)
