"""The runs of a list as one array of SLURM jobs, through submitit.

A job that is preempted, or whose time is up, gets a signal: its training saves and ends, and it is queued again.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from engine.errors import UserError
from engine.files import is_held
from scripts.jobs import Job, torchrun
from scripts.pool import State, Turn, last_error, open_log, start

if TYPE_CHECKING:
    from submitit import DelayedSubmission
    from submitit import Job as Submitted

SAVE_S = 180  # the signal comes so long before the time is up
TIMEOUTS = 1000  # how often a job may be requeued
WATCH_S = 10


@dataclass(frozen=True)
class Request:
    at_once: int = 8
    gpus: int = 1  # on each machine
    nodes: int = 1
    on_cpu: bool = False
    options: tuple[tuple[str, str], ...] = ()  # of sbatch, e.g. ("partition", "gpu"); time in minutes


class Training:
    """One run, inside its job. submitit calls `checkpoint` when the job must end."""

    def __init__(self, job: Job, gpus: int, nodes: int) -> None:
        self.job, self.gpus, self.nodes = job, gpus, nodes
        self.pid: int | None = None

    def __call__(self) -> None:
        from submitit import JobEnvironment

        if self.job.complete:
            return
        place = JobEnvironment()
        launcher = torchrun(self.gpus) if self.nodes == 1 else self._over_nodes(place.hostnames[0], place.raw_job_id)
        with ExitStack() as stack:
            log = stack.enter_context(open_log(self.job)) if place.global_rank == 0 else None
            begin = log.tell() if log else 0
            process = start(self.job.command(launcher), log)
        self.pid = process.pid
        signal.signal(signal.SIGTERM, self._stop)  # of scancel, or a preemption without notice
        self._wait()
        self.pid = None
        process.poll()  # reaps it
        if place.global_rank == 0 and not self.job.complete:
            raise RuntimeError(last_error(self.job.log, begin))

    def checkpoint(self) -> "DelayedSubmission":
        """Let the training save and end. Returns the job's replacement."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        self._wait()
        return DelayedSubmission(Training(self.job, self.gpus, self.nodes))

    def _over_nodes(self, first: str, job_id: str) -> list[str]:
        """torchrun's words for machines that meet on `first`."""
        port = 20_000 + int(job_id) % 10_000  # differs between jobs
        meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint={first}:{port}", f"--rdzv_id={job_id}"]
        sizes = [f"--nnodes={self.nodes}", f"--nproc_per_node={self.gpus}", "--max_restarts=2"]
        return ["-m", "torch.distributed.run", *sizes, *meeting]

    def _stop(self, number: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)

    def _wait(self) -> None:
        """Wait for the training's end without reaping it: a signal handler may wait for it too."""
        if self.pid is not None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


def submit(jobs: Sequence[Job], name: str, folder: Path, request: Request, cluster: str = "slurm") -> "list[Submitted]":
    """Put the incomplete ones of `jobs` into the queue as one array called `name`.

    submitit keeps its files in `folder`, which every machine must see. `cluster` is "slurm", or "local" to try this
    without SLURM. Raises UserError if submitit or SLURM is missing, or SLURM refuses the jobs.
    """
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise UserError("--executor slurm needs the submitit package: pip install submitit") from None
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise UserError("--executor slurm: there is no sbatch here; run this on a machine that submits to SLURM")
    options = dict(request.options)
    minutes = options.pop("time", "1440")
    if not minutes.isdecimal() or not int(minutes):
        raise UserError(f"--slurm time={minutes}: the time of a job is a number of minutes")
    executor = AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=TIMEOUTS, local_max_num_timeout=TIMEOUTS)
    executor.update_parameters(
        name=name,
        timeout_min=int(minutes),
        nodes=request.nodes,
        tasks_per_node=1,
        **({} if request.on_cpu else {"gpus_per_node": request.gpus}),
        slurm_array_parallelism=request.at_once,
        slurm_signal_delay_s=SAVE_S,
        slurm_additional_parameters={"requeue": True, **options},
    )
    unfinished = [job for job in jobs if not job.complete]
    if not unfinished:
        return []
    try:
        with executor.batch():
            return [executor.submit(Training(job, request.gpus, request.nodes)) for job in unfinished]
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        raise UserError(f"SLURM did not take the jobs: {error}") from None


def queue_name(path: Path) -> str:
    """The jobs' name for the list at `path`. A list of the same name in another checkout has another one."""
    return f"{path.stem}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"


def in_queue(name: str) -> int:
    command = ["squeue", "--me", "--noheader", "--array", "--name", name, "--format", "%i"]
    try:
        return len(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"cannot ask SLURM which jobs are in its queue: {error}") from None


def run_in_queue(
    jobs: Sequence[Job], name: str, folder: Path, request: Request, watch: Callable[[Sequence[Turn]], None]
) -> tuple[int, list[Turn]]:
    """`run_jobs` through the queue. Submits the incomplete jobs unless it has jobs called `name`, and waits.

    The jobs stay in the queue if the waiting process ends.
    """
    turns = [Turn(job, log_start=0) for job in jobs]
    if not in_queue(name) and not all(job.complete for job in jobs):
        for turn in turns:  # errors of earlier attempts do not count
            turn.log_start = turn.job.log.stat().st_size if turn.job.log.exists() else 0
        submitted = submit(jobs, name, folder, request)
        print(f"{len(submitted)} jobs submitted as {name}; scancel --name {name} takes them back", file=sys.stderr)
    while True:
        left = in_queue(name)
        for turn in turns:
            held = is_held(Path(turn.job.folder))
            turn.state = State.COMPLETE if turn.job.complete else State.RUNNING if held else State.WAITING
            if not left and turn.state is not State.COMPLETE:
                turn.state, turn.status = State.FAILED, 1
                turn.error = last_error(turn.job.log, turn.log_start) or f"no log; what SLURM wrote is in {folder}"
        watch(turns)
        if not left:
            return max(turn.status for turn in turns), turns
        time.sleep(WATCH_S)
