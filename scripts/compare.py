"""Compares optimizers. Each is tuned by the same protocol, with as many trials, and judged on data unused in tuning.

    bash scripts/compare.sh --task digits --methods "adam apollo mypackage.MyOptimizer"      --help lists the options

Trials are ordinary runs in <runs>/<table>/search/<row>/<setting>/. Complete ones decide the next step
(scripts/protocol.py), so after a kill the same command continues, to the same table.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import ConfigError
from engine.errors import UserError, nearest, positive, run_main
from engine.files import write_atomically
from engine.metrics import DIVERGED
from engine.run_record import read_result
from scripts.arguments import Parser, seeds, words
from scripts.execution import add_options, carry_out, places_of, print_failures
from scripts.jobs import REFUSED, Job, division, job_of, refuse, write_list
from scripts.live import Display
from scripts.methods import read_methods
from scripts.pool import State, Turn
from scripts.protocol import FACTORS, FURTHEST, Method, Setting, best_factor, best_step, widened
from scripts.quickstart import EXPERIMENTS, METHODS
from scripts.reporting.statistics import spread
from scripts.runs import lower_is_better, worst
from scripts.tables import CONFIGS, TASKS, load_settings, published, seeds_of
from scripts.text_table import format_table

COMPARISONS = CONFIGS / "comparison"
TRIAL_SEED = 8191  # of no final run
SEEDS = [1, 101, 201]  # of the final runs, if the table has no published seeds
HELD_OUT = 0.1  # share of the training data, if neither data set nor config names a validation split
METRICS = {"classification": "top1", "language_model": "ppl", "nmt": "fairseq_bleu"}
NOT_SET = REFUSED | {"row": "--methods", "optimizer": "a line in configs/search", "table": "--config"}


class Stopped(Exception):
    """Runs have failed, or a signal came. It holds the exit status."""


@dataclass(frozen=True)
class Comparison:
    task: str  # the package that trains
    config: Path
    table: str
    schedule: str
    methods: Sequence[Method]
    overrides: Sequence[str]
    runs: Path

    @property
    def folder(self) -> Path:
        return self.runs / self.table

    def trial_folder(self, method: Method, setting: Setting) -> Path:
        return self.folder / "search" / method.row / setting.name

    def trial(self, method: Method, setting: Setting) -> Job:
        return self._job(method, setting, TRIAL_SEED, self.trial_folder(method, setting))

    def final(self, method: Method, setting: Setting, seed: int) -> Job:
        return self._job(method, setting, seed, self.final_folder(method, seed))

    def final_folder(self, method: Method, seed: int) -> Path:
        return self.folder / f"{method.row}_{self.schedule}" / f"seed{seed}"

    def score(self, method: Method, setting: Setting) -> float:
        """The validation value: higher is better, -inf where the trial diverged."""
        folder = self.trial_folder(method, setting)
        result = read_result(folder)
        if result.get("diverged"):
            return -math.inf
        if (value := result.get("validation")) is None:
            raise UserError(
                f"{folder}/result.json has no value on a validation split: delete the folder to run it again"
            )
        score = -value if lower_is_better(result["metric"]) else value
        return score if math.isfinite(score) else -math.inf

    def _job(self, method: Method, setting: Setting, seed: int, folder: Path) -> Job:
        overrides = (*self.overrides, f"row={method.row}", method.override(setting), f"seed={seed}")
        settings = load_settings(self.task, self.config, overrides)
        return job_of(self.task, self.config, overrides, folder, settings)


@dataclass
class Tuned:
    method: Method
    step: int  # of the best rate
    setting: Setting  # the chosen one
    tried: list[Setting]


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    comparison = read_comparison(options)
    final_seeds = options.seeds or (seeds_of(comparison.table) if published(comparison.table) else SEEDS)
    if TRIAL_SEED in final_seeds:
        raise UserError(f"--seeds: {TRIAL_SEED} is the seed of the trials: the final runs take others")
    steps = range(-(options.rates // 2), options.rates // 2 + 1)
    if options.dry_run:
        print(dry_run(comparison, steps, final_seeds, options))
        return 0
    try:
        tuned, notes = search_rates(comparison, steps, options)
        notes += search_decays(comparison, tuned, options)
        finals = [comparison.final(one.method, one.setting, seed) for one in tuned for seed in final_seeds]
        run_stage("final", finals, comparison, options)
    except Stopped as stopped:
        return stopped.args[0]
    print(table(comparison, tuned, final_seeds))
    print("\n".join(["", *notes]))
    place = comparison.folder
    print(f"\ntables, pictures and a page of all this: python -m scripts.report {place} --html {place}/report.html")
    return 0


def search_rates(comparison: Comparison, steps: range, options: argparse.Namespace) -> tuple[list[Tuned], list[str]]:
    """Try all methods at `steps`, and further while a best one is at an edge. Also returns notes."""
    methods, asked = comparison.methods, len(steps)
    while True:
        jobs = [comparison.trial(method, method.setting(step)) for method in methods for step in steps]
        run_stage("rates", jobs, comparison, options)
        scores = [{step: comparison.score(method, method.setting(step)) for step in steps} for method in methods]
        low, high = widened(scores)
        if (low, high) == (steps[0], steps[-1]):
            break
        steps = range(low, high + 1)
        print(f"the best rate of a method is at an edge: {len(steps)} rates for all", file=sys.stderr, flush=True)
    tuned, notes = [], []
    if len(steps) > asked:
        notes.append(
            f"The best rate of a method was at an edge: the grid of all methods went on to {len(steps)} rates."
        )
    for method, of_method in zip(methods, scores, strict=True):
        step = best_step(of_method)
        if step is None:
            notes.append(f"{method.row}: diverged at all its rates.")
            step = low
        elif step in (low, high):
            notes.append(
                f"{method.row}: the best rate is at the edge of {FURTHEST} half decades: a better one may lie beyond."
            )
        tuned.append(Tuned(method, step, method.setting(step), [method.setting(tried) for tried in steps]))
    return tuned, notes


def search_decays(comparison: Comparison, tuned: Sequence[Tuned], options: argparse.Namespace) -> list[str]:
    """Try weight decays at the best rates, and put the best into `tuned`. Returns notes."""
    if without := [one.method.row for one in tuned if one.method.decay is None]:
        return [f"Weight decay was tuned for no method, as there is none in {', '.join(without)}."]
    jobs = [comparison.trial(one.method, one.method.setting(one.step, f)) for one in tuned for f in FACTORS]
    run_stage("decays", jobs, comparison, options)
    for one in tuned:
        settings = {factor: one.method.setting(one.step, factor) for factor in FACTORS}
        scores = {factor: comparison.score(one.method, setting) for factor, setting in settings.items()}
        one.setting = settings[best_factor(scores)]
        one.tried += [setting for factor, setting in settings.items() if factor != 1]
    if decoupled := [one.method.row for one in tuned if one.method.decoupled]:
        return [
            f"Decoupled weight decay, whose product with the rate was the same at all rates: {', '.join(decoupled)}."
        ]
    return []


def run_stage(stage: str, jobs: Sequence[Job], comparison: Comparison, options: argparse.Namespace) -> None:
    """Run the incomplete ones of `jobs`. Raises Stopped."""
    path = write_list(jobs, options.runs / "lists", f"{comparison.table}_{stage}")
    display = Display()

    def watch(turns: Sequence[Turn]) -> None:
        accept_diverged(turns, METRICS[comparison.task])
        display(turns)

    status, turns = carry_out(jobs, path, options, watch)
    print_failures(turns)
    if status:
        raise Stopped(status)


def accept_diverged(turns: Sequence[Turn], metric: str) -> None:
    """Complete runs whose loss was not finite, with the worst result."""
    for turn in turns:
        if turn.state is State.FAILED and DIVERGED in turn.error:
            result = {"metric": metric, "diverged": True, "error": turn.error, "complete": True}
            write_atomically(Path(turn.job.folder) / "result.json", json.dumps(result, indent=1) + "\n")
            turn.state, turn.status, turn.error = State.COMPLETE, 0, "diverged"


def table(comparison: Comparison, tuned: Sequence[Tuned], final_seeds: Sequence[int]) -> str:
    metric = METRICS[comparison.task]
    header = ["method", "rate", "weight decay", "trials", "validation", f"test {metric}: mean (std)", "n"]
    lines = []
    for method, setting, tried in ((one.method, one.setting, one.tried) for one in tuned):
        diverged = sum(comparison.score(method, other) == -math.inf for other in tried)
        validation = abs(comparison.score(method, setting))
        results = [read_result(comparison.final_folder(method, seed)) for seed in final_seeds]
        lost = sum(result.get("diverged", False) for result in results)
        lines.append(
            [
                method.row,
                f"{setting.rate:g}",
                "-" if setting.decay is None else f"{setting.decay:g}",
                f"{len(tried)}" + (f", {diverged} diverged" if diverged else ""),
                "diverged" if validation == math.inf else f"{validation:.2f}",
                spread([result.get("final", worst(metric)) for result in results]),
                f"{len(results)}" + (f", {lost} diverged" if lost else ""),
            ]
        )
    return "\n".join(format_table(header, lines))


def dry_run(comparison: Comparison, steps: range, final_seeds: Sequence[int], options: argparse.Namespace) -> str:
    from scripts.estimate import estimate

    jobs = []
    tunes_decay = all(method.decay for method in comparison.methods)
    for method in comparison.methods:
        centre = comparison.trial(method, method.setting(0))
        folders = [str(comparison.trial_folder(method, method.setting(step))) for step in steps]
        folders += [f"{centre.folder}_{factor}" for factor in FACTORS if factor != 1 and tunes_decay]
        folders += [str(comparison.final_folder(method, seed)) for seed in final_seeds]
        jobs += [replace(centre, folder=folder) for folder in folders]
    said = (
        f"{len(comparison.methods)} methods: each {len(steps)} rates, {2 * tunes_decay} weight decays, "
        f"{len(final_seeds)} final runs. Where a best rate is at an edge, another one for each method comes on top."
    )
    return f"{estimate(jobs, places_of(jobs, options))}\n{said}"


def read_comparison(options: argparse.Namespace) -> Comparison:
    """Raises UserError for any mistake, before any run."""
    refuse(options.overrides, NOT_SET, "a comparison")
    config = options.config or config_of(options.task)
    overrides = (*options.overrides, "row=sgd", "optimizer={name: sgd, lr: 1.0}")  # in place of those of a method
    task = task_of(config, overrides)
    settings = load_settings(task, config, overrides)
    held_out = [f"data.validation={HELD_OUT}"] if getattr(settings.data, "validation", None) == 0 else []
    methods = read_methods(CONFIGS / "search" / f"{task}.yaml", options.methods)
    divided = division(task, config, overrides, options.gpus * options.nodes)
    overrides = (*options.overrides, *held_out, *divided)
    return Comparison(task, config, settings.table, settings.schedule.name, methods, overrides, options.runs)


def config_of(task: str) -> Path:
    stem = EXPERIMENTS.get(task, task)
    path = COMPARISONS / f"{stem}.yaml"
    if not path.is_file():
        valid = [*EXPERIMENTS, *sorted(found.stem for found in COMPARISONS.glob("*.yaml"))]
        raise UserError(f"--task: there is no '{task}'{nearest(task, valid)}; valid: {', '.join(valid)}")
    return path


def task_of(config: Path, overrides: Sequence[str]) -> str:
    """The package of the config's table, or one that accepts it, or UserError."""
    if known := next((TASKS[name] for name in (config.stem, config.parent.name) if name in TASKS), None):
        return known
    if not config.is_file():
        raise UserError(f"{config}: no such config")
    errors = {}
    for task in dict.fromkeys(TASKS.values()):
        try:
            load_settings(task, config, overrides)
            return task
        except ConfigError as error:
            errors[task] = str(error)
    raise ConfigError("; ".join(f"not of {task}: {error}" for task, error in errors.items()))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bash scripts/compare.sh",
        usage='%(prog)s --task TASK|--config CONFIG [--methods "sgd adam mypackage.MyOptimizer"] [--seeds "1 101"] '
        "[--rates N] [--jobs N] [--gpus N] [--executor local|slurm] [--nodes N] [--slurm OPTIONS] [--dry-run] "
        "[--runs FOLDER] [key=value ...]",
        description="Tune optimizers by the same protocol (docs/comparing.md), train each with fresh seeds, and print "
        "the table. Complete runs are skipped, unfinished ones resumed. Paths are relative to the repository's root.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--task", help="a config in configs/comparison by its name, e.g. digits; or classification, lm, nmt"
    )
    what.add_argument("--config", type=Path, help="any config: its rows and optimizers are those of --methods instead")
    parser.add_argument(
        "--methods",
        type=words,
        default=METHODS,
        help=f"rows of configs/search/<task>.yaml, or dotted names of classes; default: {' '.join(METHODS)}",
    )
    parser.add_argument("--seeds", type=seeds, help="of the final runs; default: the published ones, or 1 101 201")
    parser.add_argument(
        "--rates", type=odd, default=7, metavar="N", help="in the grid, half a decade apart; default: 7"
    )
    add_options(parser, runs="runs/compare")
    return parser.parse_intermixed_args(arguments)


def odd(text: str) -> int:
    if positive(text) < 3 or int(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"an odd number from 3 on, not {text}")
    return int(text)


if __name__ == "__main__":
    run_main(main)
