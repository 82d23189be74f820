"""The table of a folder of runs, beside the published one: python -m scripts.report runs/cifar10 [--plot curves.png]

A cell is the mean over its complete runs, with the sample standard deviation in parentheses. Unfinished and damaged
runs are listed, not counted. The final value comes first: the best one was selected on the test data.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from math import isnan
from math import log as ln
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from engine.config import differences
from engine.errors import UserError, run_main
from engine.run_record import NEUTRAL_KEYS
from scripts.arguments import Parser
from scripts.runs import Run, read_runs
from scripts.tables import ROWS, SCHEDULES, cells, is_same_update, load_cell, position, published

# Keys that may differ from the published cell: those that change no result, the seed, and what changes speed alone.
NOT_OF_THE_RECIPE = (*NEUTRAL_KEYS, "seed", "compile", "channels_last")

DIVISION = ("batch", "passes", "batchnorm_group")  # of an update into passes: other ones may make the same update


def main(arguments: list[str]) -> None:
    parser = Parser(prog="python -m scripts.report", description="The table of a folder of runs.")
    parser.add_argument("folder", type=Path, help="a folder with run folders below it, e.g. runs/cifar10")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the curves (png, pdf, svg)")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")
    options = parser.parse_args(arguments)

    runs, problems = read_runs(options.folder)
    if not runs and not problems:
        raise UserError(f"{options.folder}: no runs below this folder; a run folder holds a config.yaml")
    for table in dict.fromkeys(run.table for run in runs):
        of_table = [run for run in runs if run.table == table]
        print(report(table, of_table, published_cells(table), options.markdown), end="\n\n")
        if log := log_table(table, of_table, options.markdown):
            print(log, end="\n\n")
    for problem in problems:
        print(f"damaged: {problem}")
    if options.plot:
        from scripts.plot import plot_curves  # importing matplotlib takes a second

        plot_curves(runs, options.plot)
        print(f"curves: {options.plot}")


def report(table: str, runs: Sequence[Run], expected: Iterable[tuple[str, str]] = (), markdown: bool = False) -> str:
    """The table of `runs`, with a line for each cell in `expected` even where no run is; then notes on single runs."""
    facts = published(table)
    title = f"{table}: mean (std) over n seeds"
    header = ["row", "schedule", "final", "best", "n"]
    if facts:
        title = f"{table}: {facts['metric_in_words']}, mean (std) over n seeds; published: over {facts['runs']} runs"
        header += ["published", "difference", *facts.get("also", {}).values()]
    lines, notes = [], []
    for row, schedule in sorted({*expected, *(run.cell for run in runs)}, key=_cell_position):
        of_cell = [run for run in runs if run.cell == (row, schedule)]
        complete = [run for run in of_cell if run.result]
        finals, bests = [run.result.final for run in complete], [run.result.best for run in complete]
        line = [row, schedule, spread(finals), spread(bests), str(len(complete))]
        if facts:
            target = published_cells(table).get((row, schedule))
            line.append(f"{target[0]:.2f} ({target[1]:.2f})" if target else "")
            line.append(f"{mean(finals) - target[0]:+.2f}" if target and finals else "")
            line += [spread(_scores(complete, name)) for name in facts.get("also", {})]
        lines.append(line)
        notes += _notes(of_cell)
    return "\n".join([title, *format_table(header, lines, markdown), *([""] if notes else []), *notes])


def log_table(table: str, runs: Sequence[Run], markdown: bool = False) -> str | None:
    """The author's training log beside those of `runs`; None without such a log, or without runs of its cell."""
    log = (published(table) or {}).get("log_of_author")
    of_cell = [run for run in runs if log and run.cell == (log["row"], log["schedule"]) and run.training]
    if not of_cell:
        return None
    title = f"{table}: {log['row']} {log['schedule']}, training loss in bits per target token, share of clipped updates"
    updates = list(log["bits"])
    header = ["update", "published"]
    columns = [[f"{update:,}" for update in updates], [f"{bits:.2f}" for bits in log["bits"].values()]]
    for run in of_cell:
        header += [f"seed {run.seed}", "clipped"]
        columns.append(["" if isnan(nats) else f"{nats / ln(2):.2f}" for nats in run.logged("loss", updates)])
        columns.append(["" if isnan(share) else f"{share:.0%}" for share in run.logged("clipped", updates)])
    lines = format_table(header, list(zip(*columns, strict=True)), markdown)
    return "\n".join([title, *lines, "", f"published: {log['source']}; {log['in_words']}"])


