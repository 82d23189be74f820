"""What Apollo's settings may be, and how an error says what is valid."""

import difflib
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

from torch import Tensor

WEIGHT_DECAY_TYPES = ("L2", "decoupled", "stable")
REBOUNDS = ("constant", "belief")


def check_settings(settings: dict[str, Any]) -> None:
    """Raises ValueError, in one line, where one of the settings of an Apollo group makes no sense."""
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
        number = isinstance(value, Real) and not isinstance(value, bool) or (name == "lr" and isinstance(value, Tensor))
        if not (number and math.isfinite(value) and holds(value)):
            raise ValueError(f"{name} must be a finite number {rule}, got {value!r}")
    for name, choices in (("weight_decay_type", WEIGHT_DECAY_TYPES), ("rebound", REBOUNDS)):
        if settings[name] not in choices:
            raise ValueError(f"unknown {name} {settings[name]!r}{suggest(settings[name], choices)}")


def suggest(name: object, valid: Iterable[str]) -> str:
    """'; did you mean X? valid: X, Y' for an unknown `name`, without the question where nothing is near."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name).lower(), [v.lower() for v in valid], n=1)
    hint = f" did you mean {next(v for v in valid if v.lower() == near[0])!r}?" if near else ""
    return f";{hint} valid: {', '.join(valid)}"
