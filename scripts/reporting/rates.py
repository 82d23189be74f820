"""A table of a search's trials over the learning rate, as in the picture of sensitivity."""

import math
from collections.abc import Sequence
from itertools import groupby

from engine.config import differences, value_at
from scripts.runs import NOT_OF_THE_RECIPE, Run, lower_is_better, order
from scripts.tables import TASKS, position

ABOUT_RATES = (
    "The value on the validation split at the end of each trial. The columns are learning rates half a decade apart; a "
    "trial stands in the nearest one. Of several weight decays the best value stands. ×: the trial diverged."
)


def rates(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: one a row, and one for each recipe other than that of most of its trials."""
    trials = [run for run in runs if run.trial and run.result and run.rate]
    trials.sort(key=lambda run: (position(run.table, tuple(TASKS)), order(run)))
    lines: dict[str, dict[int, list[Run]]] = {}
    for _, of_row in groupby(trials, key=lambda run: (run.table, run.row)):
        of_row = list(of_row)
        usual = max(of_row, key=lambda run: sum(not _changes(run, other) for other in of_row))
        for run in sorted(of_row, key=lambda run: len(_changes(run, usual))):
            label = ", ".join([f"{run.table}: {run.row}", *_changes(run, usual)])
            lines.setdefault(label, {}).setdefault(_column(run), []).append(run)
    columns = sorted({column for of_line in lines.values() for column in of_line})
    cells = [[label, *(_best(of_line.get(column, [])) for column in columns)] for label, of_line in lines.items()]
    return ["trials", *(f"{float(f'{10 ** (column / 2):.1g}'):g}" for column in columns)], cells


def _changes(run: Run, usual: Run) -> list[str]:
    """`key=value` for each setting that differs from `usual`, without the optimizer's."""
    ignored = (*NOT_OF_THE_RECIPE, "optimizer")
    return [f"{key}={value_at(run.config, key)}" for key in differences(run.config, usual.config, ignored)]


def _column(run: Run) -> int:
    return round(2 * math.log10(run.rate))


def _best(runs: Sequence[Run]) -> str:
    values = [run.result.validation for run in runs if not run.result.diverged]
    if not values:
        return "×" if runs else ""
    value = min(values) if lower_is_better(runs[0].result.metric) else max(values)
    return f"{value:.2f}" if value < 1e5 else f"{value:.0e}"
