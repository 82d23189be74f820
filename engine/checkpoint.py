"""Checkpoints that survive a kill: written beside, synced and renamed. They are never unpickled.

`checkpoint.pt` is the newest, `checkpoint.1.pt` the one before; one is whole at every instant. Each is a zip archive of
torch.save. Its comment is a checksum of all bytes before it, as neither torch.load nor zip checks every bit. Instead of
a damaged file, the next older one is used.
"""

import os
import pickle
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from xxhash import xxh3_128

from engine.distributed import World
from engine.errors import UserError, explain

DEAREST = 0.01  # share of the running time that saves may take
COMMENT = b"xxh3-128 of all before this: "
NO_COMMENT = b"\0\0"  # the comment's length, at an archive's end
TRAILER_BYTES = len(NO_COMMENT) + len(COMMENT) + 2 * xxh3_128().digest_size
BLOCK_BYTES = 1 << 24


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Progress:
    """Where a run is."""

    epoch: int = 0  # epochs completed
    update: int = 0  # taken over all epochs
    update_in_epoch: int = 0
    lr: float = 0.0  # of the last update; may be a tensor until the host waits for the device
    since_evaluation: dict[str, float] = field(default_factory=dict)  # sums of logged metrics
    since_evaluation_s: float = 0.0  # seconds of training alone
    trained_on: float = 0.0  # examples or tokens up to the last evaluation
    train_s: float = 0.0  # seconds of training alone, up to then
    best: float | None = None  # of all evaluations
    last: dict[str, float] = field(default_factory=dict)  # metrics of the last one


@dataclass
class Checkpoints:
    """Saves and restores `parts` and a Progress. Rank 0 writes; every rank calls every method.

    `due` asks for a save every `minutes` (0: each time), or less often where saving takes more than 1 % of that. `keep`
    files are kept.
    """

    folder: Path
    parts: dict[str, Stateful]
    world: World
    keep: int
    minutes: float
    say: Callable[[str], None]
    saved_at: float = field(default_factory=time.monotonic)
    took_s: float = 0.0  # the last save

    def due(self) -> bool:
        seconds = max(self.minutes * 60, self.took_s / DEAREST) if self.minutes else 0.0
        return time.monotonic() - self.saved_at >= seconds

    def save(self, progress: Progress, extra: dict[str, Any] | None = None) -> None:
        """Write a checkpoint. A failure raises UserError and leaves older ones untouched."""
        started = time.monotonic()
        if self.world.is_main:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            write_checkpoint(self.folder, state | {"progress": vars(progress), "extra": extra or {}}, self.keep)
        self.world.barrier()
        self.saved_at = time.monotonic()
        self.took_s = self.saved_at - started

    def restore(self, progress: Progress) -> dict[str, Any] | None:
        """Load the newest whole checkpoint into `parts` and `progress`; returns its `extra`, or None without one.

        Damaged ones become *.damaged: saves must not push out a whole one before them. Raises UserError where the
        checkpoint does not fit.
        """
        state, damaged = _newest_whole(self.folder, self.say)
        if state is None:
            return None
        if missing := [name for name in (*self.parts, "progress", "extra") if name not in state]:
            raise UserError(
                f"{self.folder}: the checkpoint lacks {', '.join(missing)}: another program's; use another run_dir"
            )
        if not isinstance(state["progress"], dict) or state["progress"].keys() != vars(progress).keys():
            raise UserError(
                f"{self.folder}: the checkpoint is of another version of this program, and cannot be continued: choose "
                "another run_dir, or delete the folder"
            )
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module):
                require_same_shapes(part, state[name], self.folder)
            try:
                part.load_state_dict(state[name])
            except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{self.folder}: the checkpoint's {name} does not fit this run: {error}") from None
        for name, value in state["progress"].items():
            setattr(progress, name, value)
        self.world.barrier()  # all ranks have read
        for path in damaged if self.world.is_main else ():
            path.replace(path.with_suffix(".damaged"))
        return state["extra"]


def write_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> None:
    """Write `state` as the newest of `keep` checkpoints. Raises UserError, e.g. on a full disk."""
    newest, temporary = _path(folder, 0), folder / "checkpoint.tmp"
    try:
        with open(temporary, "wb") as file:
            hashed = _Hashed(file)
            torch.save(state, hashed)
            hashed.end()
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            if _path(folder, age - 1).exists():
                os.replace(_path(folder, age - 1), _path(folder, age))
        os.replace(temporary, newest)
        _sync_folder(folder)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = _root_cause(error)
        left = "the last one saved is untouched" if _existing(folder) else "none was saved before"
        raise UserError(
            f"{folder}: cannot save a checkpoint: {reason}; {left}; mend that, then run the same command to go on"
        ) from error


