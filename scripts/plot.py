"""Training loss and test accuracy by epoch: one colour a method, one line of panels a table and schedule."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.errors import UserError
from scripts.runs import Run

# The palette of Okabe and Ito, told apart with every kind of colour vision.
STYLES = {
    "sgd": ("SGD", "#0072B2"),
    "adam": ("Adam", "#E69F00"),
    "radam": ("RAdam", "#009E73"),
    "adam_adj": ("Adam-adj", "#CC79A7"),
    "radam_adj": ("RAdam-adj", "#56B4E9"),
    "apollo": ("Apollo", "#D55E00"),
}
OTHER_COLOURS = ("#000000", "#8C6D31", "#7F7F7F", "#6A3D9A")
PANELS = (("train_loss", "training loss"), ("test_top1", "test accuracy (%)"))


def plot_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw `runs` to `path`, in the format that its suffix names: lines are means over seeds, bands lowest to highest.

    Unfinished runs are drawn where a cell has no complete one. Raises UserError where there is nothing to draw, or no
    such format.
    """
    lines: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in runs:
        if run.epochs:
            lines.setdefault((run.table, run.schedule), {}).setdefault(run.row, []).append(run)
    if not lines:
        raise UserError("nothing to draw: no run has completed an epoch")

    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with matplotlib.rc_context(style | {"grid.color": "#E5E5E5", "grid.linewidth": 0.8, "legend.frameon": False}):
        figure = Figure(figsize=(11, 4.4 * len(lines)), layout="constrained")
        for axes, (place, rows) in zip(figure.subplots(len(lines), 2, squeeze=False), lines.items(), strict=True):
            for axis, (key, label) in zip(axes, PANELS, strict=True):
                _draw(axis, rows, key)
                axis.set(xlabel="epoch", ylabel=label)
                axis.set_title(f"{place[0]}, {place[1]} schedule", loc="left", fontsize=11)
            axes[0].set_yscale("log")
            axes[1].legend(loc="lower right")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None


def _draw(axis: Axes, rows: dict[str, list[Run]], key: str) -> None:
    """The curves of one panel: `key` of the epochs of each row's runs."""
    others = iter(OTHER_COLOURS * len(rows))
    ends = []  # where the curves run in their last two fifths
    for row, runs in rows.items():
        name, colour = STYLES.get(row) or (row, next(others))
        complete = [run for run in runs if run.result]
        curves = [[epoch[key] for epoch in run.epochs if key in epoch] for run in complete or runs]
        length = min(map(len, curves))
        values = np.array([curve[:length] for curve in curves])
        epochs = np.arange(1, length + 1)
        label = f"{name} (n = {len(values)}{'' if complete else ', unfinished'})"
        axis.plot(epochs, values.mean(0), color=colour, linewidth=1.8, label=label, zorder=3)
        axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0, zorder=2)
        ends.append(values[:, length * 3 // 5 :])
    if key == "test_top1":  # room for the differences at the end, which the first epochs would squeeze out of sight
        low, high = min(map(np.min, ends)), max(map(np.max, ends))
        room = max(high - low, 0.5)
        axis.set_ylim(low - 1.5 * room, high + 0.1 * room)
