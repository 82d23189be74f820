"""Carries out a list of runs, here or in SLURM's queue, for reproduce.sh and compare.sh."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.errors import positive
from scripts.jobs import Job
from scripts.pool import Places, State, Turn, places_for, run_jobs


def add_options(parser: argparse.ArgumentParser, runs: str) -> None:
    """Where and how to run; `runs` is the default of --runs."""
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
    parser.add_argument("--runs", type=Path, default=runs, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run, e.g. epochs=3")


def carry_out(
    jobs: Sequence[Job], path: Path, options: argparse.Namespace, watch: Callable[[Sequence[Turn]], None]
) -> tuple[int, list[Turn]]:
    """Run the incomplete ones of `jobs`, the list at `path`. Returns an exit status and the turns with their states.

    The status is 1 if runs have failed, else 0 or 128 + a signal.
    """
    if options.executor == "slurm":
        from scripts.slurm import Request, queue_name, run_in_queue

        request = Request(options.jobs or 8, options.gpus, options.nodes, runs_on_cpu(jobs), options.slurm)
        status, turns = run_in_queue(jobs, queue_name(path), options.runs / "slurm", request, watch)
    else:
        status, turns = run_jobs(jobs, places_of(jobs, options), watch=watch)
    if any(turn.state is State.FAILED for turn in turns):
        return 1, turns
    if status:
        print("stopped; the same command carries on from here", file=sys.stderr)
    return status, turns


def runs_on_cpu(jobs: Sequence[Job]) -> bool:
    return any("device=cpu" in job.overrides for job in jobs)


def places_of(jobs: Sequence[Job], options: argparse.Namespace) -> Places:
    return places_for(options.jobs, options.gpus, runs_on_cpu(jobs))


def print_failures(turns: Sequence[Turn]) -> None:
    failed = [turn for turn in turns if turn.state is State.FAILED]
    for turn in failed:
        print(f"failed: {turn.job.folder}: {turn.error} (log: {turn.job.log})")
    if failed:
        print(f"{len(failed)} of {len(turns)} runs failed; the same command tries them again")


def sbatch_options(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [tuple(word.split("=", 1)) for word in text.split()]
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f'options are of the form "partition=gpu time=1440", not "{text}"')
    return tuple(pairs)
