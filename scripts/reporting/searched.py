"""A table of optimizers that scripts/compare.sh has tuned: how to run each, and what it reached."""

import json
import shlex
from collections.abc import Sequence

import yaml

from engine.config import TAKEN_WHOLE
from engine.run_record import NEUTRAL_KEYS
from scripts.reporting.records import flatten
from scripts.reporting.statistics import spread
from scripts.runs import Run
from scripts.tables import CONFIGS, ROWS, TASKS, load_settings, position

ABOUT_SEARCHED = (
    "Mean (standard deviation, number of seeds) of the final test value, then the learning rate that the search chose, "
    "and the number of its trials. The command is that of the first task, in the setting that was chosen there."
)


def searched(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: each row with its command on the first table and its results on all."""
    complete = [run for run in runs if run.result]
    metrics = {run.table: run.result.metric for run in complete}
    tables = sorted(metrics, key=lambda table: position(table, tuple(TASKS)))
    lines = []
    for row in sorted({run.row for run in complete if not run.trial}, key=lambda row: position(row, ROWS)):
        of_row = [[run for run in complete if (run.row, run.table) == (row, table)] for table in tables]
        first = next(run for of_table in of_row for run in of_table if not run.trial)
        lines.append([row, f"`{command(first)}`".replace("|", r"\|"), *map(reached, of_row)])
    return ["optimizer", "command", *(f"{table} ({metrics[table]})" for table in tables)], lines


def reached(runs: Sequence[Run]) -> str:
    """A row's results on one table, for each schedule and setting; "-" if not tried."""
    texts = []
    for schedule, variant in dict.fromkeys((run.schedule, run.variant) for run in runs if not run.trial):
        finals = [run for run in runs if not run.trial and (run.schedule, run.variant) == (schedule, variant)]
        trials = [run for run in runs if run.trial and run.schedule == schedule]
        value, _, deviation = spread([run.result.final for run in finals]).partition(" (")
        seeds = f"{deviation.rstrip(')')}, {len(finals)}" if deviation else f"{len(finals)}"
        texts.append(f"{value} ({seeds}); {finals[0].rate:g} of {len(trials)}")
        if lost := sum(run.result.diverged for run in finals):
            texts[-1] += f"; {lost} of the seeds diverged"
    return " / ".join(texts) or "-"


def command(run: Run) -> str:
    """Trains as `run`, on top of its config in configs/comparison."""
    task, path = TASKS[run.table], CONFIGS / "comparison" / f"{run.table}.yaml"
    base = load_settings(task, path, (f"row={run.row}", "optimizer={name: sgd}")).model_dump(mode="json")
    given = {key: run.config[key] for key in TAKEN_WHOLE if run.config.get(key) != base.get(key)}
    ours, theirs = (flatten(config, (*NEUTRAL_KEYS, *TAKEN_WHOLE, "seed")) for config in (run.config, base))
    given |= {key: value for key, value in ours.items() if key in theirs and value != theirs[key]}
    words = [f"{key}={_on_one_line(value)}" for key, value in given.items()]
    return f"python -m {task}.train {path} row={run.row} {shlex.join(words)}"


def _on_one_line(value: object) -> str:
    if isinstance(value, (dict, list)):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()
    return value if isinstance(value, str) else json.dumps(value)
