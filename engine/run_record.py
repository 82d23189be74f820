"""The run folder: what ran (config.yaml, environment.json), how it went (metrics.jsonl, log.txt), what came out.

A run with `result.json`, written last, is whole. Only rank 0 writes. torch is imported late, so that scripts which read
run folders start fast.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from tqdm import tqdm

from engine.config import ConfigError, differences, load_config, save_config, value_at
from engine.errors import UserError
from engine.files import hold, read_json, write_atomically
from engine.machine import core_count, cpu_flags, cpu_name

if TYPE_CHECKING:
    import torch

    from engine.distributed import World

# Keys that do not change what a run computes: a resumed run may change them.
NEUTRAL_KEYS = (
    "run_dir",
    "checkpoint",
    "log_every",
    "tensorboard",
    "device",
    "data.root",
    "data.workers",
    "eval_batch",
)


class RunRecord:
    """A run folder, opened for writing. Raises UserError where it is in use, or holds a run with other settings."""

    def __init__(self, config: BaseModel, run_dir: Path, world: World, tensorboard: bool = False) -> None:
        self.folder, self.world = run_dir, world
        self.started = time.monotonic()
        self.wall_s_before = 0.0
        self.result = read_result(run_dir)
        self._metrics = self._log = self._board = None
        self._tensorboard = tensorboard
        if world.is_main:
            self._made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
            with self.start():
                self._open(config)
        world.barrier()

    def _open(self, config: BaseModel) -> None:
        folder = self.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = hold(folder, "training")
            require_same_settings(config, folder)
            save_config(config, folder / "config.yaml")
            self._metrics = open(folder / "metrics.jsonl", "a+b")  # noqa: SIM115 - open as long as the run
            self._log = open(folder / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
            raise UserError(f"{folder}: cannot write a run there ({reason}); choose another run_dir") from None

    @contextmanager
    def start(self) -> Iterator[None]:
        """If the block fails, remove a folder made for this run."""
        try:
            yield
        except BaseException:
            self.remove_if_new()
            raise

    def remove_if_new(self) -> None:
        if self.world.is_main and self.folder in self._made:
            shutil.rmtree(self.folder, ignore_errors=True)
            for parent in self._made[1:]:
                with suppress(OSError):  # somebody else uses it too
                    parent.rmdir()

    @property
    def complete(self) -> bool:
        return bool(self.result and self.result.get("complete"))

    @property
    def wall_s(self) -> float:
        """Running time in seconds."""
        return self.wall_s_before + time.monotonic() - self.started

    def say(self, text: str) -> None:
        """Write a line to the terminal (above any progress bar) and log.txt."""
        if self.world.is_main:
            tqdm.write(text, file=sys.stderr)
            self._log.write(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S}  {text}\n")

    def say_complete(self) -> int:
        """Returns the exit status."""
        self.say(f"{self.folder} is complete: nothing to do")
        return 0

    def environment(self, **recipe: Any) -> None:
        """Write environment.json; `recipe` has world size, batch, passes, ..."""
        if self.world.is_main:
            path = self.folder / "environment.json"
            now = describe_environment(self.world) | {"recipe": recipe}
            before = read_json(path)
            if before is not None:  # a resumed run
                earlier = before.pop("resumed_from", [])
                same = [key for key in ("packages", "cpu_flags") if before.get(key) == now[key]]
                now["resumed_from"] = [*earlier, {key: value for key, value in before.items() if key not in same}]
            write_atomically(path, json.dumps(now, indent=1) + "\n")

    def metrics(self, kind: str, update: int, **values: Any) -> None:
        """Append a line to metrics.jsonl and TensorBoard."""
        if self.world.is_main:
            line = {"kind": kind, "update": update, **{name: _finite(value) for name, value in values.items()}}
            self._metrics.write((json.dumps(line, allow_nan=False) + "\n").encode())
            self._metrics.flush()
            self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "update":
                self._board.add_scalar(f"{line['kind']}/{name}", value, line["update"])

    def position(self) -> dict[str, Any]:
        """What a checkpoint must remember."""
        if not self.world.is_main:
            return {}
        os.fsync(self._metrics.fileno())
        if self._board:
            self._board.flush()  # by itself it writes only every two minutes
        return {"metrics_bytes": self._metrics.seek(0, os.SEEK_END), "wall_s": self.wall_s}

    def rewind(self, position: dict[str, Any] | None, update: int = 0) -> None:
        """Drop the lines after `position` (all for None), which the run will repeat.

        TensorBoard forgets the position's `update` and later ones, and gets that update's lines again.
        """
        position = position or {"metrics_bytes": 0, "wall_s": 0.0}
        self.wall_s_before = position["wall_s"]
        if not self.world.is_main:
            return
        if self._metrics.seek(0, os.SEEK_END) > position["metrics_bytes"]:
            self._metrics.truncate(position["metrics_bytes"])
        if self._tensorboard:
            self._board = _tensorboard(self.folder, update)
            self._metrics.seek(0)
            for line in map(json.loads, self._metrics):
                if line["update"] >= update:
                    self._show(line)

    def finish(self, **result: Any) -> None:
        if self.world.is_main:
            finite = {name: _finite(value) for name, value in result.items()}
            self.result = finite | {"wall_s": round(self.wall_s, 1), "complete": True}
            write_atomically(self.folder / "result.json", json.dumps(self.result, indent=1, allow_nan=False) + "\n")
            if self._board:
                self._board.close()


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """result.json, or None for an unfinished run. Raises UserError where it is damaged."""
    return read_json(run_dir / "result.json")


def _finite(value: Any) -> Any:
    """None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_environment(world: World) -> dict[str, Any]:
    import numpy
    import torch

    cuda = world.device.type == "cuda"
    packages = {found.name: found.version for found in sorted(distributions(), key=lambda one: one.name.lower())}
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": packages.get("torchvision"),
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "device": torch.cuda.get_device_name(world.device) if cuda else cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_threads_between_operations": torch.get_num_interop_threads(),
        "cpu_cores_usable": core_count(),  # hardware threads
        "cpu_flags": cpu_flags(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "platform": platform.platform(),
        "git": _git_revision(),
        "packages": packages,
    }


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated by torch on a GPU, resident on the CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def holds_training(run_dir: Path) -> bool:
    """Whether there is a checkpoint or a result."""
    return (run_dir / "result.json").exists() or any(run_dir.glob("checkpoint*.pt"))


def require_same_settings(config: BaseModel, run_dir: Path, elsewhere: str = "another run_dir") -> None:
    """Raise UserError, with `elsewhere` as advice, where `run_dir` holds a run with other settings."""
    path = run_dir / "config.yaml"
    if not path.exists() or not holds_training(run_dir):
        return
    try:
        before = load_config(type(config), path).model_dump(mode="json")
    except ConfigError as error:
        raise UserError(
            f"{error}; this run folder cannot be continued: choose {elsewhere}, or delete the folder"
        ) from None
    now = config.model_dump(mode="json")
    if changed := differences(before, now, ignore=NEUTRAL_KEYS):
        shown = ", ".join(f"{key} ({value_at(before, key)} there, {value_at(now, key)} now)" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{run_dir} holds a run with other settings: {shown}{more}; choose {elsewhere}, or delete the folder"
        )


def _tensorboard(run_dir: Path, update: int) -> Any:
    """A writer of events, which hides older ones from `update` on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard=true needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter(run_dir / "tensorboard", purge_step=update)


def _git_revision() -> str | None:
    """The commit, with `+changes` where the working tree differs."""
    root = Path(__file__).resolve().parent.parent
    try:
        revision, changes = (
            subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changes else "")
