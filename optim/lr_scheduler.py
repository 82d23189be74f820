"""Learning-rate schedules in closed form, as functions of the update's index.

After a linear warmup one of four rules follows. A rule counts in "units": a unit is an epoch if the published learning
rate changes once per epoch, and an update if it changes with every update.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from .settings import suggest

# A setting with the default None must be given.
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "milestone": {"milestones": None, "decay_rate": 0.1},
    "cosine": {"last_lr": 0.0},
    "inverse_sqrt": {},
}
WARMUP = {"warmup_updates": 0, "init_lr": 0.0}


def create_schedule(
    optimizer: Optimizer,
    name: str,
    *,
    updates_per_unit: int = 1,
    total: int | None = None,
    **settings: Any,
) -> LRScheduler:
    """Makes the schedule `name` for `optimizer`, to be stepped once per update.

    The schedule of a group starts from the group's `initial_lr`, or else from its learning rate now.

    Args:
        optimizer: any torch optimizer.
        name: "constant", "milestone", "cosine" or "inverse_sqrt".
        updates_per_unit: number of updates in a unit: the updates of an epoch, or 1.
        total: length of the training in units; only "cosine" needs it.
        settings: warmup_updates (default 0) and init_lr (0.0, of the first group; others have it in proportion to their
            learning rates, and last_lr too). "milestone" also takes milestones, an increasing list
            of units, and decay_rate (0.1). "cosine" also takes last_lr (0.0).

    Raises:
        ValueError: an unknown name or setting, a value out of range, or a warmup in both schedule and optimizer.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}{suggest(name, SCHEDULES)}")
    defaults = {**WARMUP, **SCHEDULES[name]}
    for key in settings:
        if key not in defaults:
            raise ValueError(f"schedule {name!r} has no setting {key!r}{suggest(key, defaults)}")
    settings = {**defaults, **settings, "updates_per_unit": updates_per_unit, "total": total}
    _check(name, settings)
    if settings["warmup_updates"] > 0 and any(group.get("warmup", 0) > 0 for group in optimizer.param_groups):
        raise ValueError(
            "both optimizer and schedule warm up: pass warmup=0 to the optimizer or warmup_updates=0 to the schedule"
        )
    return UpdateSchedule(optimizer, name, settings)


def learning_rate(
    name: str,
    t: int,
    lr: float | Tensor,
    *,
    updates_per_unit: int,
    total: int | None,
    warmup_updates: int,
    init_lr: float,
    milestones: Sequence[int] = (),
    decay_rate: float = 0.1,
    last_lr: float = 0.0,
) -> float | Tensor:
    """Learning rate of update `t`, counted from 0. The schedule `name` starts from `lr`."""
    if t < warmup_updates:
        return init_lr + (lr - init_lr) * t / warmup_updates
    unit = t // updates_per_unit
    if name == "milestone":
        return lr * decay_rate ** bisect_right(milestones, unit)
    if name == "cosine":
        return last_lr + (lr - last_lr) * (1 + math.cos(math.pi * min(unit / total, 1))) / 2
    if name == "inverse_sqrt":
        return lr * math.sqrt(warmup_updates / t)
    return lr


class UpdateSchedule(LRScheduler):
    """A schedule with torch's interface. `last_epoch` is the index of the update."""

    @override
    def __init__(self, optimizer: Optimizer, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[float | Tensor]:
        return [
            learning_rate(self.name, self.last_epoch, lr, **self.settings | self._in_proportion(lr))
            for lr in self.base_lrs
        ]

    def _in_proportion(self, lr: float | Tensor) -> dict[str, float | Tensor]:
        """init_lr and last_lr of a group that starts from `lr`: the settings are those of the first group."""
        first = self.base_lrs[0]
        if lr == first or first == 0:
            return {}
        return {key: self.settings[key] * lr / first for key in ("init_lr", "last_lr") if key in self.settings}


def _check(name: str, settings: dict[str, Any]) -> None:
    def is_number(x: Any) -> bool:
        return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)

    def is_count(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool)

    def require(holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"schedule {name!r}: {key} must be {rule}, got {settings[key]!r}")

    least_warmup = 1 if name == "inverse_sqrt" else 0  # inverse_sqrt decays from the end of its warmup
    warmup = settings["warmup_updates"]
    require(is_count(warmup) and warmup >= least_warmup, "warmup_updates", f"a whole number >= {least_warmup}")
    require(
        is_count(settings["updates_per_unit"]) and settings["updates_per_unit"] > 0,
        "updates_per_unit",
        "a whole number > 0",
    )
    for key in ("init_lr", "decay_rate", "last_lr"):
        if key in settings:
            require(is_number(settings[key]) and settings[key] >= 0, key, "a finite number >= 0")
    if name == "milestone":
        at = settings["milestones"]
        whole = isinstance(at, Sequence) and not isinstance(at, str) and all(is_count(x) and x > 0 for x in at)
        require(whole and list(at) == sorted(set(at)), "milestones", "an increasing list of whole numbers > 0")
    if name == "cosine":
        require(is_count(settings["total"]) and settings["total"] > 0, "total", "the training's length in units, > 0")
