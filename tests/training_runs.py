"""Training runs for tests: started, killed, resumed and compared.

A run is forked from a server that has imported the three commands once, because importing torch takes long.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from engine.errors import run_main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["classification.train", "language_model.train", "nmt.train", "sklearn.datasets"])
PATIENCE_S = 300  # seconds after which a test gives up on a run that hangs

# What may differ between two equal runs.
TIMES = ("examples_per_s", "tokens_per_s", "wall_s", "optimizer_ms_per_step", "peak_memory_mb")


@dataclass(frozen=True)
class Ended:
    status: int  # of rank 0; -9 after SIGKILL
    stderr: str  # of all ranks


class Running:
    """A training command at work, one process for each rank."""

    def __init__(self, module: str, arguments: list[str], ranks: int) -> None:
        self._stderr = tempfile.NamedTemporaryFile("r", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._ranks = [
            SERVER.Process(target=_train, args=(module, arguments, self._stderr.name, place)) for place in places(ranks)
        ]
        for process in self._ranks:
            process.start()

    @property
    def is_alive(self) -> bool:
        return self._ranks[0].is_alive()

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """Send the signal to every rank, as torchrun does. With `group` the ranks' workers get it too."""
        for process in self._ranks:
            with suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(process.pid, number)

    def wait(self) -> Ended:
        for process in self._ranks:
            process.join(PATIENCE_S)
            if process.is_alive():
                self.send(signal.SIGKILL, group=True)
                raise TimeoutError(f"the run did not end; it said: {self._stderr.read()}")
        return Ended(self._ranks[0].exitcode, self._stderr.read())


@dataclass(frozen=True)
class Cell:
    """A config of the tests, and the command that trains it."""

    module: str  # classification.train, language_model.train or nmt.train
    config: Path

    def command_line(self, run_dir: Path, *overrides: str, ranks: int = 1) -> list[str]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        return [sys.executable, *torchrun, "-m", self.module, *self._arguments(run_dir, overrides)]

    def start(self, run_dir: Path, *overrides: str, ranks: int = 1) -> Running:
        return Running(self.module, self._arguments(run_dir, overrides), ranks)

    def run(self, run_dir: Path, *overrides: str, ranks: int = 1) -> Ended:
        return self.start(run_dir, *overrides, ranks=ranks).wait()

    def complete(self, run_dir: Path, *overrides: str, ranks: int = 1) -> Path:
        """Run to the end, which must succeed."""
        ended = self.run(run_dir, *overrides, ranks=ranks)
        assert ended.status == 0, ended.stderr
        return run_dir

    def interrupt(
        self,
        run_dir: Path,
        *overrides: str,
        at_update: int,
        number: signal.Signals,
        ranks: int = 1,
        group: bool = False,
    ) -> Ended:
        """Start or continue a run, and send the signal once its log holds `at_update` updates."""
        running = self.start(run_dir, *overrides, ranks=ranks)
        wait_until(lambda: logged_updates(run_dir) >= at_update or not running.is_alive)
        running.send(number, group)
        return running.wait()

    def refusal(self, run_dir: Path, *overrides: str) -> str:
        """The one error line with which the run is refused."""
        return one_line_error(self.run(run_dir, *overrides))

    def _arguments(self, run_dir: Path, overrides: tuple[str, ...]) -> list[str]:
        return [str(self.config), f"run_dir={run_dir}", "device=cpu", *overrides]


def places(ranks: int) -> list[dict[str, str]]:
    """The environment variables by which torchrun tells each rank its place."""
    if ranks == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    return [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _train(module: str, arguments: list[str], stderr: str, place: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # data loader workers start in the same way as for users
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    os.environ.update(place)
    torch.set_num_threads(1)
    sys.argv[1:] = arguments
    run_main(import_module(module).main)


@contextmanager
def process(command: list[str], **keywords: Any) -> Iterator[subprocess.Popen]:
    """Where the block fails, the command and all below it are killed: leaving would wait for their end."""
    with subprocess.Popen(command, start_new_session=True, **keywords) as running:
        try:
            yield running
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            raise


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def one_line_error(ended: Any) -> str:
    """The line with which a command refused its input. `ended` is an Ended or a subprocess.CompletedProcess."""
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    status = ended.status if isinstance(ended, Ended) else ended.returncode
    assert status == 2 and len(errors) == 1 and "Traceback" not in ended.stderr, ended.stderr
    return errors[0]


def metrics(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl (of one `kind`, if given), without measured times and memory."""
    path = run_dir / "metrics.jsonl"
    written = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # a run may be writing the last one just now
    return [_without_times(line) for line in lines if kind in (None, line["kind"])]


def logged_updates(run_dir: Path) -> int:
    return len(metrics(run_dir, "train"))


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in metrics(run_dir, "train")]


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def recipe(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "environment.json").read_text())["recipe"]


def saved(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def assert_same_end(one: Path, other: Path) -> None:
    """Assert that two finished runs are equal, bit for bit: weights (kept ones too), optimizer state, metrics."""
    first, second = _all_tensors(one), _all_tensors(other)
    assert first.keys() == second.keys() and any("/optimizer/" in name for name in first)
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert metrics(one) == metrics(other)
    assert _without_times(result(one)) == _without_times(result(other))
    translations = [
        sorted((path.name, path.read_text()) for path in run_dir.glob("test.*")) for run_dir in (one, other)
    ]
    assert translations[0] == translations[1]


def _all_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    files = [run_dir / "checkpoint.pt", *sorted(run_dir.glob("averaging/*/checkpoint.pt"))]
    return _tensors({str(file.relative_to(run_dir)): torch.load(file, weights_only=True) for file in files})


def _tensors(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, child in items for name, tensor in _tensors(child, f"{path}/{key}").items()}


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMES}
