"""Single runs of a table, each in a process of its own: planned and checked before the first one starts, then run."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from engine.config import differences
from engine.errors import UserError
from engine.run_record import NEUTRAL_KEYS, holds_training, read_result
from scripts.tables import load_cell, train_module

REFUSED = {
    "seed": "--seeds",
    "run_dir": "--runs",
    "table": "a config of your own",
    "row": "a config of your own",
}


@dataclass(frozen=True)
class Job:
    """One run to make."""

    table: str
    config: Path  # the cell's file
    overrides: tuple[str, ...]  # the seed and the run folder, then the user's
    settings: dict[str, Any]  # all keys, resolved
    folder: Path
    complete: bool

    @property
    def length(self) -> tuple[int, str]:
        """How long the run is, and in which unit: epoch or update."""
        return next((self.settings[f"{unit}s"], unit) for unit in ("epoch", "update") if f"{unit}s" in self.settings)

    def command(self, gpus: int = 1) -> list[str]:
        """What one would type; with several GPUs, under torchrun."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus > 1 else []
        return [sys.executable, *torchrun, "-m", train_module(self.table), str(self.config), *self.overrides]


def plan(table: str, config: Path, seed: int, runs: Path, overrides: Sequence[str] = ()) -> Job:
    """The run of `config` with `seed`, in the folder that is its default with `runs` in the place of `runs/`.

    Raises UserError for a config or an override that is wrong, for one that would send the run elsewhere, and where the
    folder holds a run with other settings.
    """
    for key in (override.partition("=")[0] for override in overrides):
        if key in REFUSED:
            raise UserError(f"{key}= cannot be set for a row, whose runs each have their own: use {REFUSED[key]}")
    settings = load_cell(table, config, (f"seed={seed}", *overrides))
    folder = runs / settings.folder.relative_to("runs")
    if (folder / "config.yaml").exists() and holds_training(folder):
        there = load_cell(table, folder / "config.yaml")
        if changed := differences(there.model_dump(mode="json"), settings.model_dump(mode="json"), NEUTRAL_KEYS):
            raise UserError(
                f"{folder} holds a run with other settings ({', '.join(changed)}); choose another folder with --runs, "
                "or delete that one"
            )
    path = str(folder) if yaml.safe_load(str(folder)) == str(folder) else dumps(str(folder))  # an override is YAML
    placed = (f"seed={seed}", f"run_dir={path}", *overrides)
    result = read_result(folder)
    complete = bool(result and result.get("complete"))
    return Job(table, config, placed, settings.model_dump(mode="json"), folder, complete)


def run(*commands: Sequence[str], watch: Callable[[], None] = lambda: None, **settings: Any) -> int:
    """Run `commands` side by side to their end; 0, or the exit status of the first to fail, which stops the others.

    SIGINT, SIGTERM and SIGHUP are handed on, and the children waited for: they save before they end. Each has a session
    of its own, as a terminal would otherwise send Ctrl-C to it a second time. The status is 128 + the number where a
    signal ended it. `watch` is called twice a second; `settings` go to subprocess.Popen.
    """
    children: list[subprocess.Popen] = []
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None = None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    status = 0
    try:
        for command in commands:
            if not received:
                children.append(subprocess.Popen(command, start_new_session=True, **settings))
        while running := [child for child in children if child.poll() is None]:
            watch()
            with suppress(subprocess.TimeoutExpired):
                running[0].wait(timeout=0.5)
            if not status and (status := _first_failure(children)):
                for child in children:
                    child.terminate()  # nothing, to one that has ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and (status or len(children) < len(commands)):
        return 128 + received[0]  # what torchrun ends with then is its own
    return status


def _first_failure(children: Sequence[subprocess.Popen]) -> int:
    statuses = (child.poll() or 0 for child in children)
    return next((status if status > 0 else 128 - status for status in statuses if status), 0)
