"""Records: what a report needs of its runs, in one small JSON file to be committed.

It has each config and environment once, without keys that change no result (folders, workers, …). Trials have no
curves. docs/reproduction.md shows how a document takes a table from it.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from engine.errors import UserError
from engine.files import write_atomically
from engine.run_record import NEUTRAL_KEYS
from scripts.runs import EVALUATIONS, Result, Run, make_run
from scripts.tables import published

FORMAT = 1
MOST_POINTS = 250
CURVES = re.compile(r"update|epoch|wall_s|tokens|(train|test|valid)_\w+")
KINDS = ("results", "comparison", "searched", "rates")
# An indented mark is an example.
MARKED = re.compile(r"^(<!-- table (\S+) (\S+) -->\n).*?^(<!-- end of table -->)", re.DOTALL | re.MULTILINE)
OF_ONE_START = ("command", "started", "resumed_from")  # keys of an environment


class _RecordedRun(BaseModel):
    config: int
    environment: int
    seed: int
    trial: str | None
    recipe: dict[str, Any]
    result: Result
    curves: dict[str, list[int | float | None]] = {}


class _Record(BaseModel):
    format: int
    configs: list[dict[str, Any]]
    environments: list[dict[str, Any]]
    runs: list[_RecordedRun]


def write_record(path: Path, runs: Sequence[Run]) -> int:
    """Write the complete `runs` to `path`. Returns their number."""
    configs: list[str] = []
    environments: list[str] = []
    lines = []
    for run in runs:
        if not run.result:
            continue
        config = {key: value for key, value in run.config.items() if key != "seed"}
        environment = {key: value for key, value in run.environment.items() if key not in OF_ONE_START}
        entry = {
            "config": _position(configs, _without(config, NEUTRAL_KEYS)),
            "environment": _position(environments, environment),
            "seed": run.seed,
            "trial": run.trial,
            "recipe": run.recipe,
            "result": _result(run),
        }
        if not run.trial:
            entry["curves"] = _columns(run.evaluations)
        lines.append(_dump(entry))
    if not lines:
        raise UserError(f"{path}: nothing to record: no run is complete")
    parts = {"configs": configs, "environments": environments, "runs": lines}
    body = ",\n".join(f'"{name}": [\n' + ",\n".join(entries) + "\n]" for name, entries in parts.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f'{{"format": {FORMAT},\n{body}\n}}\n')
    return len(lines)


def read_record(path: Path) -> list[Run]:
    """Raises UserError if the file is no record."""
    try:
        record = _Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
        if record.format != FORMAT:
            raise UserError(f"{path}: a record of format {record.format}; this program reads format {FORMAT}")
        return [_run(path, record, entry) for entry in record.runs]
    except (OSError, ValueError, IndexError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path}: not a record that scripts.report wrote ({reason})") from None


def update_document(path: Path, render: Callable[[list[Run], str], str]) -> int:
    """Write the marked tables of a Markdown file anew. Returns their number."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    write_atomically(path, updated(path, text, render))
    return len(MARKED.findall(text))


def updated(path: Path, text: str, render: Callable[[list[Run], str], str]) -> str:
    """`text` with each marked table made anew by `render(runs, kind)`."""

    def table(match: re.Match) -> str:
        start, record, kind, end = match.groups()
        if kind not in KINDS:
            raise UserError(f"{path}: a table of kind '{kind}'; valid: {', '.join(KINDS)}")
        return f"{start}{render(read_record(path.parent / record), kind)}\n{end}"

    return MARKED.sub(table, text)


def flatten(values: dict[str, Any], ignore: Sequence[str] = (), prefix: str = "") -> dict[str, Any]:
    """Dotted key to value, without the keys in `ignore` and below."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if dotted in ignore:
            continue
        if isinstance(value, dict):
            flat |= flatten(value, ignore, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def _run(path: Path, record: _Record, entry: _RecordedRun) -> Run:
    lines = [
        {key: value for key, value in zip(entry.curves, values, strict=True) if value is not None}
        for values in zip(*entry.curves.values(), strict=True)
    ]
    return make_run(
        path,
        record.configs[entry.config] | {"seed": entry.seed},
        environment=record.environments[entry.environment],
        recipe=entry.recipe,
        result=entry.result,
        read_lines=lambda kinds: lines if kinds == EVALUATIONS else [],
        trial=entry.trial,
    )


def _without(values: dict[str, Any], keys: Sequence[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in values.items()
        if f"{prefix}{key}" not in keys
    }


def _position(entries: list[str], entry: dict[str, Any]) -> int:
    text = _dump(entry)
    if text not in entries:
        entries.append(text)
    return entries.index(text)


def _result(run: Run) -> dict[str, Any]:
    result = run.result
    kept = {*Result.model_fields, "signature", *published(run.table).get("also", {})}
    # The worst value may be infinite, which JSON lacks. Reading restores it.
    restored = {"final", "best", "validation"} if result.diverged else set()
    return result.model_dump(include=kept - restored, exclude_none=True)


def _columns(evaluations: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """At most `MOST_POINTS` of the evaluations, with the last one, in six digits."""
    step = -(-len(evaluations) // MOST_POINTS) or 1
    kept = evaluations[::-step][::-1]
    names = dict.fromkeys(name for line in kept for name in line if CURVES.fullmatch(name))
    return {name: [_rounded(line.get(name)) for line in kept] for name in names}


def _rounded(value: Any) -> float | None:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if isinstance(value, int) else None


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False, default=str)
