"""Training loss and test accuracy by epoch: one colour a method, one line of panels a table and schedule."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
            axes[0].legend(loc="upper right")
            _enlarge_end(axes[1], rows, PANELS[1][0])
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(path, dpi=150)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None


def _draw(axis: Axes, rows: dict[str, list[Run]], key: str) -> None:
    """The curves of one panel: `key` of the epochs of each row's runs."""
    others = iter(OTHER_COLOURS * len(rows))
    for row, runs in rows.items():
        name, colour = STYLES.get(row) or (row, next(others))
        values = _curves(runs, key)
        epochs = np.arange(1, values.shape[1] + 1)
        unfinished = "" if any(run.result for run in runs) else ", unfinished"
        label = f"{name} (n = {len(values)}{unfinished})"
        axis.plot(epochs, values.mean(0), color=colour, linewidth=1.8, label=label, zorder=3)
        axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0, zorder=2)


def _enlarge_end(axis: Axes, rows: dict[str, list[Run]], key: str) -> None:
    """Draw the last third of an accuracy panel once more, enlarged, in the corner that such curves leave free."""
    curves = [_curves(runs, key) for runs in rows.values()]
    last = max(values.shape[1] for values in curves)
    first = max(1, round(last * 2 / 3))
    ends = [values[:, first - 1 :] for values in curves if values.shape[1] >= first]
    low, high = min(map(np.min, ends)), max(map(np.max, ends))
    if first == last or low == high:
        return
    room = 0.08 * (high - low)
    inset = axis.inset_axes((0.55, 0.1, 0.42, 0.36), xlim=(first, last), ylim=(low - room, high + room))
    _draw(inset, rows, key)
    inset.spines[:].set(visible=True, color="#999999")
    inset.tick_params(labelsize=9, color="#999999")
    inset.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axis.indicate_inset_zoom(inset, edgecolor="#999999")


def _curves(runs: Sequence[Run], key: str) -> np.ndarray:
    """[seeds, epochs] of the complete runs, or of all where none is complete, as far as all of them have come."""
    complete = [run for run in runs if run.result]
    curves = [[epoch[key] for epoch in run.epochs if key in epoch] for run in complete or runs]
    length = min(map(len, curves))
    return np.array([curve[:length] for curve in curves])
