"""A small version of a task's main experiment: from nothing to a table and a picture in a few minutes.

    bash scripts/quickstart.sh [--task classification|lm|nmt] [--seeds "1 101"] [--runs FOLDER] [key=value ...]

It takes the way of the paper's tables: each run is a `python -m <task>.train` of a config of its own, complete runs are
skipped and unfinished ones resumed. The seeds of one method train side by side.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from engine.errors import run_main
from scripts.arguments import Parser, seeds
from scripts.jobs import Job, plan, run
from scripts.plot import plot_curves
from scripts.report import report
from scripts.runs import read_metrics, read_runs
from scripts.tables import CONFIGS

EXPERIMENTS = {  # task to table and rows
    "classification": ("digits", ("sgd", "adam", "radam", "apollo")),
    "lm": ("pydoc_topics", ("adam", "radam", "apollo")),
    "nmt": ("grammar", ("adam", "radam", "apollo")),
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
    lengths = [job.length for of_config in jobs.values() for job in of_config]
    with tqdm(total=sum(length for length, _ in lengths), unit=lengths[0][1], disable=None) as bar:
        for config, of_config in jobs.items():
            bar.set_description(f"{config.stem}, seeds {' '.join(map(str, options.seeds))}")
            if bar.disable:
                print(config.stem, file=sys.stderr, flush=True)
            if status := train(of_config, bar):
                return status
    runs, _ = read_runs(*sorted({job.folder.parent for of_config in jobs.values() for job in of_config}))
    curves = options.runs / table / "curves.png"
    plot_curves(runs, curves)
    print(f"\n{report(table, runs)}\n")
    print(f"curves: {curves}    runs: {options.runs / table}    time: {time.monotonic() - started:.0f} s")
    return 0


def train(jobs: Sequence[Job], bar: tqdm) -> int:
    """Train all `jobs` side by side while `bar` follows them. What they print is shown only if one fails."""
    start = bar.n

    def follow() -> None:
        bar.update(start + sum(map(_done, jobs)) - bar.n)

    # Each has its share of the cores: more threads than cores would spend their time waiting for one another.
    threads = min(4, max(1, (os.cpu_count() or 1) // len(jobs)))  # small networks gain nothing from more than four
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    commands = [job.command() for job in jobs if not job.complete]
    with tempfile.TemporaryFile("w+") as output:
        if status := run(*commands, watch=follow, env=environment, stdout=output, stderr=output):
            output.seek(0)
            bar.write(f"{output.read()}exit status {status}; the same command carries on", file=sys.stderr)
            return status
    follow()
    return 0


def _done(job: Job) -> int:
    """How far the run has come, in the unit of its length."""
    evaluations = read_metrics(job.folder / "metrics.jsonl", problems=[])
    return evaluations[-1][job.length[1]] if evaluations else 0


if __name__ == "__main__":
    run_main(main)
