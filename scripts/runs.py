"""Reads run folders in any state: whole, unfinished, damaged, or not runs at all.

A trial of a search (scripts/compare.sh) is in <runs>/<table>/search/<row>/<trial>/, a run of a table anywhere else.
result.json has `validation`, the value on the split that a search selects by, and `final`, that on the test set. A run
with `"diverged": true` is complete, with the worst value of its metric.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from engine.config import Named, value_at
from engine.errors import one_line
from engine.run_record import NEUTRAL_KEYS
from scripts.tables import ROWS, SCHEDULES, position, published

# Keys that may differ within a cell; the last two change only the speed.
NOT_OF_THE_RECIPE = (*NEUTRAL_KEYS, "seed", "compile", "channels_last")
FILES = ("config.yaml", "result.json", "metrics.jsonl")  # a folder with one of these may be a run
EVALUATIONS = ("epoch", "validation")  # kinds of lines in metrics.jsonl
YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: ten times as fast


def lower_is_better(metric: str) -> bool:
    return metric in ("ppl", "loss", "nll")


def worst(metric: str) -> float:
    """Infinity for a perplexity or a loss, 0 for an accuracy or BLEU."""
    return math.inf if lower_is_better(metric) else 0.0


class Identity(BaseModel):
    table: str
    row: str
    schedule: Named
    seed: int


class Result(BaseModel):
    """Further keys, such as other scores, are kept."""

    model_config = ConfigDict(extra="allow")
    final: float
    best: float
    complete: bool
    diverged: bool = False
    validation: float | None = None
    final_unaveraged: float | None = None  # of the last weights, where `final` is that of an average
    metric: str = "top1"
    updates: int | None = None
    wall_s: float | None = None
    peak_memory_mb: float | None = None
    optimizer_ms_per_step: float | None = None
    examples_per_s: float | None = None
    tokens_per_s: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _worst_where_diverged(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("diverged"):
            return values | dict.fromkeys(("final", "best", "validation"), worst(values.get("metric", "top1")))
        return values

    @model_validator(mode="after")
    def _finite(self) -> "Result":
        values = [value for value in vars(self).values() if isinstance(value, float)]
        if not self.diverged and not all(map(math.isfinite, values)):
            raise ValueError("every number must be finite")
        return self


class Environment(BaseModel):
    """environment.json; `recipe` is what was carried out (world size, batch, passes, ...)."""

    model_config = ConfigDict(extra="allow")
    recipe: dict[str, Any] = {}


@dataclass(frozen=True)
class Run:
    folder: Path
    table: str
    row: str
    schedule: str
    seed: int
    config: dict[str, Any]  # config.yaml: every key, resolved
    environment: dict[str, Any]  # environment.json, without the recipe
    recipe: dict[str, Any]
    result: Result | None  # None for an incomplete run
    read_lines: Callable[[Sequence[str]], list[dict[str, Any]]] = field(repr=False)  # of metrics.jsonl, by kind
    trial: str | None = None  # its name in a search; None for a run of the table
    variant: int = 1  # above 1 where it does not follow the cell's first recipe

    @property
    def cell(self) -> tuple[str, str]:
        return self.row, self.schedule

    @property
    def label(self) -> str:
        return self.row if self.variant == 1 else f"{self.row} #{self.variant}"

    @property
    def unit(self) -> str:
        return "epoch" if "epochs" in self.config else "update"

    @property
    def rate(self) -> float | None:
        rate = value_at(self.config, "optimizer.lr")
        return rate if isinstance(rate, (int, float)) and rate > 0 else None

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return self.read_lines(EVALUATIONS)

    @cached_property
    def training(self) -> list[dict[str, Any]]:
        """A line each log_every updates; none in a record."""
        return self.read_lines(("train",))

    def logged(self, key: str, updates: Sequence[int]) -> list[float]:
        """`key` at `updates`, interpolated between log lines; NaN outside of them."""
        lines = [line for line in self.training if isinstance(line.get(key), (int, float))]
        if not lines:
            return [math.nan] * len(updates)
        at, values = ([line[name] for line in lines] for name in ("update", key))
        return np.interp(updates, at, values, left=math.nan, right=math.nan).tolist()


def read_runs(*folders: Path) -> tuple[list[Run], list[str]]:
    """Every run at or below `folders`, in the tables' order; and a line for each unusable file, some added later."""
    problems: list[str] = []
    walked = (place for top in folders for place in os.walk(top))
    found = sorted({Path(folder) for folder, _, names in walked if not set(FILES).isdisjoint(names)})
    runs = [run for folder in found if (run := _read_run(folder, problems))]
    return sorted(runs, key=order), problems


