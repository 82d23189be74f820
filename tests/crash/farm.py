"""A farm of 24 runs (4 methods x 3 schedules x 2 seeds on digits) killed with SIGKILL, and a cell that always fails.

    python -m tests.crash.farm [FOLDER] [--epochs N] [--kills N]

Run it in the root of the repository. It takes some minutes on two cores. The farm is killed at random moments, in turn
alone and with all processes that it started. Its tables must have the numbers of a farm that nobody killed. No line of
metrics may occur twice, and the farm must name the failing cell.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.jobs import Job, job_of, read_list, write_list
from scripts.tables import load_settings

ROOT = Path(__file__).parent.parent.parent
METHODS = ("sgd", "adam", "radam", "apollo")
SCHEDULES = ("{name: milestone, milestones: [1], decay_rate: 0.1}", "{name: cosine, last_lr: 0.0}", "{name: constant}")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.mkdtemp(prefix="crash_farm_")))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kills", type=int, default=2)
    options = parser.parse_args()
    os.chdir(ROOT)

    whole = write_list(jobs(options.folder / "whole", options.epochs), options.folder, "whole")
    failing = job_of(
        "classification", Path("configs/digits/sgd.yaml"), ("device=cpu", "optimizer.name=sgdd"),
        options.folder / "killed/failing", load_settings("classification", "configs/digits/sgd.yaml"),
    )  # fmt: skip
    killed = write_list([failing, *jobs(options.folder / "killed", options.epochs)], options.folder, "killed")

    started = time.monotonic()
    expected = run(whole)
    took = time.monotonic() - started
    print(f"uninterrupted: exit status {expected.returncode}, {took:.0f} s\n{expected.stdout}")
    for number in range(options.kills):
        kill_after(killed, random.uniform(0.1, 0.9) * took / options.kills, alone=number % 2 == 0)
    ended = run(killed)
    print(f"killed {options.kills} times: exit status {ended.returncode}\n{ended.stdout}")

    faults = []
    if expected.returncode != 0 or ended.returncode != 1:
        faults.append("the exit statuses are not 0 and 1")
    if expected.stdout.strip() not in ended.stdout:
        faults.append("the tables differ")
    if sum(line.startswith(f"failed: {failing.folder}: ") for line in ended.stdout.splitlines()) != 1:
        faults.append("the failing cell is not named")
    for job in read_list(killed)[1:]:
        lines = map(json.loads, (Path(job.folder) / "metrics.jsonl").read_text().splitlines())
        updates = [line["update"] for line in lines if line["kind"] == "train"]
        if updates != list(range(1, len(updates) + 1)):
            faults.append(f"{job.folder}: lines of metrics.jsonl are missing or there twice")
    print("\n".join(faults) or "as it must be")
    return 1 if faults else 0


def jobs(folder: Path, epochs: int) -> list[Job]:
    """The 24 runs, in run folders below `folder`."""
    made = []
    for method in METHODS:
        config = Path(f"configs/digits/{method}.yaml")
        for schedule in SCHEDULES:
            for seed in (1, 101):
                overrides = ("device=cpu", f"epochs={epochs}", "log_every=1", f"schedule={schedule}", f"seed={seed}")
                settings = load_settings("classification", config, overrides)
                made.append(
                    job_of("classification", config, overrides, folder / settings.folder.relative_to("runs"), settings)
                )
    return made


def run(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(path), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def kill_after(path: Path, seconds: float, alone: bool) -> None:
    """Start the farm, and kill it after `seconds`: itself `alone`, or with every training below it."""
    with subprocess.Popen(command(path), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as farm:
        time.sleep(seconds)
        below = Path(f"/proc/{farm.pid}/task/{farm.pid}/children").read_text().split()
        for pid in (farm.pid, *map(int, () if alone else below)):
            os.kill(pid, signal.SIGKILL)
    print(
        f"killed after {seconds:.1f} s, {'alone' if alone else 'with all below it'}, {len(below)} trainings ran",
        flush=True,
    )


def command(path: Path) -> list[str]:
    return [sys.executable, "-m", "scripts.reproduce", str(path), "--jobs", "2"]


if __name__ == "__main__":
    sys.exit(main())
