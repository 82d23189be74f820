"""Trains whole tables, or any list of runs, several runs at a time, and prints them beside the published numbers.

    bash scripts/reproduce.sh TABLE|all|LIST      --help lists the options

The runs become a list in runs/lists. LIST is such a file, perhaps your own. The same command continues after a kill.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError, nearest, run_main
from scripts.arguments import Parser, seeds, words
from scripts.execution import add_options, carry_out, places_of, print_failures
from scripts.jobs import Job, division, plan, read_list, write_list
from scripts.live import Display
from scripts.reporting.tables import report
from scripts.runs import by_table, read_runs
from scripts.tables import TASKS, cells, later_rows, published, rows, seeds_of

ALL = "all"  # all published tables


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    path = list_of_runs(options)
    jobs = read_list(path)
    if options.dry_run:
        from scripts.estimate import estimate

        print(estimate(jobs, places_of(jobs, options)))
        return 0
    status, turns = carry_out(jobs, path, options, Display())
    if status > 1:
        return status
    print_tables(jobs)
    print_failures(turns)
    return status


def list_of_runs(options: argparse.Namespace) -> Path:
    """The list that the command line names, or a new one. Raises UserError for no runs, a wrong config or override."""
    valid = (*TASKS, ALL)
    if options.what not in valid:
        if Path(options.what).is_file():
            return Path(options.what)
        raise UserError(
            f"'{options.what}' is neither a table{nearest(options.what, valid)} nor a list of runs; "
            f"valid: {', '.join(valid)}"
        )
    tables = [table for table in TASKS if published(table)] if options.what == ALL else [options.what]
    found = {
        table: [(row, schedule, config) for row in rows(table) for schedule, config in cells(table, row).items()]
        for table in tables
    }
    every = [cell for of_table in found.values() for cell in of_table]
    require_known("--rows", options.rows, [row for row, _, _ in every], options.what)
    require_known("--schedules", options.schedules, [schedule for _, schedule, _ in every], options.what)
    jobs: list[Job] = []
    for table, of_table in found.items():
        configs = [
            config
            for row, schedule, config in of_table
            if (row in options.rows if options.rows else row not in later_rows(table))
            and (not options.schedules or schedule in options.schedules)
        ]
        if configs:
            added = division(TASKS[table], configs[0], options.overrides, options.gpus * options.nodes)
            overrides, of_runs = [*options.overrides, *added], options.seeds or seeds_of(table)
            jobs += [plan(table, config, seed, options.runs, overrides) for config in configs for seed in of_runs]
    if not jobs:
        raise UserError(f"{options.what} has no cell of these rows and schedules")
    path = write_list(jobs, options.runs / "lists", options.what)
    print(f"list of runs: {path}", file=sys.stderr)
    return path


def require_known(option: str, names: Sequence[str] | None, there: Sequence[str], what: str) -> None:
    """Raise UserError if one of `names` is not `there`."""
    for name in names or ():
        if name not in there:
            valid = ", ".join(dict.fromkeys(there))
            raise UserError(f"{option}: {what} has no '{name}'{nearest(name, there)}; valid: {valid}")


def print_tables(jobs: Sequence[Job]) -> None:
    runs, problems = read_runs(*sorted({Path(job.folder) for job in jobs}))
    for table, of_table in by_table(runs).items():
        print(report(table, of_table), end="\n\n")
    for problem in problems:
        print(f"skipped: {problem}")


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
    add_options(parser, runs="runs")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    run_main(main)
