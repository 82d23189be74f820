"""The share of updates that clip their gradients; docs/apollo.md explains it.

The loops add COUNTS once per update to the Sums of a log line's interval, so nothing waits for the device.
"""

from collections.abc import Callable

from engine.config import Named

COUNTS = ("clipped", "updates")
ENOUGH = 500  # updates after the warmup before a warning
NEARLY_ALL = 0.9


class ClippingWatch:
    """Warns once if nearly all updates since the warmup were clipped."""

    def __init__(self, optimizer: Named, schedule: Named, say: Callable[[str], None]) -> None:
        warmups = (optimizer.settings.get("warmup", 0), schedule.settings.get("warmup_updates", 0))
        self.warmup = max(warmups)  # updates
        self.say = say
        self.clipped = self.updates = 0.0
        self.said = False

    def share(self, sums: dict[str, float], update: int, world_size: int = 1) -> float:
        """The share of clipped updates in the interval before `update`. `sums` holds COUNTS over all ranks."""
        clipped, updates = (sums[name] / world_size for name in COUNTS)
        if update - updates >= self.warmup:
            self.clipped += clipped
            self.updates += updates
        if self.updates >= ENOUGH and self.clipped > NEARLY_ALL * self.updates and not self.said:
            self.said = True
            self.say(
                f"warning: {self.clipped / self.updates:.0%} of the last {self.updates:.0f} updates clipped their "
                "gradients: the learning rate may be too high for updates of this size (docs/apollo.md)"
            )
        return clipped / updates
