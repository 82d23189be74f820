"""Signals ask the loop to stop after the current update; a further Ctrl-C stops at once.

They are SIGTERM, Ctrl-C, SIGHUP (a terminal closes), and schedulers' SIGUSR1 and SIGUSR2.
"""

import signal
from enum import IntEnum
from types import FrameType

import torch
import torch.distributed as dist

from engine.distributed import World

AGREE_EVERY = 5  # updates, with several ranks


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
        """128 + the signal."""
        return 128 + (self.signal or signal.SIGTERM)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def _signals() -> list[signal.Signals]:
    """Without SIGHUP if nohup ignores it, and SIGUSR1 with NCCL, which may use it."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    if not (dist.is_initialized() and dist.get_backend() == "nccl"):
        numbers.append(signal.SIGUSR1)
    return numbers


class Wish(IntEnum):
    """The largest wish of any rank counts."""

    GO_ON = 0
    SAVE = 1
    STOP = 2


class Agreement:
    """What the ranks do next: go on, save (rank 0 wants to), or save and stop (a signal has reached one).

    Several ranks ask one another, and read the answer AGREE_EVERY updates later, when nobody waits for it. It passes
    between the hosts, without their devices.
    """

    def __init__(self, world: World, stop: StopRequest) -> None:
        self.world, self.stop = world, stop
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def after(self, update: int, save_due: bool) -> Wish:
        """What all ranks do next. Every rank calls this after every update."""
        wish = Wish.SAVE if save_due and self.world.is_main else Wish.GO_ON
        wish = Wish.STOP if self.stop.requested else wish
        if self.world.world_size == 1:
            return wish
        if update % AGREE_EVERY:
            return Wish.GO_ON
        if self._asked:
            (work, answer), self._asked = self._asked, None
            work.wait()
            if int(answer) != Wish.GO_ON:
                return Wish(int(answer))
        box = torch.tensor(int(wish))
        self._asked = self.world.begin_max(box), box
        return Wish.GO_ON