def read_checkpoint(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest whole checkpoint on the CPU, or None; `say` gets damaged ones' names.

    Raises UserError where all are damaged, or one cannot be read.
    """
    return _newest_whole(folder, say)[0]


def _newest_whole(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, Any] | None, list[Path]]:
    """The newest whole checkpoint, and the damaged files that are newer."""
    found = _existing(folder)
    for position, path in enumerate(found):
        state, damage = _read(path)
        if state is not None:
            return state, found[:position]
        older = found[position + 1 :]
        if not older:
            raise UserError(f"{path} is damaged ({damage}) and no older one is left; delete {folder} to start over")
        say(f"{path} is damaged ({damage}): using {older[0].name}, saved before it")
    return None, []


def unreadable(value: Any, place: str = "state") -> str | None:
    """The place and type of something in `value` that a checkpoint would not give back, or None.

    All but tensors, plain values and containers is written and read for a trial.
    """
    if isinstance(value, torch.Tensor) or type(value) in (bool, int, float, str, type(None)):
        return None
    if type(value) in (dict, list, tuple):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        found = (unreadable(child, f"{place}.{key}") for key, child in children)
        return next((problem for problem in found if problem), None)
    try:
        file = BytesIO()
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # of any class
        return f"{place} is a {type(value).__name__}"
    return None


def require_same_shapes(model: torch.nn.Module, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Raise UserError where `state` belongs to another model."""
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{source}: the checkpoint's model is no mapping of names to tensors: another program's")
    if different := different_shapes(model.state_dict(), state):
        name, here, there = different
        raise UserError(
            f"{source}: the checkpoint belongs to another model ({name}: {there} there, {here} here); "
            "use another run_dir, or the model's own config"
        )


def different_shapes(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]
) -> tuple[str, tuple[int, ...] | str, tuple[int, ...] | str] | None:
    """The first name with different shapes, and both shapes or "absent"; or None."""
    for name in {**one, **other}:
        shapes = [tuple(state[name].shape) if name in state else "absent" for state in (one, other)]
        if shapes[0] != shapes[1]:
            return name, *shapes
    return None


def _path(folder: Path, age: int) -> Path:
    return folder / ("checkpoint.pt" if age == 0 else f"checkpoint.{age}.pt")


def _existing(folder: Path) -> list[Path]:
    """Checkpoint files, newest first. A kill between two renames leaves no `checkpoint.pt`."""
    ages = [re.fullmatch(r"checkpoint\.([1-9][0-9]{0,8})\.pt", path.name) for path in folder.glob("checkpoint.*.pt")]
    numbered = [_path(folder, age) for age in sorted(int(match[1]) for match in ages if match)]
    return [path for path in (_path(folder, 0), *numbered) if path.exists()]


class _Hashed:
    """The file for torch.save."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, xxh3_128()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def end(self) -> None:
        """Replace the archive's last two bytes, the comment's length, by length and comment."""
        self.file.seek(-len(NO_COMMENT), os.SEEK_END)
        self.file.write(_trailer(self.hash))


def _trailer(hashed: xxh3_128) -> bytes:
    comment = COMMENT + hashed.hexdigest().encode()
    return len(comment).to_bytes(len(NO_COMMENT), "little") + comment


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    """What the file holds, or None and what is wrong with it."""
    hashed = xxh3_128()
    try:
        with open(path, "rb") as file:
            left = file.seek(0, os.SEEK_END) - TRAILER_BYTES
            file.seek(0)
            while left > 0 and (block := file.read(min(left, BLOCK_BYTES))):
                hashed.update(block)
                left -= len(block)
            hashed.update(NO_COMMENT)
            if left or file.read() != _trailer(hashed):
                return None, "it is not whole: its checksum differs"
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {explain(error)}") from None
    except pickle.UnpicklingError:
        return None, "it holds more than tensors and plain values, and is not run"
    return (state, "") if isinstance(state, dict) else (None, "it holds no mapping: another program's")


def _root_cause(error: BaseException) -> str:
    """The system's own words, which torch wraps in an error about its archive."""
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
