"""Estimates the cost of runs: times some updates of each distinct cell with the command itself.

Hours are of training alone, without evaluations.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from engine.errors import UserError
from engine.machine import memory_of_tree_mb
from scripts.jobs import Job, torchrun
from scripts.live import read_progress
from scripts.pool import Places, last_error, nvidia_smi, open_log, start
from scripts.synthetic import MAKERS, SIZES, make_data
from scripts.tables import load_settings
from scripts.text_table import format_table

UPDATES = 30
WARM_UP = 5  # updates that allocate, choose kernels, compile
START_S, TRAIN_S, SAVE_S = 300, 60, 120  # limits: until the first update, for the others, to save
POLL_S = 0.01
# They change neither time nor memory of an update.
SAME_COST = ("table", "row", "seed", "run_dir", "schedule", "epochs", "updates")


@dataclass(frozen=True)
class Measured:
    update_s: float
    updates: int  # timed
    updates_in_all: int
    memory_mb: float
    disk_mb: float
    synthetic: str  # why the data were synthetic; "" for real data


def estimate(jobs: Sequence[Job], places: Places) -> str:
    """A table of the cost of incomplete `jobs`: for each distinct cell a line, or its error."""
    unfinished = [job for job in jobs if not job.complete]
    if not unfinished:
        return "every run is complete: nothing would be run"
    cells: dict[str, list[Job]] = {}
    for job in unfinished:
        cells.setdefault(what_costs(job), []).append(job)
    lines, notes, hours, disk, failed = [], [], 0.0, 0.0, 0
    with tempfile.TemporaryDirectory(prefix="dry_run_") as temporary:
        for number, of_cell in enumerate(cells.values(), start=1):
            first = of_cell[0]
            settings = load_settings(first.task, first.config, first.overrides)
            cell = f"{settings.table}/{settings.row}"
            print(f"timing {number} of {len(cells)}: {cell}", file=sys.stderr, flush=True)
            try:
                measured = measure(first, settings, places, Path(temporary))
            except UserError as error:
                notes.append(f"{cell}: not timed: {error}")
                failed += len(of_cell)
                continue
            # Runs of a cell may have different lengths.
            of_run = measured.update_s * measured.updates_in_all / 3600
            of_all = of_run * sum(job.length / first.length for job in of_cell)
            on_disk = measured.disk_mb * len(of_cell)
            hours += of_all
            disk += on_disk
            lines.append(
                (
                    cell,
                    str(len(of_cell)),
                    f"{1000 * measured.update_s:.4g}",
                    f"{measured.updates_in_all:,}",
                    f"{of_run:.3g}",
                    f"{of_all:.3g}",
                    f"{measured.memory_mb / 1024:.2f}",
                    f"{on_disk / 1024:.2f}",
                )
            )
            if measured.synthetic:
                notes.append(f"{cell}: timed on synthetic data, as {measured.synthetic}")
            if measured.updates < UPDATES - WARM_UP - 1:
                notes.append(f"{cell}: {measured.updates} updates timed, for want of time: a rough figure")
    at_once = min(len(places.devices), len(unfinished))
    total = (
        f"{hours:.3g} hours of training, {hours / at_once:.3g} with {at_once} at a time; {disk / 1024:.2f} GB on disk"
    )
    left_out = f"; without {failed} runs that could not be timed" if failed else ""
    return "\n".join([*format_table(HEADER, lines), "", f"in all: {total}{left_out}. Evaluations come on top.", *notes])


HEADER = ("cell", "runs", "ms/update", "updates", "hours a run", "hours", "memory GB", "disk GB")


def what_costs(job: Job) -> str:
    settings = load_settings(job.task, job.config, job.overrides).model_dump(mode="json")
    return json.dumps({"task": job.task} | {key: value for key, value in settings.items() if key not in SAME_COST})


def measure(job: Job, settings: Any, places: Places, temporary: Path) -> Measured:
    """Time some updates, on synthetic data if the job's own are missing. Raises UserError."""
    folder = Path(tempfile.mkdtemp(dir=temporary))
    overrides, size, synthetic = [f"run_dir={folder}", "log_every=1", "checkpoint.minutes=1000000"], None, ""
    name, root = settings.data.name, Path(getattr(settings.data, "root", "."))
    if name in MAKERS and not root.exists():
        overrides += make_data(name, temporary / name)
        size, synthetic = SIZES.get(name), f"{root} is not there"
    trial = replace(job, folder=str(folder), overrides=(*job.overrides, *overrides))
    device = places.devices[0]
    environment = places.environment | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    before = 0.0 if device is None else gpu_memory_mb(device)
    with open_log(trial) as log:
        process = start(trial.command(torchrun(places.gpus)), log, environment)
    times: list[tuple[float, int]] = []  # when an update was first seen, and its number
    memory, started, looked = 0.0, time.monotonic(), 0.0
    while process.poll() is None:
        now, update = time.monotonic(), read_progress(trial).update
        if update > (times[-1][1] if times else 0):
            times.append((now, update))
        since, limit = (times[0][0], TRAIN_S) if times else (started, START_S)
        ending = update >= UPDATES or now - since > limit
        if ending or now - looked > 1:
            looked = now
            memory = max(memory, memory_of_tree_mb(process.pid) if device is None else gpu_memory_mb(device) - before)
        if ending:
            break
        time.sleep(POLL_S)
    try:
        process.send_signal(signal.SIGTERM)
        process.wait(SAVE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    pairs = [pair for pair in times if pair[1] > WARM_UP] if len(times) > 2 * WARM_UP else times
    if len(pairs) < 2:
        slow = f"fewer than 2 updates in {TRAIN_S} s: too slow here" if times else last_error(trial.log, 0)
        raise UserError(slow or "no update came")
    update_s = median((t1 - t0) / (u1 - u0) for (t0, u0), (t1, u1) in pairwise(pairs))
    measured = Measured(
        update_s,
        updates=pairs[-1][1] - pairs[0][1],
        updates_in_all=whole_length(job, folder, settings, size),
        memory_mb=memory,
        disk_mb=disk_mb(folder, settings),
        synthetic=synthetic,
    )
    shutil.rmtree(folder)
    return measured


def whole_length(job: Job, run: Path, settings: Any, size: int | None) -> int:
    """Updates, by environment.json or the real data's `size`."""
    if job.unit == "update":
        return job.length
    recipe = json.loads((run / "environment.json").read_text())["recipe"]
    rows = settings.batch * settings.passes
    examples = rows * getattr(settings, "sequence_length", 1)  # images or tokens of an update
    if size is None and "updates_per_epoch" in recipe:
        return job.length * recipe["updates_per_epoch"]
    return job.length * ((size or recipe["train_examples"]) // examples)


def gpu_memory_mb(devices: str) -> float:
    """MiB in use on the one of `devices` (comma-separated) that uses most; 0 if unknown."""
    used = nvidia_smi(f"--id={devices}", "--query-gpu=memory.used")
    return max((float(text) for text in used if text.isdecimal()), default=0.0)


def disk_mb(run: Path, settings: Any) -> float:
    sizes = {path: path.stat().st_size / 2**20 for path in run.rglob("*") if path.is_file()}
    checkpoint = sizes.pop(run / "checkpoint.pt", 0.0)
    weights = [size for path, size in sizes.items() if path.suffix == ".pt"]
    kept = settings.average.last if settings.average and not settings.average.decay else 0
    return checkpoint * settings.checkpoint.keep + max(weights, default=checkpoint / 3) * kept
