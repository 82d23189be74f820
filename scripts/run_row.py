"""Trains a row's cells over the seeds, then prints the row beside the published one.

Complete runs are skipped and unfinished ones resumed.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from classification import cifar
from engine.errors import UserError, nearest, positive, run_main
from scripts.arguments import Parser, seeds
from scripts.jobs import division, plan, torchrun
from scripts.pool import State, Turn, places_for, run_jobs
from scripts.reporting.tables import report
from scripts.runs import read_runs
from scripts.tables import TASKS, cells, load_settings, rows, seeds_of


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    configs = cells(options.table, options.row)
    if not configs:
        there = rows(options.table)
        raise UserError(
            f"{options.table} has no row '{options.row}'{nearest(options.row, there)}; valid: {', '.join(there)}"
        )
    schedules = list(configs) if options.schedules is None else list(dict.fromkeys(options.schedules.split()))
    if not schedules or not set(schedules) <= set(configs):
        raise UserError(f'--schedules "{options.schedules}" is not one or more of: {", ".join(configs)}')
    task, first, overrides = TASKS[options.table], configs[schedules[0]], list(options.overrides)
    overrides += division(task, first, overrides, options.gpus)
    jobs = [
        plan(options.table, configs[schedule], seed, options.runs, overrides)
        for schedule in schedules
        for seed in options.seeds or seeds_of(options.table)
    ]
    data = load_settings(task, first, overrides).data
    if data.name in cifar.ARCHIVES and not all(job.complete for job in jobs):
        cifar.provide(data.name, Path(data.root))  # before anything large is imported
    places = places_for(1, options.gpus, on_cpu="device=cpu" in options.overrides)
    told: dict[str, State] = {}
    status, turns = run_jobs(
        jobs,
        places,
        keep_going=False,
        show_output=True,
        watch=lambda turns: tell(turns, told, torchrun(options.gpus)),
    )
    if status:
        return status
    runs, problems = read_runs(*sorted({Path(job.folder).parent for job in jobs}))
    print(report(options.table, runs))
    for problem in problems:
        print(f"skipped: {problem}")
    return 0


def tell(turns: Sequence[Turn], told: dict[str, State], launcher: Sequence[str]) -> None:
    for number, turn in enumerate(turns, start=1):
        folder = turn.job.folder
        if turn.state is told.get(folder, State.WAITING):
            continue
        told[folder] = turn.state
        match turn.state:
            case State.COMPLETE if turn.process is None:
                said = "complete, skipped"
            case State.RUNNING:
                said = shlex.join(["python", *turn.job.command(launcher)[1:]])
            case State.HELD:
                said = "another process is training there; waiting for it"
            case State.STOPPED:
                said = "stopped, the same command carries on from here"
            case State.FAILED:
                said = f"failed ({turn.error}); when that is put right, the same command carries on from here"
            case _:
                continue
        print(f"[{number}/{len(turns)}] {folder}: {said}", file=sys.stderr, flush=True)


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


if __name__ == "__main__":
    run_main(main)
