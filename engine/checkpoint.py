"""Checkpoints that survive being killed: written beside, synced, renamed; the last few kept; never unpickled.

`checkpoint.pt` is the newest, `checkpoint.1.pt` the one before, and so on. At every instant at least one of them is
whole. A file that turns out to be damaged is named, and the next older one is used.
"""

import os
import pickle
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from engine.distributed import World
from engine.errors import UserError


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Progress:
    """Where a run is: plain values, saved with every checkpoint."""

    epoch: int = 0  # epochs completed
    update: int = 0  # optimizer updates taken, over all epochs
    update_in_epoch: int = 0
    lr: float = 0.0  # of the last update
    since_evaluation: dict[str, float] = field(default_factory=dict)  # sums of training metrics, as far as logged
    since_evaluation_s: float = 0.0  # seconds of training alone, without evaluating and saving
    trained_on: float = 0.0  # examples or tokens up to the last evaluation
    train_s: float = 0.0  # seconds of training alone up to the last evaluation
    best: float | None = None  # best evaluation so far
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation


class Checkpoints:
    """Saves and restores `parts` (anything with state_dict and load_state_dict) together with a Progress.

    Rank 0 writes; every rank calls every method. `minutes` is the time between saves that `due` asks for, `keep` the
    number of files kept. `say` takes one line of text for the user.
    """

    def __init__(
        self, folder: Path, parts: dict[str, Stateful], world: World, keep: int, minutes: float, say: Callable
    ) -> None:
        self.folder, self.parts, self.world, self.keep, self.minutes, self.say = (
            folder,
            parts,
            world,
            keep,
            minutes,
            say,
        )
        self.saved_at = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.minutes * 60

    def save(self, progress: Progress, extra: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; on any failure the older ones are untouched and a UserError says so."""
        if self.world.is_main:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            write_checkpoint(self.folder, state | {"progress": vars(progress), "extra": extra or {}}, self.keep)
        self.world.barrier()
        self.saved_at = time.monotonic()

    def restore(self, progress: Progress) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into `parts` and `progress`; returns its `extra`, or None without one."""
        state = read_checkpoint(self.folder, self.say)
        if state is None:
            return None
        if missing := [name for name in (*self.parts, "progress", "extra") if name not in state]:
            raise UserError(
                f"{self.folder}: the checkpoint lacks {', '.join(missing)}: another program's; use another run_dir"
            )
        if state["progress"].keys() != vars(progress).keys():
            raise UserError(
                f"{self.folder}: the checkpoint is of another version of this program, and cannot be continued: choose "
                "another run_dir, or delete the folder"
            )
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                require_same_shapes(part, state[name], self.folder)
            try:
                part.load_state_dict(state[name])
            except (ValueError, RuntimeError, KeyError) as error:
                raise UserError(f"{self.folder}: the checkpoint's {name} does not fit this run: {error}") from None
        for name, value in state["progress"].items():
            setattr(progress, name, value)
        return state["extra"]


def write_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Write `state` as the newest checkpoint in `folder`, keeping `keep`. Raises UserError, e.g. on a full disk."""
    newest, temporary = _path(folder, 0), folder / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            if _path(folder, age - 1).exists():
                os.replace(_path(folder, age - 1), _path(folder, age))
        os.replace(temporary, newest)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = _root_cause(error)
        left = "the last one saved is untouched" if _existing(folder) else "none was saved before"
        raise UserError(
            f"{folder}: cannot save a checkpoint: {reason}; {left}; mend that, then run the same command to go on"
        ) from error


def read_checkpoint(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint of `folder` on the CPU, or None where there is none.

    Damaged ones are named through `say`. Raises UserError where there are some and all are damaged.
    """
    found = _existing(folder)
    for position, path in enumerate(found):
        damage = _damage(path)
        if damage is None:
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                damage = "it holds more than tensors and plain values, and is not run"
        older = found[position + 1 :]
        if not older:
            raise UserError(f"{path} is damaged ({damage}) and no older one is left; delete {folder} to start over")
        say(f"{path} is damaged ({damage}): using {older[0].name}, saved before it")
    return None


def require_same_shapes(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raise UserError, naming the first difference, where `state` belongs to another model than `model`."""
    ours = model.state_dict()
    for name in [*ours, *(name for name in state if name not in ours)]:
        here = tuple(ours[name].shape) if name in ours else "absent"
        there = tuple(state[name].shape) if name in state else "absent"
        if here != there:
            raise UserError(
                f"{source}: the checkpoint belongs to another model ({name}: {there} there, {here} here); "
                "use another run_dir, or the model's own config"
            )


def _path(folder: Path, age: int) -> Path:
    return folder / ("checkpoint.pt" if age == 0 else f"checkpoint.{age}.pt")


def _existing(folder: Path) -> list[Path]:
    """Checkpoint files, newest first. `checkpoint.pt` may be missing: a save was killed between two renames."""
    numbered = sorted((p for p in folder.glob("checkpoint.*.pt")), key=lambda p: int(p.name.split(".")[1]))
    return [path for path in (_path(folder, 0), *numbered) if path.exists()]


def _damage(path: Path) -> str | None:
    """What is wrong with the file, or None: torch.load does not check the records' checksums, the zip library does."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"truncated or not a checkpoint: {error}"
    return f"checksum error in record {broken}" if broken else None


def _root_cause(error: BaseException) -> str:
    """The operating system's own words: torch wraps a failed write in an error about its archive format."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return str(error).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
