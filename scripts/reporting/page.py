"""Writes the report as one HTML page that needs no network: it includes plotly.js (4 MB).

It has sortable tables, interactive pictures and the cells' settings.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import UserError
from engine.files import write_atomically
from engine.run_record import NEUTRAL_KEYS
from scripts.reporting.pictures import ABOUT, TITLES, Panel, styles
from scripts.reporting.records import OF_ONE_START, flatten
from scripts.runs import Run

TEMPLATE = Path(__file__).with_name("page.html")
NOT_MEASURED = ("published",)  # columns marked as not measured


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    folded: bool = False


def write_page(
    path: Path,
    tables: dict[str, list[Table]],
    panels: Sequence[Panel],
    runs: Sequence[Run],
    problems: Sequence[str],
) -> None:
    """`tables` are by table of the paper. Raises UserError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("--html needs the plotly package: pip install plotly") from None
    sections = []
    for table, of_table in tables.items():
        numbers = [number for number, panel in enumerate(panels) if f"{panel.place}, ".startswith(f"{table}, ")]
        figures = "".join(f'<figure data-panel="{number}"></figure>' for number in numbers)
        cells = _settings([run for run in runs if run.table == table and not run.trial])
        written = "".join(_titled(part) for part in of_table if not part.folded)
        folded = "".join(_folded(part.title, _table(part)) for part in of_table if part.folded)
        body = f"{written}<div class=panels>{figures}</div>{folded}{cells}"
        sections.append(f'<section id="{escape(table)}"><h2>{escape(table)}</h2>{body}</section>')
    if problems:
        lines = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
        sections.append(f"<section><h2>Skipped</h2><ul>{lines}</ul></section>")
    data = {
        "panels": [asdict(panel) | {"name": panel.name} for panel in panels],
        "styles": {method: style._asdict() for method, style in styles(panels).items()},
        "about": ABOUT,
        "titles": TITLES,
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "title": escape(", ".join(tables)),
        "links": "".join(f'<a href="#{escape(table)}">{escape(table)}</a>' for table in tables),
        "sections": "".join(sections),
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
        "plotly": get_plotlyjs(),
    }
    for name, part in parts.items():
        text = text.replace(f"[[{name}]]", part, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _titled(table: Table) -> str:
    return f"<h3>{escape(table.title)}</h3>{_table(table)}"


def _table(table: Table) -> str:
    head = _row("th", table.header, table.header)
    body = "".join(_row("td", line, table.header) for line in table.lines)
    notes = "".join(f"<p class=note>{escape(note)}</p>" for note in table.notes)
    return f"<div class=wide><table class=sortable><thead>{head}</thead><tbody>{body}</tbody></table></div>{notes}"


def _row(tag: str, texts: Sequence[str], header: Sequence[str]) -> str:
    marks = (' class="published"' if name in NOT_MEASURED else "" for name in header)
    cells = (f"<{tag}{mark}>{escape(text)}</{tag}>" for mark, text in zip(marks, texts, strict=True))
    return f"<tr>{''.join(cells)}</tr>"


def _settings(runs: Sequence[Run]) -> str:
    """Settings and machines of the cells, keys that differ first."""
    cells: dict[str, list[Run]] = {}
    for run in runs:
        cells.setdefault(f"{run.label} {run.schedule}", []).append(run)
    found = {
        "Settings": lambda run: flatten(run.config, ignore=("seed", *NEUTRAL_KEYS)),
        "Environment": lambda run: flatten(run.recipe) | flatten(run.environment, ignore=OF_ONE_START),
    }
    return "".join(_differences(title, cells, values) for title, values in found.items()) if cells else ""


def _differences(title: str, cells: dict[str, list[Run]], values: Callable[[Run], dict[str, Any]]) -> str:
    columns: dict[str, dict[str, str]] = {}
    for cell, runs in cells.items():
        texts: dict[str, list[str]] = {}
        for run in runs:
            for key, value in values(run).items():
                texts.setdefault(key, []).append(str(value))
        columns[cell] = {key: " | ".join(dict.fromkeys(found)) for key, found in texts.items()}
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    rows = {key: [column.get(key, "") for column in columns.values()] for key in keys}
    differ = [[key, *row] for key, row in rows.items() if len(set(row)) > 1]
    common = [[key, row[0]] for key, row in rows.items() if len(set(row)) == 1]
    parts = [Table("by cell", ["key", *columns], differ), Table("the same in all cells", ["key", "value"], common)]
    body = "".join(_titled(part) for part in parts if part.lines)
    return _folded(title, body)
