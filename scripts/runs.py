"""Reads run folders as they are found: whole, unfinished, still being written, or damaged."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.config import Named
from scripts.tables import ROWS, SCHEDULES, position


class Identity(BaseModel):
    """What config.yaml must tell for a run to have a place in a table."""

    table: str
    row: str
    schedule: Named
    seed: int


class Result(BaseModel):
    """What a table takes from result.json; other scores of the run are among its further keys."""

    model_config = ConfigDict(allow_inf_nan=False, extra="allow")
    final: float
    best: float
    complete: bool


class Environment(BaseModel):
    """What a table takes from environment.json: the recipe as it was carried out (world size, per-rank batch, ...)."""

    recipe: dict[str, Any] = {}


@dataclass(frozen=True)
class Run:
    folder: Path
    table: str
    row: str
    schedule: str
    seed: int
    config: dict[str, Any]  # config.yaml: every key, resolved
    recipe: dict[str, Any]  # of environment.json
    result: Result | None  # None where the run is not complete
    evaluations: list[dict[str, Any]]  # the lines of metrics.jsonl that tell of one
    training: list[dict[str, Any]]  # its log lines of training, one every log_every updates

    @property
    def cell(self) -> tuple[str, str]:
        return self.row, self.schedule

    @property
    def unit(self) -> str:
        """What its length is given in, and its evaluations are counted by: epoch or update."""
        return "epoch" if "epochs" in self.config else "update"

    def logged(self, key: str, updates: Sequence[int]) -> list[float]:
        """The log lines' `key` at these updates, interpolated between two lines; NaN before the first and after the
        last of them."""
        lines = [line for line in self.training if isinstance(line.get(key), (int, float))]
        if not lines:
            return [nan] * len(updates)
        at, values = ([line[name] for line in lines] for name in ("update", key))
        return np.interp(updates, at, values, left=nan, right=nan).tolist()


def read_runs(*folders: Path) -> tuple[list[Run], list[str]]:
    """Every run at or below `folders`, in the order of the tables; and one line for each file that is damaged."""
    problems: list[str] = []
    found = (path.parent for folder in folders for path in folder.rglob("config.yaml"))
    runs = [run for folder in sorted(found) if (run := _read_run(folder, problems))]
    order = sorted(
        runs, key=lambda run: (run.table, position(run.row, ROWS), position(run.schedule, SCHEDULES), run.seed)
    )
    return order, problems


def _read_run(folder: Path, problems: list[str]) -> Run | None:
    """The run in `folder`, or None where its config.yaml does not say which run it is."""
    config = _read(folder / "config.yaml", problems)
    identity = _check(Identity, config, folder / "config.yaml", problems)
    if identity is None:
        return None
    result, environment = (
        _check(model, _read(folder / name, problems), folder / name, problems)
        for model, name in ((Result, "result.json"), (Environment, "environment.json"))
    )
    evaluations, training = read_metrics(folder / "metrics.jsonl", problems)
    return Run(
        folder,
        identity.table,
        identity.row,
        identity.schedule.name,
        identity.seed,
        config,
        recipe=environment.recipe if environment else {},
        result=result if result and result.complete else None,
        evaluations=evaluations,
        training=training,
    )


ModelT = TypeVar("ModelT", bound=BaseModel)


def _read(path: Path, problems: list[str]) -> Any:
    """The file's YAML or JSON; None where there is no such file, or where it cannot be read (a problem)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{path}: {' '.join(str(error).split())}")
        return None


def _check(model: type[ModelT], values: Any, path: Path, problems: list[str]) -> ModelT | None:
    """`values` as `model`; None where there are none, or where they do not fit (a problem)."""
    if values is None:
        return None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        problems.append(f"{path}: {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}")
        return None


def read_metrics(path: Path, problems: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of kind `epoch` or `validation`, and those of kind `train`.

    A last line without its end is being written, or a run died at it.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")
        return [], []
    evaluations, training, damaged = [], [], []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            values["epoch"] += 0  # both are numbers
            values["update"] += 0
            kinds = {"epoch": evaluations, "validation": evaluations, "train": training}
            kinds.get(values["kind"], []).append(values)
        except (ValueError, TypeError, KeyError):
            if line.endswith("\n"):
                damaged.append(number)
    if damaged:
        problems.append(f"{path}: line {damaged[0]} cannot be read ({len(damaged)} such lines); left out")
    return evaluations, training
