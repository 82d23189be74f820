"""Shows jobs while they run: a redrawn table on a terminal, otherwise single lines."""

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.jobs import Job
from scripts.pool import State, Turn
from scripts.text_table import duration, format_table

METRICS = {"classification": "test_top1", "language_model": "test_ppl", "nmt": "valid_bleu"}
TAIL_BYTES = 65_536  # read from the end of metrics.jsonl
REDRAW_S = 0.5
LINES_S = 600  # between two reports on running jobs, without a terminal
SHOWN_FIRST = (State.RUNNING, State.HELD, State.FAILED, State.STOPPED, State.WAITING, State.COMPLETE)


@dataclass(frozen=True)
class Progress:
    """The last values in metrics.jsonl."""

    update: int = 0
    epoch: int = 0  # epochs begun
    evaluated_at: tuple[int, int] | None = None  # epoch and update
    loss: float | None = None
    metric: float | None = None

    def length(self, job: Job) -> int:
        """What is done, in the unit of the job's length."""
        if job.unit == "update":
            return self.update
        return self.evaluated_at[0] if self.evaluated_at else 0

    def updates(self, job: Job) -> int | None:
        """Updates of the whole run; a length in epochs gives them after the first evaluation."""
        if job.unit == "update":
            return job.length
        if self.evaluated_at is None:
            return None
        epochs, updates = self.evaluated_at
        return round(job.length * updates / epochs)


def read_progress(job: Job) -> Progress:
    try:
        with open(Path(job.folder) / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return Progress()
    values: dict[str, Any] = {}
    for line in lines:
        try:
            found = json.loads(line)
            values["update"], values["epoch"] = int(found["update"]), int(found["epoch"])
            values["loss"] = found.get("loss", found.get("train_loss", values.get("loss")))
            if METRICS[job.task] in found:
                values["metric"] = found[METRICS[job.task]]
                values["evaluated_at"] = values["epoch"], values["update"]
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return Progress(**values)


@dataclass
class Display:
    started: float = field(default_factory=time.monotonic)
    first_seen: dict[str, tuple[float, int]] = field(default_factory=dict)  # folder to the time and the update then
    drawn: int = 0  # lines on the terminal
    shown_at: float = float("-inf")
    states: dict[str, State] = field(default_factory=dict)  # as last printed, without a terminal

    def __call__(self, turns: Sequence[Turn]) -> None:
        if sys.stderr.isatty():
            ended = all(turn.state not in (State.RUNNING, State.WAITING, State.HELD) for turn in turns)
            if ended or time.monotonic() - self.shown_at >= REDRAW_S:
                self.shown_at = time.monotonic()
                self._draw(turns)
        else:
            self._tell(turns)

    def _draw(self, turns: Sequence[Turn]) -> None:
        size = shutil.get_terminal_size()
        order = sorted(turns, key=lambda turn: SHOWN_FIRST.index(turn.state))
        lines = format_table(HEADER, [self.line(turn) for turn in order[: max(1, size.lines - 4)]])
        lines = [line[: size.columns - 1] for line in (*lines, counts(turns, self.started))]
        up = f"\x1b[{self.drawn}F" if self.drawn else ""
        sys.stderr.write(f"{up}\x1b[J" + "\n".join(lines) + "\n")
        sys.stderr.flush()
        self.drawn = len(lines)

    def _tell(self, turns: Sequence[Turn]) -> None:
        """Print changes of state, and every LINES_S the running jobs."""
        remind = time.monotonic() - self.shown_at >= LINES_S
        if remind:
            self.shown_at = time.monotonic()
        for number, turn in enumerate(turns, start=1):
            before = self.states.get(turn.job.folder, State.WAITING)
            if turn.state is before and not (remind and turn.state is State.RUNNING):
                continue
            self.states[turn.job.folder] = turn.state
            folder, *values, state = self.line(turn)
            detail = "  ".join(f"{name} {value}" for name, value in zip(HEADER[1:-1], values, strict=True) if value)
            print(f"[{number}/{len(turns)}] {folder}: {state}  {detail}".rstrip(), file=sys.stderr, flush=True)

    def line(self, turn: Turn) -> tuple[str, ...]:
        job, progress = turn.job, read_progress(turn.job)
        total = progress.updates(job)
        loss = "" if progress.loss is None else f"{progress.loss:.4f}"
        metric = "" if progress.metric is None else f"{progress.metric:.2f}"
        eta = ""
        if turn.state is State.RUNNING:
            now = time.monotonic()
            when, update = self.first_seen.setdefault(job.folder, (now, progress.update))
            if total and progress.update > update:
                eta = duration((total - progress.update) * (now - when) / (progress.update - update))
        state = f"{turn.state.value}: {turn.error}" if turn.error else turn.state.value
        return job.folder, f"{progress.length(job)}/{job.length} {job.unit}s", loss, metric, eta, state


HEADER = ("run", "done", "loss", "metric", "left", "state")


def counts(turns: Sequence[Turn], started: float) -> str:
    states = Counter(turn.state for turn in turns)
    parts = [f"{states[state]} {state.value}" for state in State if states[state]]
    return f"{len(turns)} runs: {', '.join(parts)}; {duration(time.monotonic() - started)} so far"
