"""A small version of a task's main experiment: from nothing to a table and a picture in a few minutes.

    bash scripts/quickstart.sh [--task classification|lm|nmt] [--seeds "1 101"] [--runs FOLDER] [key=value ...]

Complete runs are skipped and unfinished ones resumed.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from engine.errors import run_main
from engine.machine import core_count
from scripts.arguments import Parser, seeds
from scripts.jobs import Job, plan
from scripts.live import read_progress
from scripts.plot import plot_curves
from scripts.pool import Places, State, Turn, run_jobs
from scripts.reporting.tables import report
from scripts.runs import read_runs
from scripts.tables import CONFIGS

EXPERIMENTS = {  # task to table and rows
    "classification": ("digits", ("sgd", "adam", "radam", "apollo")),
    "lm": ("pydoc_topics", ("sgd", "adam", "radam", "apollo")),
    "nmt": ("grammar", ("sgd", "adam", "radam", "apollo")),
}


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bash scripts/quickstart.sh", description="Compare optimizers on a small version of a task.")
    parser.add_argument("--task", choices=EXPERIMENTS, default="classification", help="default: %(default)s")
    parser.add_argument("--seeds", type=seeds, default="1 101", help='default: "%(default)s"')
    parser.add_argument("--runs", type=Path, default="runs", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, e.g. epochs=3")
    options = parser.parse_intermixed_args(arguments)

    started = time.monotonic()
    table, rows = EXPERIMENTS[options.task]
    configs = [CONFIGS / table / f"{row}.yaml" for row in rows]
    jobs = {
        config: [plan(table, config, seed, options.runs, options.overrides) for seed in options.seeds]
        for config in configs
    }
    every = [job for of_config in jobs.values() for job in of_config]
    with tqdm(total=sum(job.length for job in every), unit=every[0].unit, disable=None) as bar:
        for config, of_config in jobs.items():
            bar.set_description(f"{config.stem}, seeds {' '.join(map(str, options.seeds))}")
            if bar.disable:
                print(config.stem, file=sys.stderr, flush=True)
            if status := train(of_config, bar):
                return status
    runs, _ = read_runs(*sorted({Path(job.folder).parent for job in every}))
    curves = options.runs / table / "curves.png"
    plot_curves(runs, curves)
    print(f"\n{report(table, runs)}\n")
    print(f"curves: {curves}    runs: {options.runs / table}    time: {time.monotonic() - started:.0f} s")
    return 0


def train(jobs: Sequence[Job], bar: tqdm) -> int:
    start = bar.n

    def follow(turns: Sequence[Turn]) -> None:
        bar.update(start + sum(read_progress(job).length(job) for job in jobs) - bar.n)

    # More threads than cores would wait for one another.
    threads = min(4, max(1, core_count() // len(jobs)))  # more do not help small networks
    environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    places = Places([None] * len(jobs), environment=environment)
    status, turns = run_jobs(jobs, places, keep_going=False, watch=follow)
    for turn in turns:
        if turn.state is State.FAILED:
            bar.write(f"{turn.job.folder}: {turn.error}; {turn.job.log} has all that it said", file=sys.stderr)
    if status:
        bar.write(f"exit status {status}; the same command carries on", file=sys.stderr)
    return status


if __name__ == "__main__":
    run_main(main)