def _cell_position(cell: tuple[str, str]) -> tuple:
    return position(cell[0], ROWS), position(cell[1], SCHEDULES)


def _scores(complete: Sequence[Run], name: str) -> list[float]:
    """A further score of those runs that have it; the table compares none of these with the published value."""
    scores = (run.result.model_extra.get(name) for run in complete)
    return [score for score in scores if isinstance(score, (int, float))]


def _notes(of_cell: Sequence[Run]) -> list[str]:
    """What a reader of the cell's numbers must know: how a score was computed, seeds that follow another recipe, runs
    that are not counted."""
    seeds_by_changes: dict[str, list[int]] = {}
    for run in of_cell:
        if run.result and (changes := changes_to_recipe(run)):
            seeds_by_changes.setdefault(", ".join(changes), []).append(run.seed)
    signatures = dict.fromkeys(run.result.model_extra.get("signature") for run in of_cell if run.result)
    notes = [f"{' '.join(of_cell[0].cell)}, sacreBLEU: {signature}" for signature in signatures if signature]
    for changes, seeds in seeds_by_changes.items():
        who = f"{' '.join(of_cell[0].cell)}, seed{'s' if len(seeds) > 1 else ''} {' '.join(map(str, seeds))}"
        notes.append(f"{who}: not the published recipe: {changes}")
    for run in of_cell:
        if not run.result:
            done = run.evaluations[-1][run.unit] if run.evaluations else 0
            notes.append(f"unfinished: {run.folder}, {run.unit} {done} of {run.config.get(f'{run.unit}s', '?')}")
    return notes


def spread(values: Sequence[float]) -> str:
    """`mean (std)` with the sample standard deviation; the mean alone for one value, nothing for none."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ({stdev(values):.2f})" if len(values) > 1 else "")


def published_cells(table: str) -> dict[tuple[str, str], list[float]]:
    """(row, schedule) to the published [mean, std]; empty for a table that nobody published."""
    facts = published(table) or {"cells": {}}
    return {(row, schedule): value for row, values in facts["cells"].items() for schedule, value in values.items()}


@cache
def _published_recipe(table: str, row: str, schedule: str) -> dict[str, Any]:
    return load_cell(table, cells(table, row)[schedule]).model_dump(mode="json")


def changes_to_recipe(run: Run) -> list[str]:
    """`key=value` for each setting of the run that differs from the published cell; empty also where there is none."""
    if run.cell not in published_cells(run.table):
        return []
    recipe = _published_recipe(run.table, *run.cell)
    changes = []
    division = DIVISION if is_same_update(run.table, run.config, recipe) else ()
    for key in differences(run.config, recipe, ignore=(*NOT_OF_THE_RECIPE, *division)):
        value: Any = run.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        changes.append(f"{key}={'unset' if value is None else value}")
    batch, expected = run.recipe.get("batchnorm_batch"), published(run.table).get("batchnorm_batch")
    if batch and expected and batch != expected:
        changes.append(f"batchnorm_batch={batch}")
    return changes


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool = False) -> list[str]:
    """Aligned columns, the header first; as Markdown, with its bars and rule."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    texts = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in (header, *lines)]
    if not markdown:
        return ["  ".join(line).rstrip() for line in texts]
    texts.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in texts]


if __name__ == "__main__":
    run_main(main)
