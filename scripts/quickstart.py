"""A small version of a task's main experiment: from nothing to a table and a picture in a few minutes.

    bash scripts/quickstart.sh [--task classification] [--seeds "1 101"] [--runs FOLDER] [key=value ...]

It takes the way of the paper's tables: each run is a `python -m <task>.train` of a config of its own, complete runs are
skipped and unfinished ones resumed.
"""

import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from engine.errors import run_main
from scripts.arguments import Parser, seeds
from scripts.jobs import Job, plan, run
from scripts.plot import plot_curves
from scripts.report import report
from scripts.runs import read_epochs, read_runs
from scripts.tables import CONFIGS

EXPERIMENTS = {"classification": ("digits", ("sgd", "adam", "radam", "apollo"))}  # task to table and rows


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
    jobs = [plan(table, config, seed, options.runs, options.overrides) for config in configs for seed in options.seeds]
    with tqdm(total=sum(job.settings["epochs"] for job in jobs), unit="epoch", disable=None) as bar:
        for number, job in enumerate(jobs, start=1):
            name = f"{number}/{len(jobs)} {job.settings['row']}, seed {job.settings['seed']}"
            bar.set_description(name)
            if bar.disable:
                print(f"[{name}]", file=sys.stderr, flush=True)
            if status := train(job, bar):
                return status
    runs, _ = read_runs(*sorted({job.folder.parent for job in jobs}))
    curves = options.runs / table / "curves.png"
    plot_curves(runs, curves)
    print(f"\n{report(table, runs)}\n")
    print(f"curves: {curves}    runs: {options.runs / table}    time: {time.monotonic() - started:.0f} s")
    return 0


def train(job: Job, bar: tqdm) -> int:
    """Train to the end while `bar` follows the epochs. What the training prints is shown only if it fails."""
    start = bar.n

    def follow() -> None:
        bar.update(start + len(read_epochs(job.folder / "metrics.jsonl", problems=[])) - bar.n)

    if not job.complete:
        with tempfile.TemporaryFile("w+") as output:
            if status := run(job.command(), follow, stdout=output, stderr=output):
                output.seek(0)
                bar.write(
                    f"{output.read()}{job.folder}: ended with exit status {status}; the same command carries on",
                    file=sys.stderr,
                )
                return status
    follow()
    return 0


if __name__ == "__main__":
    run_main(main)
