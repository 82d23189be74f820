"""Single runs of a table, each in a process of its own: planned and checked before the first one starts, then run."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from engine.config import differences
from engine.errors import UserError
from engine.run_record import NEUTRAL_KEYS, read_result
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
    if (folder / "config.yaml").exists():
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


def run(command: Sequence[str], watch: Callable[[], None] | None = None, **settings: Any) -> int:
    """Run `command` to its end and return its exit status, 128 + the number for one ended by a signal.

    SIGINT, SIGTERM and SIGHUP are handed on, and the child is waited for: it saves before it ends. It has a session of
    its own, as a terminal would otherwise send Ctrl-C to it a second time. `watch` is called every half second.
    `settings` go to subprocess.Popen.
    """
    child: subprocess.Popen | None = None
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child is not None:
            child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        child = subprocess.Popen(command, start_new_session=True, **settings)
        if received:  # before there was a child to hand it on to
            child.terminate()
        while True:
            try:
                status = child.wait(timeout=0.5 if watch else None)
                break
            except subprocess.TimeoutExpired:
                watch()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and status:
        return 128 + received[0]  # what torchrun ends with then is its own
    return status if status >= 0 else 128 - status
