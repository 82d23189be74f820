"""The tables of a report: means of cells, intervals and costs, a published training log, the trials of a search.

A cell is the mean (sample standard deviation) over its complete runs. Different settings are listed separately.
Unfinished runs are listed but not counted.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import NamedTuple

from scripts.reporting.page import Table
from scripts.reporting.rates import ABOUT_RATES, rates
from scripts.reporting.recipes import (
    apart,
    changes_between,
    changes_to_recipe,
    first_published_cells,
    published_cells,
    sources,
)
from scripts.reporting.searched import ABOUT_SEARCHED, searched
from scripts.reporting.statistics import interval, spread, welch
from scripts.runs import Run, author_log, by_table
from scripts.tables import ROWS, SCHEDULES, position, published
from scripts.text_table import duration, format_table

MOST_CHANGES = 8  # that a note names
TEST = "apollo − row"  # Welch's test
ABOUT_WELCH = (
    f"{TEST}: difference of the final means with its 95 % interval, and the p-value of Welch's t-test (number of "
    "runs on both sides), not corrected for the number of rows. A few seeds prove little: with 3 on each side only a "
    "difference of several standard deviations can be told from chance."
)


class Cell(NamedTuple):
    row: str
    schedule: str
    variant: int = 1  # as of a Run

    @property
    def label(self) -> str:
        return self.row if self.variant == 1 else f"{self.row} #{self.variant}"

    @property
    def position(self) -> tuple:
        return position(self.row, ROWS), position(self.schedule, SCHEDULES), self.variant


def report(table: str, runs: Sequence[Run], expected: Iterable[tuple[str, str]] = (), markdown: bool = False) -> str:
    """The table, with a line for each `expected` cell, and notes."""
    shown, facts = results(table, by_cell(runs), expected, markdown), published(table)
    title = f"{table}: {shown.title}" + (f"; published: over {facts['runs']} runs" if facts else "")
    text, notes = format_table(shown.header, shown.lines, markdown), shown.notes
    if markdown:
        title, notes = f"{title}\n", [f"- {note}" for note in notes]
    return "\n".join([title, *text, *([""] if notes else []), *notes])


def comparison(runs: Sequence[Run], markdown: bool = False) -> str:
    """The second table: intervals, Apollo against every row (ABOUT_WELCH), costs."""
    shown = comparisons(by_cell(runs))
    return "\n".join(format_table(shown.header, shown.lines, markdown))


def log_table(table: str, runs: Sequence[Run], markdown: bool = False) -> str | None:
    log = of_author(table, runs)
    if log is None:
        return None
    lines = format_table(log.header, log.lines, markdown)
    return "\n".join([f"{table}: {log.title}", *([""] if markdown else []), *lines, "", *log.notes])


def render(runs: Sequence[Run], kind: str) -> str:
    """Tables of a kind (records.KINDS) as Markdown."""
    runs = apart(runs)
    if kind == "searched":
        return "\n".join([*format_table(*searched(runs), markdown=True), "", ABOUT_SEARCHED])
    if kind == "rates":
        return "\n".join([*format_table(*rates(runs), markdown=True), "", ABOUT_RATES])
    if kind == "results":
        return "\n\n".join(report(table, of_table, markdown=True) for table, of_table in by_table(runs).items())
    compared = [f"{table}:\n\n{comparison(of_table, markdown=True)}" for table, of_table in by_table(runs).items()]
    return "\n\n".join([*compared, ABOUT_WELCH] if any(TEST in text for text in compared) else compared)


def page_tables(runs: Sequence[Run]) -> dict[str, list[Table]]:
    tables = {}
    for table, of_table in by_table(runs).items():
        groups = by_cell(of_table)
        means, log = results(table, groups, first_published_cells(table)), of_author(table, of_table)
        parts = (means, comparisons(groups), trials(of_table), log)
        tables[table] = [part for part in parts if part and part.lines]
    return tables


def results(
    table: str, groups: dict[Cell, list[Run]], expected: Iterable[tuple[str, str]] = (), markdown: bool = False
) -> Table:
    """A table's means, in Markdown with published values in italics.

    For averaged weights `final` is the average's score, and `unaveraged` that of the last weights.
    """
    facts, targets = published(table), published_cells(table)
    also = facts.get("also", {})
    averages = any(_scores(runs, "final_unaveraged") for runs in groups.values())
    header = ["row", "schedule", "final", *(["unaveraged"] if averages else []), "best", "n"]
    header += ["published", "difference", *also.values()] if facts else []
    lines = []
    for cell in sorted({*(Cell(*pair) for pair in expected), *_with_line(groups)}, key=lambda cell: cell.position):
        complete = [run for run in groups.get(cell, ()) if run.result]
        finals = _scores(complete, "final")
        line = [cell.label, cell.schedule, spread(finals)]
        line += [spread(_scores(complete, "final_unaveraged"))] if averages else []
        line += [spread(_scores(complete, "best")), str(len(complete))]
        if facts:
            target = targets.get((cell.row, cell.schedule))
            value = f"{target[0]:.2f} ({target[1]:.2f})" if target else ""
            line.append(f"*{value}*" if value and markdown else value)
            line.append(f"{mean(finals) - target[0]:+.2f}" if target and finals else "")
            line += [spread(_scores(complete, name)) for name in also]
        lines.append(line)
    title = f"{facts['metric_in_words']}, mean (std) over n seeds" if facts else "mean (std) over n seeds"
    notes = sources(table, [(line[0], line[1]) for line in lines])
    notes += [note for of_cell in groups.values() for note in _notes(of_cell, groups)]
    return Table(title, header, lines, notes)


def comparisons(groups: dict[Cell, list[Run]]) -> Table:
    """The second table (see `comparison`), without empty columns."""
    header = ["row", "schedule", "95 % interval", TEST, "p (n)", "time a run", "memory", "optimizer's share"]
    lines = []
    for cell in sorted(_with_line(groups), key=lambda cell: cell.position):
        complete = [run for run in groups[cell] if run.result]
        finals = _scores(complete, "final")
        usual = Cell("apollo", cell.schedule)
        apollo = _scores(groups.get(usual, ()), "final")
        ends = interval(finals)
        test = None if cell == usual else welch(apollo, finals)
        lines.append(
            [
                cell.label,
                cell.schedule,
                f"{ends[0]:.2f} to {ends[1]:.2f}" if ends else "",
                f"{test.mean:+.2f} ({test.low:+.2f} to {test.high:+.2f})" if test else "",
                f"{test.p:.2g} ({len(apollo)}, {len(finals)})" if test else "",
                _of_all(complete, lambda run: run.result.wall_s, duration),
                _of_all(complete, lambda run: run.result.peak_memory_mb, "{:,.0f} MiB".format),
                _of_all(complete, optimizer_share, lambda share: f"{100 * share:.1f} %"),
            ]
        )
    kept = [place for place in range(len(header)) if any(line[place] for line in lines)]
    header = [header[place] for place in kept]
    notes = [ABOUT_WELCH] if TEST in header else []
    return Table("Intervals, tests and costs", header, [[line[place] for place in kept] for line in lines], notes)


def of_author(table: str, runs: Sequence[Run]) -> Table | None:
    """The author's training log, with two columns for each run of its cell, if any."""
    log, of_cell = author_log(table, runs)
    if not of_cell:
        return None
    updates = list(log["bits"])
    header = ["update", "published"]
    columns = [[f"{update:,}" for update in updates], [f"{bits:.2f}" for bits in log["bits"].values()]]
    for run in of_cell:
        header += [f"seed {run.seed}", "clipped"]
        losses = run.logged("loss", updates)
        columns.append(["" if math.isnan(nats) else f"{nats / math.log(2):.2f}" for nats in losses])
        columns.append(["" if math.isnan(share) else f"{share:.0%}" for share in run.logged("clipped", updates)])
    title = f"{log['row']} {log['schedule']}, training loss in bits per target token, share of clipped updates"
    lines = list(zip(*columns, strict=True))
    return Table(title, header, lines, [f"published: {log['source']}; {log['in_words']}"])


