"""Trains whole tables, or any list of runs, several runs at a time, and prints them beside the published numbers.

    bash scripts/reproduce.sh TABLE|all|LIST [--rows "sgd apollo"] [--schedules "milestone"] [--seeds "1 101"]
        [--jobs N] [--gpus N] [--executor local|slurm] [--nodes N] [--slurm OPTIONS] [--dry-run] [--runs FOLDER]
        [key=value ...]

The runs are written as a list in FOLDER/lists. The run folders say what is done, so the same command continues after a
kill. LIST is such a file, which you may also write yourself.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError, nearest, run_main
from scripts.arguments import Parser, positive, seeds
from scripts.jobs import Job, division, plan, read_list, write_list
from scripts.live import Display
from scripts.pool import State, Turn, places_for, run_jobs
from scripts.report import report
from scripts.runs import read_runs
from scripts.tables import TASKS, cells, later_rows, published, rows, seeds_of

ALL = "all"  # all published tables


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    path = list_of_runs(options)
    jobs = read_list(path)
    on_cpu = any("device=cpu" in job.overrides for job in jobs)
    if options.dry_run:
        from scripts.estimate import estimate

        print(estimate(jobs, places_for(options.jobs, options.gpus, on_cpu)))
        return 0
    if options.executor == "slurm":
        from scripts.slurm import Request, run_in_queue

        request = Request(options.jobs or 8, options.gpus, options.nodes, on_cpu, options.slurm)
        status, turns = run_in_queue(jobs, path.stem, options.runs / "slurm", request, Display())
    else:
        status, turns = run_jobs(jobs, places_for(options.jobs, options.gpus, on_cpu), watch=Display())
    if status > 128 and not any(turn.state is State.FAILED for turn in turns):
        print("stopped; the same command carries on from here", file=sys.stderr)
        return status
    print_tables(jobs)
    return print_failures(turns)


def list_of_runs(options: argparse.Namespace) -> Path:
    """The list that the command line names, or a new list of the runs that it names.

    Raises UserError if it names no runs, and for a wrong config or override.
    """
    if options.what not in (*TASKS, ALL):
        if not Path(options.what).is_file():
            valid = (*TASKS, ALL)
            raise UserError(
                f"'{options.what}' is neither a table{nearest(options.what, valid)} nor a list of runs; "
                f"valid: {', '.join(valid)}"
            )
        return Path(options.what)
    tables = [table for table in TASKS if published(table)] if options.what == ALL else [options.what]
    every = configs = [
        (table, row, schedule, config)
        for table in tables
        for row in rows(table)
        for schedule, config in cells(table, row).items()
    ]
    for option, place, found in (("rows", 1, options.rows), ("schedules", 2, options.schedules)):
        there = dict.fromkeys(cell[place] for cell in every)
        for name in found or ():
            if name not in there:
                raise UserError(
                    f"--{option}: {options.what} has no '{name}'{nearest(name, there)}; valid: {', '.join(there)}"
                )
        configs = [cell for cell in configs if found is None or cell[place] in found]
    if options.rows is None:
        configs = [cell for cell in configs if cell[1] not in later_rows(cell[0])]
    gpus, first = options.gpus * options.nodes, {table: config for table, _, _, config in reversed(configs)}
    overrides = {
        table: [*options.overrides, *division(TASKS[table], config, options.overrides, gpus)]
        for table, config in first.items()
    }
    jobs = [
        plan(table, config, seed, options.runs, overrides[table])
        for table, _, _, config in configs
        for seed in options.seeds or seeds_of(table)
    ]
    if not jobs:
        raise UserError(f"{options.what} has no cell of these rows and schedules")
    path = write_list(jobs, options.runs / "lists", options.what)
    print(f"list of runs: {path}", file=sys.stderr)
    return path


def print_tables(jobs: Sequence[Job]) -> None:
    runs, problems = read_runs(*sorted({Path(job.folder) for job in jobs}))
    for table in dict.fromkeys(run.table for run in runs):
        print(report(table, [run for run in runs if run.table == table]), end="\n\n")
    for problem in problems:
        print(f"skipped: {problem}")


def print_failures(turns: Sequence[Turn]) -> int:
    """Print the failed runs. Returns the exit status."""
    failed = [turn for turn in turns if turn.state is State.FAILED]
    for turn in failed:
        print(f"failed: {turn.job.folder}: {turn.error} (log: {turn.job.log})")
    if failed:
        print(f"{len(failed)} of {len(turns)} runs failed; the same command tries them again")
    return 1 if failed else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bash scripts/reproduce.sh",
        usage='%(prog)s TABLE|all|LIST [--rows "sgd apollo"] [--schedules "milestone"] [--seeds "1 101"] [--jobs N] '
        '[--gpus N] [--executor local|slurm] [--nodes N] [--slurm "partition=gpu time=1440"] [--dry-run] '
        "[--runs FOLDER] [key=value ...]",
        description="Train the runs of a table, several at a time, and print it beside the published one. Complete "
        "runs are skipped, unfinished ones resumed. Paths are relative to the root of the repository.",
    )
    parser.add_argument(
        "what", metavar="TABLE", help=f"{', '.join(TASKS)}; {ALL}: the published ones; or a list of runs"
    )
    parser.add_argument("--rows", type=words, help="default: all of the first published table; the later ones by name")
    parser.add_argument("--schedules", type=words, help="default: all")
    parser.add_argument("--seeds", type=seeds, help="default: those of the published table")
    parser.add_argument("--jobs", type=positive, metavar="N", help="runs at a time; default: one for each --gpus GPUs")
    parser.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="processes of a run, one GPU each; default: 1"
    )
    parser.add_argument("--dry-run", action="store_true", help="time some updates of each cell, and say what all take")
    parser.add_argument("--executor", choices=("local", "slurm"), default="local", help="default: %(default)s")
    parser.add_argument(
        "--nodes", type=positive, default=1, metavar="N", help="of SLURM: machines of a run; default: 1"
    )
    parser.add_argument("--slurm", type=sbatch_options, default=(), help="options of sbatch; time: minutes of a job")
    parser.add_argument("--runs", type=Path, default="runs", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, e.g. precision=bf16")
    return parser.parse_intermixed_args(arguments)


def words(text: str) -> list[str]:
    """`"sgd apollo"` as its words."""
    if not text.split():
        raise argparse.ArgumentTypeError("no name given")
    return text.split()


def sbatch_options(text: str) -> tuple[tuple[str, str], ...]:
    """`"partition=gpu time=1440"` as its pairs."""
    pairs = [tuple(word.split("=", 1)) for word in text.split()]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f'options are of the form "partition=gpu time=1440", not "{text}"')
    return tuple(pairs)


if __name__ == "__main__":
    run_main(main)
