"""Signals ask the loop to stop after the current update. A second Ctrl-C stops at once.

They are SIGTERM, Ctrl-C, SIGHUP (a terminal closes), and SIGUSR1 and SIGUSR2 of schedulers.
"""

import signal
from enum import IntEnum
from types import FrameType

import torch.distributed as dist

from engine.distributed import World

AGREE_EVERY = 10  # updates, with several ranks: agreeing waits for the device


class StopRequest:
    """Create it once, in the main thread."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in _signals():
            signal.signal(number, self._remember)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number."""
        return 128 + (self.signal or signal.SIGTERM)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def _signals() -> list[signal.Signals]:
    """The signals that ask to stop. SIGHUP is left out if nohup ignores it, and SIGUSR1 with NCCL, which may use it."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    if not (dist.is_initialized() and dist.get_backend() == "nccl"):
        numbers.append(signal.SIGUSR1)
    return numbers


class Wish(IntEnum):
    """What the ranks agree on after an update. The largest wish of any rank counts."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


def agree(world: World, stop: StopRequest, save_due: bool, update: int) -> Wish:
    """Go on, save (rank 0's `save_due`), or save and stop (a signal reached one of the ranks)."""
    if world.world_size > 1 and update % AGREE_EVERY:
        return Wish.GO_ON
    wish = Wish.SAVE if save_due and world.is_main else Wish.GO_ON
    return Wish(world.max(Wish.STOP if stop.requested else wish))