def trials(runs: Sequence[Run]) -> Table:
    lines = []
    for run in runs:
        if run.trial and run.result:
            settings = [f"{key}={value}" for key, value in run.config["optimizer"].items() if key not in ("name", "lr")]
            values = [] if run.result.diverged else [run.result.validation, run.result.final]
            texts = [f"{value:.2f}" if value is not None else "" for value in values] or ["diverged", ""]
            lines.append([run.row, run.trial, f"{run.rate:g}" if run.rate else "", *texts, " ".join(settings)])
    header = ["row", "trial", "lr", "validation", "test", "other settings"]
    return Table("Trials of the search", header, lines, folded=True)


def by_cell(runs: Sequence[Run]) -> dict[Cell, list[Run]]:
    groups: dict[Cell, list[Run]] = {}
    for run in apart(runs):
        if not run.trial:
            groups.setdefault(Cell(*run.cell, run.variant), []).append(run)
    return groups


def _with_line(groups: dict[Cell, list[Run]]) -> list[Cell]:
    """A further recipe has a line once one of its runs is complete."""
    return [cell for cell, runs in groups.items() if cell.variant == 1 or any(run.result for run in runs)]


def _scores(runs: Sequence[Run], name: str) -> list[float]:
    scores = (getattr(run.result, name, None) for run in runs if run.result)
    return [score for score in scores if isinstance(score, (int, float))]


