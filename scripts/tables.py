"""The paper's tables: tasks, configs of cells, and what was published."""

import re
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from engine.config import RunConfig, load_config

CONFIGS = Path("configs")  # commands run from the repository's root
TASKS = {
    "cifar10": "classification",
    "imagenet": "classification",
    "one_billion_words": "language_model",
    "wmt14_en_de": "nmt",
    # of scripts/quickstart.sh
    "digits": "classification",
    "pydoc_topics": "language_model",
    "grammar": "nmt",
    # beside the LSTMs
    "pydoc_topics_transformer": "language_model",
    "news_transformer": "language_model",
}
# In the order of the published tables.
ROWS = tuple("sgd sgd_2021 adam radam adam_adj radam_adj adabelief adahessian apollo apollo_2021 apollow".split())
SCHEDULES = ("milestone", "cosine", "inverse_sqrt", "linear", "wsd")  # as files are named after them


def load_settings(task: str, config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config as the task's train.py resolves it. Raises ConfigError."""
    return load_config(import_module(f"{task}.config").Config, config, overrides)


def is_same_update(task: str, one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configs make the same updates, perhaps in other passes."""
    return update_of(task, one) == update_of(task, other)


def update_of(task: str, config: dict[str, Any]) -> tuple[Any, ...]:
    """What defines an update, however divided into passes.

    Rows of text are independent; images share BatchNorm's statistics, and sentences a batch of similar lengths.
    """
    batch, passes = config.get("batch"), config.get("passes")
    if not (isinstance(batch, int) and isinstance(passes, int)):
        return (None,)
    seen = {"language_model": None, "classification": config.get("batchnorm_group") or batch}
    return batch * passes, seen.get(task, batch)


def rows(table: str) -> list[str]:
    stems = {path.stem for path in (CONFIGS / table).glob("*.yaml")} - {"base", "published"}
    found = {re.sub(f"_({'|'.join(SCHEDULES)})$", "", stem) for stem in stems}
    return sorted(found, key=lambda row: position(row, ROWS))


def cells(table: str, row: str) -> dict[str, Path]:
    """Schedule to config: `<row>_<schedule>.yaml`, or `<row>.yaml` alone."""
    alone = CONFIGS / table / f"{row}.yaml"
    if alone.exists():
        return {load_settings(TASKS[table], alone).schedule.name: alone}
    paths = {schedule: CONFIGS / table / f"{row}_{schedule}.yaml" for schedule in SCHEDULES}
    return {schedule: path for schedule, path in paths.items() if path.exists()}


@cache
def published(table: str) -> dict[str, Any]:
    """What the authors published, if anything."""
    path = CONFIGS / table / "published.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8-sig")) if path.exists() else {}


def later_rows(table: str) -> set[str]:
    facts = published(table)
    return set(facts.get("later", {}).get("cells", {})) - set(facts.get("cells", {}))


def seeds_of(table: str) -> list[int]:
    return published(table).get("seeds", [1])


def position(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    """A sorting key: names in `order` come first."""
    return (order.index(name) if name in order else len(order), name)
