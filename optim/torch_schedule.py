"""Schedules by their dotted paths: those of torch.optim.lr_scheduler, and any with the same interface.

They count updates. A warmup before them rises to the rate that they begin with; their first step comes after its end.
"""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from .foreign import construct, find


def create_torch_schedule(
    optimizer: Optimizer, name: str, *, warmup_updates: int, init_lr: float, length: int | None, **settings: Any
) -> LRScheduler:
    """Makes the schedule with the dotted path `name`, after a warmup from `init_lr`.

    `length` is the training's number of updates, if known.

    Raises:
        ValueError: a path that does not import, an unknown, missing or refused setting, a schedule that waits for a
            metric, or one that ends before the training.
    """
    cls = find(f"schedule {name!r}", name, LRScheduler)
    if isinstance(cls, type) and issubclass(cls, ReduceLROnPlateau):
        raise ValueError(
            f"schedule {name!r} waits for a metric, and a schedule is stepped once per update here, without one: "
            "use another, e.g. milestone"
        )
    schedule = construct(f"schedule {name!r}", cls, optimizer, settings)
    if not isinstance(schedule, LRScheduler):
        raise ValueError(f"schedule {name!r} does not make a torch.optim.lr_scheduler.LRScheduler")
    ends = getattr(schedule, "total_steps", None)  # of OneCycleLR, which refuses further steps
    if ends is not None and length is not None and ends < length - warmup_updates:
        raise ValueError(
            f"schedule {name!r} ends after total_steps={ends}, before the training, which has "
            f"{length - warmup_updates} updates after the warmup"
        )
    return AfterWarmup(optimizer, schedule, warmup_updates, init_lr) if warmup_updates else schedule


class AfterWarmup(LRScheduler):
    """`schedule` after a linear warmup from `init_lr` to each group's rate in the first update of `schedule`."""

    @override
    def __init__(self, optimizer: Optimizer, schedule: LRScheduler, warmup_updates: int, init_lr: float) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.warmup_updates, self.init_lr = warmup_updates, init_lr
        self.first = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0  # the index of the update
        self._warm_up()

    @override
    def step(self, epoch: None = None) -> None:
        self.last_epoch += 1
        if self.last_epoch <= self.warmup_updates:
            self._warm_up()
        else:
            self.schedule.step()

    def _warm_up(self) -> None:
        for group, first in zip(self.optimizer.param_groups, self.first, strict=True):
            # init_lr is the first group's.
            init_lr = self.init_lr * (first / self.first[0] if self.first[0] else 1.0)
            lr = init_lr + (first - init_lr) * (self.last_epoch / self.warmup_updates)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @override
    def get_last_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "first": self.first, "schedule": self.schedule.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch, self.first = state_dict["last_epoch"], state_dict["first"]
        self.schedule.load_state_dict(state_dict["schedule"])
