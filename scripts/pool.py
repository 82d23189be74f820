"""Runs jobs, several at a time, and survives the failure of any.

Run folders say which jobs are complete, so a killed pool continues when started again.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import cycle, islice
from pathlib import Path
from subprocess import CalledProcessError, Popen
from types import FrameType
from typing import IO

from engine.errors import UserError
from engine.files import is_held
from engine.machine import core_count
from scripts.jobs import Job, torchrun

# A new enough torchrun passes these signals on and lets the ranks save.
TORCHRUN_ENVIRONMENT = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",  # seconds, instead of 30
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
POLL_S = 0.2
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class State(Enum):
    WAITING = "waiting"
    HELD = "held"  # another process holds the run folder
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass
class Turn:
    job: Job
    state: State = State.WAITING
    process: Popen | None = None  # None also if the job was complete from the start
    devices: str | None = None
    log_start: int | None = None  # byte of the log where this process begins
    status: int = 0
    error: str = ""


@dataclass(frozen=True)
class Places:
    # CUDA_VISIBLE_DEVICES of jobs that run at once; None for all GPUs
    devices: Sequence[str | None] = (None,)
    gpus: int = 1  # processes of a job
    environment: dict[str, str] = field(default_factory=dict)


def run_jobs(
    jobs: Sequence[Job],
    places: Places = Places(),
    *,
    keep_going: bool = True,
    show_output: bool = False,
    watch: Callable[[Sequence[Turn]], None] = lambda turns: None,
) -> tuple[int, list[Turn]]:
    """Run the incomplete ones of `jobs`. Returns an exit status and the turns with their states.

    A job waits while another process holds its folder. After a failure the others continue, or without `keep_going`
    stop. The status is 0, that of the first failed job, or 128 + a signal that stopped the jobs. `show_output` shows
    the output instead of logging it. `watch` is called several times a second.
    """
    turns = [Turn(job) for job in jobs]
    free, ending = list(places.devices), False
    with _signals_handed_on(turns) as received:
        while True:
            for turn in turns:
                if turn.state is State.RUNNING and turn.process.poll() is not None:
                    _end(turn, ending or bool(received))
                    free.append(turn.devices)
            failed = any(turn.state is State.FAILED for turn in turns)
            if failed and not keep_going:
                for turn in turns:
                    if turn.state is State.RUNNING:
                        turn.process.terminate()
            ending = bool(received) or (failed and not keep_going)
            for turn in turns if not ending else ():
                if turn.state in (State.WAITING, State.HELD) and free and _begin(turn, free[0], places, show_output):
                    free.pop(0)
                    if received:  # while the job was being started
                        turn.process.terminate()
            watch(turns)
            states = {turn.state for turn in turns}
            if State.RUNNING not in states and (ending or not states & {State.WAITING, State.HELD}):
                break
            time.sleep(POLL_S)
    if received and any(turn.state is not State.COMPLETE for turn in turns):
        return 128 + received[0], turns
    return next((turn.status for turn in turns if turn.state is State.FAILED), 0), turns


def places_for(at_once: int | None, gpus: int, on_cpu: bool = False) -> Places:
    """The places for `at_once` jobs of `gpus` processes each; by default, as many as there are GPUs for.

    More jobs share GPUs, or else cores. Raises UserError if one job needs more GPUs.
    """
    found = [] if on_cpu else visible_gpus()
    if found and len(found) < gpus:
        raise UserError(f"--gpus {gpus}: only {len(found)} are visible here")
    at_once = at_once or max(1, len(found) // gpus)
    if found:
        groups = [",".join(found[first : first + gpus]) for first in range(0, len(found) - gpus + 1, gpus)]
        return Places(list(islice(cycle(groups), at_once)), gpus)
    threads = max(1, core_count() // (at_once * gpus))
    alone = at_once * gpus == 1 or "OMP_NUM_THREADS" in os.environ
    return Places([None] * at_once, gpus, {} if alone else {"OMP_NUM_THREADS": str(threads)})


def visible_gpus() -> list[str]:
    """The GPUs by CUDA's names. Importing torch would take seconds."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name and name != "-1"]
    return nvidia_smi("--query-gpu=index")


def nvidia_smi(*options: str) -> list[str]:
    """A line for each GPU; empty if nvidia-smi cannot answer."""
    command = ["nvidia-smi", *options, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, CalledProcessError):
        return []


def start(command: Sequence[str], log: IO[bytes] | None = None, environment: dict[str, str] | None = None) -> Popen:
    """Start `command` in its own session; otherwise a terminal would send it Ctrl-C twice. Raises OSError."""
    environment = os.environ | TORCHRUN_ENVIRONMENT | (environment or {})
    return Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True, preexec_fn=_end_with_parent)


def open_log(job: Job) -> IO[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    return open(job.log, "ab")


def last_error(log: Path, begin: int) -> str:
    """The last `error:` line from byte `begin` on (torchrun prints more after it), or else the last line."""
    try:
        with open(log, "rb") as file:
            file.seek(begin)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]
    return (errors or lines or [""])[-1]


def _begin(turn: Turn, devices: str | None, places: Places, show_output: bool) -> bool:
    """Start the job if it is unfinished and free. Returns whether it started."""
    try:
        if turn.job.complete:
            turn.state = State.COMPLETE
            return False
        if is_held(Path(turn.job.folder)):
            turn.state = State.HELD
            return False
        environment = places.environment | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
        command = turn.job.command(torchrun(places.gpus))
        if show_output:
            turn.process = start(command, environment=environment)
        else:
            with open_log(turn.job) as log:
                turn.log_start = log.tell()
                turn.process = start(command, log, environment)
    except (UserError, OSError) as error:
        turn.state, turn.status, turn.error = State.FAILED, 2, str(error)
        return False
    turn.state, turn.devices = State.RUNNING, devices
    return True


def _end(turn: Turn, stopping: bool) -> None:
    status = turn.process.returncode
    turn.status = status if status >= 0 else 128 - status
    try:
        turn.state = State.COMPLETE if turn.job.complete else State.STOPPED if stopping else State.FAILED
    except UserError as error:
        turn.state, turn.error = State.FAILED, str(error)
    if turn.state is State.FAILED:
        turn.status = turn.status or 1  # 0, but no result
        said = "" if turn.log_start is None else last_error(turn.job.log, turn.log_start)
        ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        turn.error = turn.error or (said if status >= 0 else "") or ended


@contextmanager
def _signals_handed_on(turns: Sequence[Turn]) -> Iterator[list[int]]:
    """Signals go to the running jobs. Yields the received ones.

    Ctrl-C stays Ctrl-C (a second one ends a job at once); others become SIGTERM, which every torchrun passes on.
    """
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None = None) -> None:
        received.append(number)
        for turn in turns:
            if turn.state is State.RUNNING:
                turn.process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # by nohup
    numbers = [number for number in SIGNALS if not (ignored and number == signal.SIGHUP)]
    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """On Linux jobs of a killed pool get SIGTERM, save and stop. Elsewhere they continue."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