def _of_all(runs: Sequence[Run], value: Callable[[Run], float | None], text: Callable[[float], str]) -> str:
    """The mean over the runs with the value, as text, if any."""
    values = [found for run in runs if (found := value(run)) is not None]
    return text(mean(values)) if values else ""


def optimizer_share(run: Run) -> float | None:
    """The optimizer's part of an update's time, 0 to 1; None if unknown, or above 1 through a slow step."""
    result, config = run.result, run.config
    if not result.optimizer_ms_per_step:
        return None
    if result.examples_per_s:
        update_s = config["batch"] * config["passes"] / result.examples_per_s
    elif result.tokens_per_s and "sequence_length" in config:
        update_s = config["batch"] * config["passes"] * config["sequence_length"] / result.tokens_per_s
    elif result.tokens_per_s and result.updates and run.evaluations and "tokens" in run.evaluations[-1]:
        update_s = run.evaluations[-1]["tokens"] / result.updates / result.tokens_per_s
    else:
        return None
    share = result.optimizer_ms_per_step / 1000 / update_s
    return share if share < 1 else None


def _notes(of_cell: Sequence[Run], groups: dict[Cell, list[Run]]) -> list[str]:
    notes, first = [], of_cell[0]
    cell = f"{first.label} {first.schedule}"
    complete = [run for run in of_cell if run.result]
    signatures = dict.fromkeys(run.result.model_extra.get("signature") for run in complete)
    notes += [f"{cell}, sacreBLEU: {signature}" for signature in signatures if signature]
    if complete and (changes := changes_to_recipe(first)):
        notes.append(f"{cell}, {_seeds(complete)}: not the published recipe: {_shortened(changes)}")
    elif complete and first.variant > 1:
        usual = groups[Cell(*first.cell)][0]
        changes = changes_between(first, usual)
        notes.append(f"{cell}, {_seeds(complete)}: another recipe than {usual.row}'s: {_shortened(changes)}")
    if diverged := [run for run in complete if run.result.diverged]:
        notes.append(f"{cell}, {_seeds(diverged)}: diverged, and counted with the worst value that there is")
    for run in of_cell:
        if not run.result:
            done = run.evaluations[-1][run.unit] if run.evaluations else 0
            notes.append(f"unfinished: {run.folder}, {run.unit} {done} of {run.config.get(f'{run.unit}s', '?')}")
    return notes


def _shortened(changes: Sequence[str]) -> str:
    more = f" and {len(changes) - MOST_CHANGES} more settings" if len(changes) > MOST_CHANGES else ""
    return ", ".join(changes[:MOST_CHANGES]) + more


def _seeds(runs: Sequence[Run]) -> str:
    return f"seed{'s' if len(runs) > 1 else ''} {' '.join(str(run.seed) for run in runs)}"
