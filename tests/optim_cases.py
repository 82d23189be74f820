"""The table of optimizers for all shared tests: every path of Apollo, and the optimizers that optim re-exports."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from optim import create_optimizer


class Case(NamedTuple):
    """An optimizer's name and settings for `create_optimizer`."""

    name: str
    settings: dict[str, Any]

    def make(self, params: Iterable[Tensor], **changed: Any) -> torch.optim.Optimizer:
        return create_optimizer(self.name, params, **{**self.settings, **changed})

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])


PATHS: dict[str, dict[str, Any]] = {
    "single": {"foreach": False},
    "single capturable": {"foreach": False, "capturable": True},
    "foreach": {"foreach": True},
    "foreach capturable": {"foreach": True, "capturable": True},
    "fused": {"fused": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.5},
    "L2": {"lr": 0.5, "weight_decay": 1e-3},
    "sigma 0.01": {"lr": 0.01, "sigma": 0.01, "warmup": 3, "init_lr": 1e-5},
    "decoupled": {"lr": 0.5, "weight_decay": 1e-3, "weight_decay_type": "decoupled"},
    "stable": {"lr": 0.5, "weight_decay": 1e-3, "weight_decay_type": "stable"},
    "belief": {"lr": 0.01, "weight_decay": 1e-3, "rebound": "belief"},
    "belief decoupled": {"lr": 0.01, "weight_decay": 1e-3, "weight_decay_type": "decoupled", "rebound": "belief"},
}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
APOLLO_CASES = [Case("apollo", {**variant, **path}) for variant in VARIANTS.values() for path in PATHS.values()]
CASES: list[Case] = [
    *APOLLO_CASES,
    Case("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
    Case("adam", {"lr": 0.05, "betas": (0.9, 0.98)}),
    Case("adamw", {"lr": 0.05, "weight_decay": 1e-2}),
    Case("adamw", {"lr": 0.05, "weight_decay": 1e-2, "fused": True}),
    Case("radam", {"lr": 0.05, "weight_decay": 1e-2, "decoupled_weight_decay": True}),
    Case("torch.optim.NAdam", {"lr": 0.05}),
]
