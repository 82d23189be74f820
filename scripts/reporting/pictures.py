"""The numbers in the pictures, which drawing.py (matplotlib) and page.py draw. docs/reproduction.md describes them."""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from itertools import cycle
from statistics import mean
from typing import NamedTuple

import numpy as np

from scripts.reporting.records import flatten
from scripts.reporting.statistics import expected_best, interval
from scripts.reporting.style import OTHER_COLOURS, STYLES
from scripts.runs import Run, lower_is_better

# Key and label of the two curves: classification, language modelling, translation.
CURVES = (
    (("train_loss", "training loss"), ("test_top1", "test accuracy (%)")),
    (("train_ppl", "training perplexity"), ("test_ppl", "test perplexity")),
    (("train_loss", "training loss"), ("valid_bleu", "BLEU on the validation set")),
)
METRICS = {"top1": "accuracy (%)", "ppl": "perplexity", "fairseq_bleu": "BLEU"}
MOST_LEVELS = 120
TITLES = {
    "curves": "Training and evaluation",
    "levels": "Time to reach a level",
    "sensitivity": "Sensitivity to the learning rate",
    "budget": "What a tuning budget gives",
    "reference": "Beside the record",
}
ABOUT = {
    "curves": "The line is the mean over seeds, the band reaches from the lowest to the highest.",
    "levels": "The first evaluation at the level or beyond: mean over seeds and 95 % interval. ✕: from this level on, "
    "one seed at least never arrives.",
    "sensitivity": "Trials of the search, each a whole training. ✕: the trial diverged. Single points vary a second "
    "setting beside the rate.",
    "reference": "The record's seeds: middle and 99 % prediction interval for one more seed; beside it, the run.",
    "budget": "Expectation over all orders of the trials that were run; it says nothing beyond them.",
}


@dataclass(frozen=True)
class Curve:
    """`y` is None for a diverged trial or a level never reached."""

    method: str
    x: list[float]
    y: list[float | None]
    low: list[float | None] = field(default_factory=list)  # with `high` the band, if any
    high: list[float | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # one for each point
    points: bool = False  # no line
    crosses: list[tuple[float, float]] = field(default_factory=list)  # marks of missing values


@dataclass(frozen=True)
class Panel:
    picture: str  # curves, levels, sensitivity, budget, reference
    place: str  # the table, and the schedule if rows have several
    x_label: str
    y_label: str
    curves: list[Curve]
    by: str = ""  # updates or seconds, if each has a panel
    x_log: bool = False
    y_log: bool = False

    @property
    def name(self) -> str:
        words = dict.fromkeys((self.place, self.picture, self.y_label, self.by))
        return "_".join(re.sub(r"\W+", "-", word).strip("-") for word in words if word)

    def csv(self) -> str:
        text = StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["method", self.x_label, self.y_label, "low", "high", "note"])
        for curve in self.curves:
            for index, (x, y) in enumerate(zip(curve.x, curve.y, strict=True)):
                ends = [ends[index] if ends else None for ends in (curve.low, curve.high)]
                note = curve.notes[index] if curve.notes else ""
                writer.writerow([curve.method, x, *("" if value is None else value for value in (y, *ends)), note])
        return text.getvalue()


def pictures(runs: Sequence[Run]) -> list[Panel]:
    panels: list[Panel] = []
    for place, methods in places([run for run in runs if not run.trial]).items():
        drawn = evaluated(methods)
        panels += curve_panels(place, drawn) + level_panels(place, drawn)
    finals = [run for run in runs if not run.trial and run.rate]
    for place, trials in places([run for run in runs if run.trial and run.result]).items():
        panels += sensitivity_panel(place, trials, _chosen_rates(trials, finals)) + budget_panels(place, trials)
    return panels