def order(run: Run) -> tuple:
    place = position(run.row, ROWS), position(run.schedule, SCHEDULES)
    return run.table, *place, run.trial or "", run.seed, str(run.folder)


def by_table(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {table: [run for run in runs if run.table == table] for table in dict.fromkeys(run.table for run in runs)}


def author_log(table: str, runs: Sequence[Run]) -> tuple[dict[str, Any], list[Run]]:
    """The author's training log, and the `runs` of its cell; both empty without one."""
    log = published(table).get("log_of_author", {})
    place = (table, log.get("row"), log.get("schedule"))
    return log, [run for run in runs if (run.table, *run.cell) == place and not run.trial and run.training]


def _read_run(folder: Path, problems: list[str]) -> Run | None:
    """None if config.yaml does not say which run it is."""
    config = _read(folder / "config.yaml", problems)
    if config is None:
        if not (folder / "config.yaml").exists():
            problems.append(f"{folder}: no config.yaml: not a run, or cut off before it began")
        return None
    if _check(Identity, config, folder / "config.yaml", problems) is None:
        return None
    result, environment = (
        _check(model, _read(folder / name, problems), folder / name, problems)
        for model, name in ((Result, "result.json"), (Environment, "environment.json"))
    )
    place = folder.absolute()
    return make_run(
        folder,
        config,
        environment=environment.model_dump(exclude={"recipe"}) if environment else {},
        recipe=environment.recipe if environment else {},
        result=result if result and result.complete else None,
        read_lines=partial(read_metrics, folder / "metrics.jsonl", problems),
        trial=place.name if place.parent.parent.name == "search" else None,
    )


def make_run(folder: Path, config: dict[str, Any], **rest: Any) -> Run:
    """Raises ValidationError if `config` lacks its identity."""
    identity = Identity.model_validate(config)
    return Run(folder, identity.table, identity.row, identity.schedule.name, identity.seed, config, **rest)


ModelT = TypeVar("ModelT", bound=BaseModel)


def _read(path: Path, problems: list[str]) -> Any:
    """None for a missing file, or one that cannot be read (a problem)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = yaml.load(text, Loader=YamlLoader) if path.suffix == ".yaml" else json.loads(text)
        return {} if values is None else values
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        problems.append(f"{path}: {one_line(error)}")
        return None


def _check(model: type[ModelT], values: Any, path: Path, problems: list[str]) -> ModelT | None:
    """`values` as `model`; None if they are None, or do not fit (a problem)."""
    if values is None:
        return None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        problems.append(f"{path}: {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}")
        return None


def read_metrics(path: Path, problems: list[str], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """The last line may be unfinished."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return []
    found, damaged = [], []
    for number, line in enumerate(lines, start=1):
        if "train" not in kinds and line.startswith('{"kind": "train"') and line.endswith("}\n"):
            continue  # parsing these would take most of the time
        try:
            values = json.loads(line)
            if values["kind"] in kinds:
                values["epoch"] += 0  # both are numbers
                values["update"] += 0
                found.append(values)
        except (ValueError, TypeError, KeyError, RecursionError):
            if line.endswith("\n"):
                damaged.append(number)
    if damaged:
        problems.append(f"{path}: line {damaged[0]} cannot be read ({len(damaged)} such lines); left out")
    return found
