"""Finds a run's recipe, and its differences from the published one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from engine.config import differences, value_at
from scripts.reporting.records import flatten
from scripts.runs import NOT_OF_THE_RECIPE, Run, order
from scripts.tables import TASKS, cells, is_same_update, later_rows, load_settings, published, update_of

DIVISION = ("batch", "passes", "batchnorm_group")  # may differ for the same update


def apart(runs: Sequence[Run]) -> list[Run]:
    """`runs`, with a `variant` above 1 for those that do not follow their cell's first recipe.

    This is the published one, or else that of most complete runs.
    """
    settings: dict[tuple, dict[tuple, list[Run]]] = {}
    for run in runs:
        if not run.trial:
            ours = flatten(run.config, (*NOT_OF_THE_RECIPE, *DIVISION))
            given = ((key, repr(value)) for key, value in ours.items() if value is not None)  # a newer key is unset
            of_run = (update_of(TASKS.get(run.table, ""), run.config), *given)
            settings.setdefault((run.table, *run.cell), {}).setdefault(of_run, []).append(run)
    variants = {}
    for of_cell in settings.values():
        groups = [group for same in of_cell.values() for group in _by_batchnorm_batch(same)]
        if len(groups) > 1:
            groups.sort(key=_precedence)
        variants |= {id(run): number for number, group in enumerate(groups, start=1) for run in group}
    # Unchanged runs keep what they have read of metrics.jsonl.
    return [run if variants.get(id(run), 1) == run.variant else replace(run, variant=variants[id(run)]) for run in runs]


def _precedence(group: Sequence[Run]) -> tuple:
    complete = sum(run.result is not None for run in group)
    return bool(changes_to_recipe(group[0])), -complete, -len(group), order(group[0])


def _by_batchnorm_batch(runs: Sequence[Run]) -> Iterable[list[Run]]:
    batches = [run.recipe.get("batchnorm_batch") for run in runs]
    usual = Counter(batch for batch in batches if batch).most_common(1)
    groups: dict[Any, list[Run]] = {}
    for run, batch in zip(runs, batches, strict=True):
        groups.setdefault(batch or (usual[0][0] if usual else None), []).append(run)
    return groups.values()


def published_cells(table: str) -> dict[tuple[str, str], list[float]]:
    """(row, schedule) to [mean, std], from the first table that has the cell."""
    return _later_cells(table) | _by_cell(published(table).get("cells", {}))


def first_published_cells(table: str) -> list[tuple[str, str]]:
    return [cell for cell in published_cells(table) if cell[0] not in later_rows(table)]


def sources(table: str, shown: Iterable[tuple[str, str]]) -> list[str]:
    """A sentence on the published table of each cell in `shown`, if the later table has any."""
    shown = set(shown)
    later = {cell: value for cell, value in _later_cells(table).items() if cell in shown}
    if not later:
        return []
    first, second = published(table)["source"], published(table)["later"]["source"]
    added = dict.fromkeys(row for row, _ in later if row in later_rows(table))
    changed = [
        f"{row} {schedule} to {mean:.2f} ({std:.2f})"
        for (row, schedule), (mean, std) in later.items()
        if row not in added
    ]
    text = f"published: {first}"
    text += f"; for {', '.join(added)}: {second}" if added else ""
    text += f"; {'it' if added else second + ','} changed {', '.join(changed)}" if changed else ""
    return [text]


def _later_cells(table: str) -> dict[tuple[str, str], list[float]]:
    return _by_cell(published(table).get("later", {}).get("cells", {}))


def _by_cell(rows: dict[str, dict[str, list[float]]]) -> dict[tuple[str, str], list[float]]:
    return {(row, schedule): value for row, values in rows.items() for schedule, value in values.items()}


@cache
def _published_recipe(table: str, row: str, schedule: str) -> dict[str, Any]:
    return load_settings(TASKS[table], cells(table, row)[schedule]).model_dump(mode="json")


def changes_to_recipe(run: Run) -> list[str]:
    """`key=value` for each setting that differs from the published cell, if any."""
    if run.cell not in published_cells(run.table):
        return []
    batch = published(run.table).get("batchnorm_batch") or run.recipe.get("batchnorm_batch")
    return _changes(run, _published_recipe(run.table, *run.cell), batch)


def changes_between(run: Run, usual: Run) -> list[str]:
    return _changes(run, usual.config, usual.recipe.get("batchnorm_batch"))


def _changes(run: Run, config: dict[str, Any], batchnorm_batch: int | None) -> list[str]:
    division = DIVISION if is_same_update(TASKS.get(run.table, ""), run.config, config) else ()
    keys = differences(run.config, config, (*NOT_OF_THE_RECIPE, *division))
    values = {key: value_at(run.config, key) for key in keys}
    if (batch := run.recipe.get("batchnorm_batch")) and batch != batchnorm_batch:
        values["batchnorm_batch"] = batch
    return [f"{key}={'unset' if value is None else value}" for key, value in values.items()]
