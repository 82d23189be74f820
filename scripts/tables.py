"""The tables of the paper: which task trains a table's cells, where the cells stand, and what was published."""

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from engine.config import load_config

CONFIGS = Path("configs")  # commands run from the repository's root
TASKS = {"cifar10": "classification", "imagenet": "classification", "digits": "classification"}
ROWS = ("sgd", "adam", "radam", "adam_adj", "radam_adj", "apollo")  # in the order of the published tables
SCHEDULES = ("milestone", "cosine")


def train_module(table: str) -> str:
    """The module whose command trains `table`."""
    return f"{TASKS[table]}.train"


def load_cell(table: str, config: Path, overrides: tuple[str, ...] = ()) -> BaseModel:
    """The config at `config`, resolved and checked as its task's train.py does it. Raises ConfigError."""
    return load_config(import_module(train_module(table)).Config, config, overrides)


def cell_path(table: str, row: str, schedule: str) -> Path:
    return CONFIGS / table / f"{row}_{schedule}.yaml"


@cache
def published(table: str) -> dict[str, Any] | None:
    """What configs/<table>/published.yaml says; None for a table that nobody published."""
    path = CONFIGS / table / "published.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None


def position(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    """A sorting key: names in `order` first and as there, the others after them by name."""
    return (order.index(name) if name in order else len(order), name)
