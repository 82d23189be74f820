"""A small version of a task's main experiment: from nothing to a table and a picture in a few minutes.

    bash scripts/quickstart.sh [--task classification|lm|nmt] [--seeds "1 101"] [--runs FOLDER] [key=value ...]

As many runs as seeds train side by side. Complete runs are skipped and unfinished ones resumed.
"""

import os
import sys
import time
from pathlib import Path

from engine.errors import run_main
from engine.machine import core_count
from scripts.arguments import Parser, seeds
from scripts.execution import print_failures
from scripts.jobs import plan
from scripts.live import Display
from scripts.plot import plot_curves
from scripts.pool import Places, run_jobs
from scripts.reporting.tables import report
from scripts.runs import read_runs
from scripts.tables import CONFIGS

EXPERIMENTS = {"classification": "digits", "lm": "pydoc_topics", "nmt": "grammar"}  # task to table
METHODS = ("sgd", "adam", "radam", "apollo")


def main(arguments: list[str]) -> int:
    parser = Parser(prog="bash scripts/quickstart.sh", description="Compare optimizers on a small version of a task.")
    parser.add_argument("--task", choices=EXPERIMENTS, default="classification", help="default: %(default)s")
    parser.add_argument("--seeds", type=seeds, default="1 101", help='default: "%(default)s"')
    parser.add_argument("--runs", type=Path, default="runs", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, e.g. epochs=3")
    options = parser.parse_intermixed_args(arguments)

    started = time.monotonic()
    table = EXPERIMENTS[options.task]
    jobs = [
        plan(table, CONFIGS / table / f"{row}.yaml", seed, options.runs, options.overrides)
        for row in METHODS
        for seed in options.seeds
    ]
    # More threads than cores would wait for one another, and more than four do not help small networks.
    threads = min(4, max(1, core_count() // len(options.seeds)))
    environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    places = Places([None] * len(options.seeds), environment=environment)
    status, turns = run_jobs(jobs, places, keep_going=False, watch=Display())
    print_failures(turns)
    if status:
        print(f"exit status {status}; the same command carries on", file=sys.stderr)
        return status
    runs, _ = read_runs(*sorted({Path(job.folder).parent for job in jobs}))
    curves = options.runs / table / "curves.png"
    plot_curves(runs, curves)
    print(f"\n{report(table, runs)}\n")
    print(f"curves: {curves}    runs: {options.runs / table}    time: {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    run_main(main)
