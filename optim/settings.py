"""The settings of a group of Apollo's parameters, and their valid values."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from .foreign import suggest

WEIGHT_DECAY_TYPES = ("L2", "decoupled", "stable")
REBOUNDS = ("constant", "belief")


@dataclass(frozen=True)
class Settings:
    """The settings of one group; see `Apollo`."""

    lr: float | Tensor
    beta: float
    eps: float
    sigma: float
    warmup: int
    init_lr: float
    weight_decay: float
    weight_decay_type: str
    rebound: str
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    carry_sums: bool

    @classmethod
    def of(cls, group: dict[str, Any]) -> "Settings":
        return cls(**{name: group[name] for name in cls.__annotations__})

    @property
    def belief(self) -> bool:
        return self.rebound == "belief"

    @property
    def stable(self) -> bool:
        return self.weight_decay != 0 and self.weight_decay_type == "stable"

    @property
    def l2(self) -> float:
        """The weight decay added to the gradient."""
        return self.weight_decay if self.weight_decay_type == "L2" else 0.0

    @property
    def decay(self) -> float:
        """The weight decay added to the direction."""
        return 0.0 if self.weight_decay_type == "L2" else self.weight_decay


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError if a setting is not valid."""
    lr = settings["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr as a tensor must have 1 element, not shape {tuple(lr.shape)}")
    rules: dict[str, tuple[Callable[[float], bool], str]] = {
        "lr": (lambda x: x >= 0, ">= 0"),
        "beta": (lambda x: 0 <= x < 1, "in [0, 1)"),
        "eps": (lambda x: x > 0, "> 0"),
        "sigma": (lambda x: x > 0, "> 0"),
        "warmup": (lambda x: x >= 0 and x == int(x), ">= 0 and whole"),
        "init_lr": (lambda x: x >= 0, ">= 0"),
        "weight_decay": (lambda x: x >= 0, ">= 0"),
    }
    if settings["foreach"] and settings["fused"]:
        raise ValueError("foreach and fused cannot both be True")
    for name, (holds, rule) in rules.items():
        value = settings[name]
        number = is_number(value) or (name == "lr" and isinstance(value, Tensor))
        if not (number and math.isfinite(value) and holds(value)):
            raise ValueError(f"{name} must be a finite number {rule}, got {value!r}")
    for name, choices in (("weight_decay_type", WEIGHT_DECAY_TYPES), ("rebound", REBOUNDS)):
        if settings[name] not in choices:
            raise ValueError(f"unknown {name} {settings[name]!r}{suggest(settings[name], choices)}")


def is_number(value: object) -> bool:
    """True is no number here."""
    return isinstance(value, Real) and not isinstance(value, bool)
