"""The optimizers of this repository by name: Apollo, and those of torch.optim that it is compared with.

This package needs torch alone.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam
from torch.optim.optimizer import ParamsT

from . import lr_scheduler
from .apollo import Apollo
from .foreign import construct, find, suggest
from .lr_scheduler import create_schedule
from .settings import is_number

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adam",
    "AdamW",
    "Apollo",
    "RAdam",
    "create_optimizer",
    "create_schedule",
    "lr_scheduler",
    "optimizer_class",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {"apollo": Apollo, "sgd": SGD, "adam": Adam, "adamw": AdamW, "radam": RAdam}


def create_optimizer(name: str, params: ParamsT, **settings: Any) -> Optimizer:
    """Makes the optimizer `name`, a key of OPTIMIZERS or the dotted path of any class.

    Apollo's `warmup` is 0 here unless given: in training scripts the schedule warms up. `base_optimizer`, which SAM and
    its kin take, may be a name too.

    Raises:
        ValueError: an unknown name, a path that does not import, an unknown, missing or refused setting, or a class
            that is not made from parameters, or makes no torch optimizer.
    """
    cls = optimizer_class(name)
    accepted = inspect.signature(cls).parameters
    if (first := next(iter(accepted), None)) in ("model", "optimizer", "optimizers"):
        raise ValueError(
            f"optimizer {name!r} is made from the {first}, not from parameters: give the name of a function that takes "
            "parameters and makes it"
        )
    if name in OPTIMIZERS:
        for key, value in settings.items():
            if key in accepted and (rule := _broken_rule(accepted[key].default, value)):
                raise ValueError(f"optimizer {name!r}: {key} must be {rule}, got {value!r}")
    if cls is Apollo:
        settings = {"warmup": 0, **settings}
    if isinstance(base := settings.get("base_optimizer"), str):
        settings = {**settings, "base_optimizer": optimizer_class(base)}
    optimizer = construct(f"optimizer {name!r}", cls, params, settings)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer {name!r} makes a {type(optimizer).__name__}, which is no torch.optim.Optimizer")
    return optimizer


def optimizer_class(name: str) -> Callable[..., Optimizer]:
    """The class or function called `name`. Raises ValueError where there is none."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if "." not in name:
        raise ValueError(
            f"unknown optimizer {name!r}{suggest(name, OPTIMIZERS)}, or a dotted path, package.module.Class"
        )
    found = find(f"optimizer {name!r}", name, Optimizer)
    if isinstance(found, type) and not hasattr(found, "step"):
        raise ValueError(f"optimizer {name!r} is not a class or function that makes an optimizer")
    return found


def _broken_rule(default: Any, value: Any) -> str | None:
    """The rule that `value` breaks, by the type of the setting's default."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, (int, float)):
        return None if _is_number(value) else "a number"
    if isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(_is_number, value))
        return None if fits else f"a list of {len(default)} numbers"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) or is_number(value)
