"""Writes each picture as PNG, SVG and PDF, and its numbers as CSV."""

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from textwrap import wrap

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from engine.errors import UserError
from scripts.reporting.pictures import ABOUT, TITLES, Curve, Panel, Style, styles
from scripts.reporting.style import LOOK

# Without dates the same numbers give the same file.
FORMATS = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
SVG = {
    "svg.fonttype": "none",  # letters stay letters
    "svg.hashsalt": "apollo",  # part names are not random
}


def draw_all(panels: Sequence[Panel], folder: Path) -> None:
    """Raises UserError if `folder` cannot be written to."""
    look = styles(panels)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for panel in panels:
            (folder / f"{panel.name}.csv").write_text(panel.csv(), encoding="utf-8")
        for (place, picture), group in groupby(panels, key=lambda panel: (panel.place, panel.picture)):
            name = f"{place.replace(', ', '_').replace(' ', '-')}_{picture}"
            with matplotlib.rc_context(LOOK | SVG):
                figure = draw(list(group), look)
                for suffix, undated in FORMATS.items():
                    figure.savefig(folder / f"{name}.{suffix}", dpi=150, metadata=undated)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror})") from None


def draw(panels: Sequence[Panel], look: dict[str, Style]) -> Figure:
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    width = 5.6 * columns if columns > 1 else 7.5
    figure = Figure(figsize=(width, 4.2 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        _draw_panel(axes, panel, look)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    shown = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside right upper", frameon=False)
    figure.suptitle(f"{panels[0].place}: {TITLES[panels[0].picture].lower()}", x=0.01, ha="left", fontsize=11)
    about = wrap(ABOUT[panels[0].picture], int(15 * width))
    figure.supxlabel("\n".join(about), fontsize=8, color="#666666")
    return figure


def _draw_panel(axes: Axes, panel: Panel, look: dict[str, Style]) -> None:
    for curve in panel.curves:
        _draw_curve(axes, curve, panel.picture, look[curve.method])
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.x_log:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        axes.axvline(1, color="#999999", linewidth=0.8, zorder=1)
    if panel.y_log:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)


def _plain_numbers(axis: Axis) -> None:
    """200 instead of 2 × 10² on a logarithmic axis; with less than two decades also numbers between."""
    low, high = axis.get_view_interval()
    between = high / low < 100
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if between:
        axis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axis.set_minor_formatter(StrMethodFormatter("{x:g}") if between else NullFormatter())


def _draw_curve(axes: Axes, curve: Curve, picture: str, style: Style) -> None:
    y, colour, rises_in_steps = _with_nan(curve.y), style.colour, picture == "levels"
    if curve.points:
        axes.plot(curve.x, y, "o", color=colour, markerfacecolor="none")
    else:
        few = len(curve.x) <= 15 and picture in ("sensitivity", "budget")
        axes.plot(
            curve.x,
            y,
            "--" if style.dashed else "-",
            color=colour,
            linewidth=1.8,
            marker="o" if few or len(curve.x) == 1 else None,
            markersize=4,
            drawstyle="steps-pre" if rises_in_steps else "default",
            label=style.name,
            zorder=3,
        )
    if curve.low:
        ends = _with_nan(curve.low), _with_nan(curve.high)
        step = "pre" if rises_in_steps else None
        axes.fill_between(curve.x, *ends, color=colour, alpha=0.18, linewidth=0, step=step, zorder=2)
    for x, at in curve.crosses:
        axes.plot(x, at, "x", color=colour, markeredgewidth=2, zorder=4)


def _with_nan(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
