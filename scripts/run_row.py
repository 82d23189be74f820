"""One row of a table: trains its cells over the seeds, then prints the row beside the published one.

    python -m scripts.run_row TABLE ROW [--seeds "1 101"] [--schedules "milestone cosine"] [key=value ...]

Complete runs are skipped and unfinished ones resumed, so the same command carries on after any interruption. Each run
is a process of its own, exactly the command that one would type for it.
"""

import argparse
import shlex
import sys
from pathlib import Path

from engine.errors import UserError, nearest, run_main
from scripts.arguments import Parser, positive, seeds
from scripts.jobs import plan, run
from scripts.report import report
from scripts.runs import read_runs
from scripts.tables import TASKS, cells, published, seeds_of


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    configs = cells(options.table, options.row)
    if not configs:
        rows = published(options.table)["cells"]
        raise UserError(
            f"{options.table} has no row '{options.row}'{nearest(options.row, rows)}; valid: {', '.join(rows)}"
        )
    schedules = list(configs) if options.schedules is None else list(dict.fromkeys(options.schedules.split()))
    if not schedules or not set(schedules) <= set(configs):
        raise UserError(f'--schedules "{options.schedules}" is not one or more of: {", ".join(configs)}')
    jobs = [
        plan(options.table, configs[schedule], seed, options.runs, options.overrides)
        for schedule in schedules
        for seed in options.seeds or seeds_of(options.table)
    ]
    for number, job in enumerate(jobs, start=1):
        place = f"[{number}/{len(jobs)}] {job.folder}"
        if job.complete:
            say(f"{place}: complete, skipped")
            continue
        command = job.command(options.gpus)
        say(f"{place}: {shlex.join(['python', *command[1:]])}")
        if status := run(command):
            how = "stopped" if status > 128 else f"failed with exit status {status}; when that is put right"
            say(f"{place}: {how}, the same command carries on from here")
            return status
    runs, problems = read_runs(*sorted({job.folder.parent for job in jobs}))
    print(report(options.table, runs))
    for problem in problems:
        print(f"damaged: {problem}")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bash scripts/<table>_<row>.sh",
        usage='%(prog)s [--seeds "1 101"] [--schedules "milestone cosine"] [--runs FOLDER] [--gpus N] [key=value ...]',
        description="Train one row of a table and print it beside the published one. Complete runs are skipped, "
        "unfinished ones resumed. Paths are relative to the root of the repository.",
    )
    parser.add_argument("table", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("row", help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=seeds, help="default: those in configs/<table>/published.yaml")
    parser.add_argument("--schedules", help="default: all of the row's")
    parser.add_argument("--runs", type=Path, default="runs", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="processes, one GPU each; default: 1")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, e.g. compile=true")
    return parser.parse_intermixed_args(arguments)


def say(text: str) -> None:
    """Progress goes to stderr: standard output is the row alone."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
