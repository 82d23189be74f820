"""Curves of training and evaluation: one colour per method, one line of two panels per table and schedule.

One more line shows the updates of an author's training log, if published.
"""

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.errors import UserError
from scripts.reporting.pictures import curve_keys, evaluated, places
from scripts.reporting.style import LOOK, OTHER_COLOURS, STYLES
from scripts.runs import Run, author_log, by_table


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw `runs` to `path`: means over seeds, in bands from lowest to highest.

    Unfinished runs stand in for missing complete ones. Raises UserError for no curves or an unknown suffix.
    """
    drawn = {place: found for place, methods in places(runs).items() if (found := evaluated(methods))}
    if not drawn:
        raise UserError("nothing to draw: no run has been evaluated yet")

    found = {table: author_log(table, runs) for table in by_table(runs)}
    logs = {table: (log, of_log) for table, (log, of_log) in found.items() if of_log}
    with matplotlib.rc_context(LOOK | {"legend.frameon": False}):
        lines = len(drawn) + len(logs)
        figure = Figure(figsize=(11, 4.4 * lines), layout="constrained")
        grid = figure.subplots(lines, 2, squeeze=False)
        for axes, (table, (log, of_log)) in zip(grid[len(drawn) :], logs.items(), strict=True):
            _draw_log(axes, table, log, of_log)
        for axes, (place, methods) in zip(grid, drawn.items(), strict=False):
            first = next(iter(methods.values()))[0]
            keys = curve_keys(first)
            for axis, (key, label) in zip(axes, keys, strict=True):
                _draw(axis, methods, key)
                axis.set(xlabel=first.unit, ylabel=label)
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                axis.set_title(place, loc="left", fontsize=11)
            axes[0].set_yscale("log")
            if axes[0].lines:
                axes[0].legend(loc="upper right")
            _enlarge_end(axes[1], methods, keys[1][0])
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None


def _draw_log(axes: Sequence[Axes], table: str, log: dict[str, Any], of_log: Sequence[Run]) -> None:
    """The author's training loss beside ours; our share of clipped updates."""
    end = 1.1 * max(log["bits"])
    name, colour = STYLES[log["row"]]
    for number, run in enumerate(of_log):
        label = f"{name} (n = {len(of_log)})" if number == 0 else None
        lines = [line for line in run.training if line["update"] <= end and "clipped" in line]
        updates = [line["update"] for line in lines]
        axes[0].plot(updates, [line["loss"] / math.log(2) for line in lines], color=colour, label=label)
        axes[1].plot(updates, [100 * line["clipped"] for line in lines], color=colour)
    axes[0].plot(list(log["bits"]), list(log["bits"].values()), "kx", markersize=8, label="the author's log", zorder=3)
    axes[0].set(xlabel="update", ylabel="training loss (bits per target token)", xlim=(0, end))
    axes[1].set(xlabel="update", ylabel="clipped updates (%)", xlim=(0, end), ylim=(0, 100))
    axes[0].legend(loc="upper right")
    axes[0].set_title(f"{table}, {log['row']}: first updates", loc="left", fontsize=11)


def _draw(axis: Axes, methods: dict[str, list[Run]], key: str) -> None:
    others = cycle(OTHER_COLOURS)
    for method, runs in methods.items():
        name, colour = STYLES.get(method) or (method, next(others))
        positions, values = _curves(runs, key)
        if not len(values):
            continue
        unfinished = "" if runs[0].result else ", unfinished"
        label = f"{name} (n = {len(values)}{unfinished})"
        marker = "o" if len(positions) == 1 else None  # one point makes no visible line
        axis.plot(positions, values.mean(0), color=colour, linewidth=1.8, marker=marker, label=label, zorder=3)
        axis.fill_between(positions, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0, zorder=2)


def _enlarge_end(axis: Axes, methods: dict[str, list[Run]], key: str) -> None:
    """Enlarge the last third of a panel in the corner without curves."""
    curves = [found for runs in methods.values() if len((found := _curves(runs, key))[0])]
    if not curves:
        return
    last = max(positions[-1] for positions, _ in curves)
    ends = [values[:, positions >= last * 2 / 3] for positions, values in curves]
    ends = [values for values in ends if values.size]
    low, high = min(map(np.min, ends)), max(map(np.max, ends))
    if max(values.shape[1] for values in ends) < 2 or low == high:
        return
    room = 0.08 * (high - low)
    falls = sum(values[:, -1].mean() - values[:, 0].mean() for _, values in curves) < 0
    corner = (0.55, 0.55 if falls else 0.1, 0.42, 0.36)
    inset = axis.inset_axes(corner, xlim=(last * 2 / 3, last), ylim=(low - room, high + room))
    _draw(inset, methods, key)
    inset.spines[:].set(visible=True, color="#999999")
    inset.tick_params(labelsize=9, color="#999999")
    inset.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axis.indicate_inset_zoom(inset, edgecolor="#999999")


def _curves(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions [evaluations] and values [seeds, evaluations]."""
    found = [[line for line in run.evaluations if isinstance(line.get(key), (int, float))] for run in runs]
    steps = list(zip(*filter(None, found), strict=False))  # as long as the shortest
    positions = [step[0][runs[0].unit] for step in steps]
    return np.array(positions), np.array([[line[key] for line in step] for step in steps]).T
