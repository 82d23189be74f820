"""Compares a run, as early as possible, with a committed record.

The band at an update is the 99 % prediction interval for one more seed, by Student's t over the record's. Two
evaluations in a row outside it are a departure.
"""

import math
from collections.abc import Sequence

from engine.config import differences
from scripts.reporting.pictures import Curve, Panel, curve_keys, points
from scripts.reporting.statistics import interval
from scripts.runs import NOT_OF_THE_RECIPE, Run

LEVEL = 0.99
IN_A_ROW = 2
Band = dict[int, tuple[float, float]]


def compare(runs: Sequence[Run], record: Sequence[Run]) -> tuple[list[str], bool, list[Panel]]:
    """Lines about `runs`, whether one left the band, and the pictures."""
    lines, left, panels = [], False, {}
    for run in runs:
        if run.trial:
            continue
        others = _same_cell(run, record)
        if not others or not run.evaluations:
            reason = (
                "nothing evaluated yet" if others else f"the record has no runs of {run.table} {' '.join(run.cell)}"
            )
            lines.append(f"{run.folder}: {reason}")
            continue
        if changed := differences(run.config, others[0].config, NOT_OF_THE_RECIPE):
            lines.append(f"{run.folder}: other settings than the record's: {', '.join(changed)}")
        for index, (key, label) in enumerate(curve_keys(run)):
            band = _band(others, key)
            line, departs = _departure(run, key, band, len(others))
            lines.append(f"{run.folder}: {key} {line}")
            left = left or departs
            place = f"{run.table}, {' '.join(run.cell)}"
            panel = panels.setdefault((place, key), Panel("reference", place, "updates", label, [], y_log=index == 0))
            if not panel.curves:
                panel.curves.append(_band_curve(band, len(others)))
            found = points(run, key)
            panel.curves.append(
                Curve(f"seed {run.seed}", [update for update, _, _ in found], [value for _, _, value in found])
            )
    return lines, left, list(panels.values())


def _same_cell(run: Run, record: Sequence[Run]) -> list[Run]:
    """The record's runs of the cell with the same settings, or else of the first recipe."""
    of_cell = [other for other in record if (other.table, *other.cell) == (run.table, *run.cell) and not other.trial]
    same = [other for other in of_cell if not differences(run.config, other.config, NOT_OF_THE_RECIPE)]
    return same or [other for other in of_cell if other.variant == 1]


def _band(others: Sequence[Run], key: str) -> Band:
    """Update to band, where all of `others` were evaluated."""
    values: dict[int, list[float]] = {}
    for other in others:
        for update, _, value in points(other, key):
            values.setdefault(int(update), []).append(value)
    bands = {update: interval(found, LEVEL, more=1) for update, found in values.items() if len(found) == len(others)}
    return {update: band for update, band in bands.items() if band}


def _departure(run: Run, key: str, band: Band, seeds: int) -> tuple[str, bool]:
    """What to say about a curve, and whether it left the band."""
    compared = [(update, value, *band[update]) for update, _, value in points(run, key) if update in band]
    if not compared:
        why = "one seed makes no band" if seeds < 2 else "no update in common"
        return f"cannot be compared with the record: {why}", False
    outside = [not low <= value <= high for _, value, low, high in compared]
    for index in range(len(outside) - IN_A_ROW + 1):
        if all(outside[index : index + IN_A_ROW]):
            update, value, low, high = compared[index]
            expected = f"where the record's {seeds} seeds let expect {low:.4g} to {high:.4g}"
            return f"left the band at update {update}: {value:.4g}, {expected}", True
    return f"within the band of the record's {seeds} seeds up to update {compared[-1][0]}", False


def _band_curve(band: Band, seeds: int) -> Curve:
    updates = sorted(band)
    low, high = ([band[update][end] for update in updates] for end in (0, 1))
    middle = [math.fsum(band[update]) / 2 for update in updates]
    return Curve("record", [float(update) for update in updates], middle, low, high, [f"n = {seeds}"] * len(updates))