def places(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Runs by picture and method; a schedule has a picture of its own."""
    schedules = Counter((table, row) for table, row, _ in {(run.table, *run.cell) for run in runs})
    several = {table for (table, _), count in schedules.items() if count > 1}
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        place = f"{run.table}, {run.schedule} schedule" if run.table in several else run.table
        found.setdefault(place, {}).setdefault(run.label, []).append(run)
    return found


def evaluated(methods: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Each method's complete runs with evaluations, or else unfinished ones."""
    found = {
        method: [run for run in [run for run in runs if run.result] or runs if run.evaluations]
        for method, runs in methods.items()
    }
    return {method: runs for method, runs in found.items() if runs}


def curve_keys(run: Run) -> tuple[tuple[str, str], tuple[str, str]]:
    return next((two for two in CURVES if two[1][0] in run.evaluations[0]), CURVES[0])


def points(run: Run, key: str) -> list[tuple[float, float, float]]:
    """Update, seconds (NaN if unknown) and value where it is finite."""
    found = ((line["update"], line.get("wall_s", math.nan), line.get(key)) for line in run.evaluations)
    return [point for point in found if isinstance(point[2], (int, float)) and math.isfinite(point[2])]


def curve_panels(place: str, methods: dict[str, list[Run]]) -> list[Panel]:
    panels = []
    for index in (0, 1):
        for by in ("updates", "seconds"):
            curves = []
            for method, runs in methods.items():
                key, label = curve_keys(runs[0])[index]
                if curve := _mean_curve(method, runs, key, by):
                    curves.append(curve)
            if curves:
                panels.append(Panel("curves", place, by, label, curves, by, y_log=index == 0))
    return panels


def _mean_curve(method: str, runs: Sequence[Run], key: str, by: str) -> Curve | None:
    """The mean up to the end of the shortest run; None without points or positions."""
    found = [curve for run in runs if (curve := points(run, key))]
    steps = list(zip(*found, strict=False))
    which = 0 if by == "updates" else 1
    positions = [mean(point[which] for point in step) for step in steps]
    if not positions or any(map(math.isnan, positions)):
        return None
    values = [[point[2] for point in step] for step in steps]
    middle, low, high = (list(map(form, values)) for form in (mean, min, max))
    return Curve(method, positions, middle, low, high, notes=[f"n = {len(found)}"] * len(steps))


def level_panels(place: str, methods: dict[str, list[Run]]) -> list[Panel]:
    if not methods:
        return []
    key, label = curve_keys(next(iter(methods.values()))[0])[1]
    sign = -1 if lower_is_better(key.rpartition("_")[2]) else 1
    found = {
        method: [np.array(curve).T for run in runs if (curve := points(run, key))] for method, runs in methods.items()
    }
    seen = np.unique([value for runs in found.values() for run in runs for value in run[2]])[::sign]
    levels = seen[:: -(-len(seen) // MOST_LEVELS) or 1]
    panels = []
    for by, which in (("updates", 0), ("seconds", 1)):
        curves = [_level_curve(method, runs, levels, which, sign) for method, runs in found.items() if runs]
        heights = [value for curve in curves for value in curve.y if value is not None]
        if heights:
            top = 1.08 * max(heights)
            ends = [[(x, top) for x, y in zip(curve.x, curve.y, strict=True) if y is None] for curve in curves]
            curves = [replace(curve, crosses=end[:1]) for curve, end in zip(curves, ends, strict=True)]
            panels.append(Panel("levels", place, label, by, curves, by))
    return panels


def _level_curve(method: str, runs: Sequence[np.ndarray], levels: np.ndarray, which: int, sign: int) -> Curve:
    """Updates (`which` = 0) or seconds (1) to each of `levels`; `runs` are [3, evaluations], from `points`."""
    times = np.full((len(runs), len(levels)), np.nan)
    for row, run in zip(times, runs, strict=True):
        best = np.maximum.accumulate(sign * run[2])
        first = np.searchsorted(best, sign * levels)  # at the level or better
        reached = first < len(best)
        row[reached] = run[which, first[reached]]
    middle = [None if math.isnan(value) else value for value in times.mean(0).tolist()]  # None: a run never arrives
    ends = [interval(of_level) or (None, None) for of_level in times.T.tolist()]
    low = [None if first is None else max(first, 0.0) for first, _ in ends]
    high = [last for _, last in ends]
    lost = np.isnan(times).sum(0)
    notes = [f"never by {count} of {len(runs)} seeds" if count else f"n = {len(runs)}" for count in lost]
    return Curve(method, levels.tolist(), middle, low, high, notes)


def sensitivity_panel(place: str, methods: dict[str, list[Run]], chosen: dict[str, float]) -> list[Panel]:
    curves = []
    for method, trials in methods.items():
        trials = [trial for trial in trials if trial.rate]
        if not trials:
            continue
        grid = grid_of(trials)
        rates: dict[float, list[Run]] = {}
        for trial in grid:
            rates.setdefault(trial.rate, []).append(trial)
        groups = [rates[rate] for rate in sorted(rates)]
        curves.append(_trial_curve(method, groups, chosen[method]))
        if others := [[trial] for trial in trials if trial not in grid]:
            curves.append(_trial_curve(method, others, chosen[method], points=True))
    if not curves:
        return []
    trials = [trial for runs in methods.values() for trial in runs]
    lower = lower_is_better(trials[0].result.metric)
    label = f"{_split(trials)} {_metric(trials)} at the end"
    return [Panel("sensitivity", place, "rate / chosen rate", label, _crossed(curves, lower), x_log=True, y_log=lower)]


def _crossed(curves: Sequence[Curve], lower: bool) -> list[Curve]:
    """The curves with crosses for diverged trials, beyond the worst value, at one height per method."""
    heights = [value for curve in curves for value in curve.y if value is not None] or [1.0]
    step = (max(heights) - min(heights) or 1.0) * 0.04
    crossed = []
    for index, method in enumerate(dict.fromkeys(curve.method for curve in curves), start=1):
        edge = max(heights) * 1.06**index if lower else min(heights) - step * index
        for curve in curves:
            if curve.method == method:
                missing = [x for x, y in zip(curve.x, curve.y, strict=True) if y is None]
                crossed.append(replace(curve, crosses=[(x, edge) for x in missing]))
    return crossed


def grid_of(trials: Sequence[Run]) -> list[Run]:
    """The trials in which only the rate varies: those of the settings with the most rates.

    A grid keeps the decay, or if decoupled its product with the rate, up to rounding to three digits.
    """
    products: list[float] = []

    def same(product: float) -> float:
        if near := [known for known in products if abs(product - known) <= 0.02 * known]:
            return near[0]
        products.append(product)
        return product

    def others(trial: Run, product: bool) -> tuple:
        settings = flatten({"optimizer": trial.config["optimizer"]}, ignore=("optimizer.lr",))
        decay = settings.get("optimizer.weight_decay")
        if product and isinstance(decay, (int, float)):
            settings["optimizer.weight_decay"] = same(decay * trial.rate)
        return product, *((key, repr(value)) for key, value in settings.items())

    tried = Counter(
        key for product in (False, True) for key in {(trial.rate, others(trial, product)) for trial in trials}
    )
    settings = Counter(key for _, key in tried)
    best = max(settings, key=lambda key: (settings[key], not key[0]))
    return [trial for trial in trials if others(trial, best[0]) == best]


def _trial_curve(method: str, groups: Sequence[Sequence[Run]], chosen: float, points: bool = False) -> Curve:
    y: list[float | None] = []
    notes = []
    for trials in groups:
        values = [trial_value(trial) for trial in trials]
        y.append(None if any(trial.result.diverged for trial in trials) else mean(values))
        decay = trials[0].config["optimizer"].get("weight_decay")
        tested = f", test {mean(trial.result.final for trial in trials):.2f}" if y[-1] is not None else ", diverged"
        notes.append(f"lr {trials[0].rate:g}" + (f", weight_decay {decay:g}" if decay else "") + tested)
    return Curve(method, [trials[0].rate / chosen for trials in groups], y, notes=notes, points=points)


def _chosen_rates(methods: dict[str, list[Run]], finals: Sequence[Run]) -> dict[str, float]:
    """Method to the rate of its runs of the table, or else its best trial."""
    chosen = {}
    for method, trials in methods.items():
        first = trials[0]
        final = [run for run in finals if (run.table, run.label) == (first.table, method)]
        final = [run for run in final if run.schedule == first.schedule] or final
        sign = -1 if lower_is_better(first.result.metric) else 1
        best = max(trials, key=lambda trial: sign * trial_value(trial))
        chosen[method] = final[0].rate if final else best.rate or 1.0
    return chosen


def budget_panels(place: str, methods: dict[str, list[Run]]) -> list[Panel]:
    trials = [trial for runs in methods.values() for trial in runs]
    lower = lower_is_better(trials[0].result.metric)
    validated = all(trial.result.validation is not None for trial in trials)
    wanted = [(f"expected best {_split(trials)} {_metric(trials)}", trial_value)]
    if validated:
        wanted.append((f"expected test {_metric(trials)} of that choice", lambda trial: trial.result.final))
    panels = []
    for label, value in wanted:
        curves = []
        for method, of_method in methods.items():
            expected = expected_best([(trial_value(trial), value(trial)) for trial in of_method], lower)
            y = [value if math.isfinite(value) else None for value in expected]
            notes = ["" if found is not None else "some orders find diverged trials alone" for found in y]
            curves.append(Curve(method, [float(k) for k in range(1, len(y) + 1)], y, notes=notes))
        panels.append(Panel("budget", place, "trials", label, curves, y_log=lower))
    return panels


def trial_value(trial: Run) -> float:
    """What a search selects by, or else the test value."""
    return trial.result.final if trial.result.validation is None else trial.result.validation


def _split(trials: Iterable[Run]) -> str:
    return "validation" if all(trial.result.validation is not None for trial in trials) else "test"


def _metric(trials: Sequence[Run]) -> str:
    return METRICS.get(trials[0].result.metric, trials[0].result.metric)


class Style(NamedTuple):
    name: str
    colour: str
    dashed: bool


def styles(panels: Sequence[Panel]) -> dict[str, Style]:
    others = cycle(OTHER_COLOURS)
    rows: dict[str, tuple[str, str]] = {}
    found = {}
    for method in dict.fromkeys(curve.method for panel in panels for curve in panel.curves):
        row, _, variant = method.partition(" #")
        if row not in rows:
            rows[row] = STYLES.get(row) or (row, next(others))
        name, colour = rows[row]
        found[method] = Style(f"{name} #{variant}" if variant else name, colour, bool(variant))
    return found
