"""Learning-rate schedules in closed form, as functions of the update's index.

A linear warmup comes first. "milestone" and "cosine" count units: epochs if the published rate changes once per epoch,
and updates otherwise. The other rules count updates.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from .foreign import suggest
from .settings import is_number
from .torch_schedule import create_torch_schedule

# A setting with the default None must be given.
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "milestone": {"milestones": None, "decay_rate": 0.1},
    "cosine": {"last_lr": 0.0},
    "inverse_sqrt": {},
    "linear": {"last_lr": 0.0},
    "wsd": {"decay_share": 0.2, "last_lr": 0.0},
}
NEEDS_TOTAL = ("cosine", "linear", "wsd")
WARMUP = {"warmup_updates": 0, "init_lr": 0.0}


def create_schedule(
    optimizer: Optimizer, name: str, *, updates_per_unit: int = 1, total: int | None = None, **settings: Any
) -> LRScheduler:
    """Makes the schedule `name` for `optimizer`, to be stepped once per update.

    A group's schedule starts from its `initial_lr`, or else from its learning rate now.

    Args:
        optimizer: any torch optimizer.
        name: a key of SCHEDULES, or the dotted path of a class with torch's interface.
        updates_per_unit: updates in a unit: those of an epoch, or 1.
        total: length of the training in units, for "cosine", "linear" and "wsd".
        settings: warmup_updates (default 0), init_lr (0.0). "milestone": milestones, an increasing list of units, and
            decay_rate (0.1). "cosine", "linear", "wsd": last_lr (0.0). "wsd": decay_share (0.2), the share of updates
            in which the rate falls. init_lr and last_lr are the first group's; others have them in proportion to their
            learning rates. A class also takes its own settings, and counts updates from the warmup's end.

    Raises:
        ValueError: an unknown name or setting, a value out of range, or a warmup in both schedule and optimizer.
    """
    is_foreign = "." in name
    if not is_foreign and name not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {name!r}{suggest(name, SCHEDULES)}, or a dotted path, torch.optim.lr_scheduler.StepLR"
        )
    defaults = {**WARMUP, **SCHEDULES.get(name, {})}
    for key in settings:
        if key not in defaults and not is_foreign:
            raise ValueError(f"schedule {name!r} has no setting {key!r}{suggest(key, defaults)}")
    given = {**defaults, **settings}
    settings = {**given, "updates_per_unit": updates_per_unit, "total": total}
    _check(name, settings)
    if settings["warmup_updates"] > 0 and any(group.get("warmup", 0) > 0 for group in optimizer.param_groups):
        raise ValueError(
            "both optimizer and schedule warm up: pass warmup=0 to the optimizer or warmup_updates=0 to the schedule"
        )
    if is_foreign:
        length = None if total is None else total * updates_per_unit
        return create_torch_schedule(optimizer, name, length=length, **given)
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
    decay_share: float = 0.2,
) -> float | Tensor:
    """Learning rate of update `t`, counted from 0. The schedule `name` starts from `lr`.

    "linear" falls from the end of the warmup to last_lr at the end of the training. "wsd" (warmup, stable, decay; Hu et
    al. 2024, arXiv 2404.06395) stays at `lr`, then falls linearly, as in Hägele et al. 2024 (arXiv 2405.18392).
    """
    if t < warmup_updates:
        return init_lr + (lr - init_lr) * t / warmup_updates
    unit = t // updates_per_unit
    if name == "milestone":
        return lr * decay_rate ** bisect_right(milestones, unit)
    if name == "cosine":
        return last_lr + (lr - last_lr) * (1 + math.cos(math.pi * min(unit / total, 1))) / 2
    if name == "inverse_sqrt":
        return lr * math.sqrt(warmup_updates / t)
    if name in ("linear", "wsd"):
        length = total * updates_per_unit
        begin = decay_begin(name, length, warmup_updates, decay_share)
        left = (length - t) / (length - begin)  # share of the decay left; above 1 before it begins
        return last_lr + (lr - last_lr) * min(max(left, 0.0), 1.0)
    return lr


def decay_begin(name: str, length: int, warmup_updates: int, decay_share: float) -> int:
    """The update with which the decay of "linear" or "wsd" begins."""
    return warmup_updates if name == "linear" else length - max(1, round(decay_share * length))


class UpdateSchedule(LRScheduler):
    """`last_epoch` is the index of the update."""

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
        """init_lr and last_lr of a group that starts from `lr`."""
        first = self.base_lrs[0]
        if lr == first or first == 0:
            return {}
        return {key: self.settings[key] * lr / first for key in ("init_lr", "last_lr") if key in self.settings}


def _check(name: str, settings: dict[str, Any]) -> None:
    def is_count(x: Any) -> bool:
        return isinstance(x, int) and not isinstance(x, bool)

    def require(holds: bool, key: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"schedule {name!r}: {key} must be {rule}, got {settings[key]!r}")

    least_warmup = 1 if name == "inverse_sqrt" else 0  # inverse_sqrt decays from the end of its warmup
    warmup = settings["warmup_updates"]
    require(is_count(warmup) and warmup >= least_warmup, "warmup_updates", f"a whole number >= {least_warmup}")
    unit = settings["updates_per_unit"]
    require(is_count(unit) and unit > 0, "updates_per_unit", "a whole number > 0")
    for key in ("init_lr", "decay_rate", "last_lr"):
        if key in settings:
            rate = settings[key]
            require(is_number(rate) and 0 <= rate < math.inf, key, "a finite number >= 0")
    if name == "milestone":
        at = settings["milestones"]
        whole = isinstance(at, Sequence) and not isinstance(at, str) and all(is_count(x) and x > 0 for x in at)
        require(whole and list(at) == sorted(set(at)), "milestones", "an increasing list of whole numbers > 0")
    if name in NEEDS_TOTAL:
        require(is_count(settings["total"]) and settings["total"] > 0, "total", "the training's length in units, > 0")
    if name == "wsd":
        share = settings["decay_share"]
        require(is_number(share) and 0 < share <= 1, "decay_share", "a number > 0 and <= 1")
    if name in ("linear", "wsd"):
        length = settings["total"] * unit
        begin = decay_begin(name, length, warmup, settings.get("decay_share", 0.0))
        rule = f"below the training's {length} updates" if name == "linear" else f"<= {begin}, where the decay begins"
        require(warmup <= begin < length, "warmup_updates", rule)
