"""The methods of a comparison: rows of configs/search/<task>.yaml, or any other optimizer by its dotted name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveFloat, RootModel

from engine.config import Named, load_config
from engine.errors import UserError, nearest, settings_of
from optim import create_optimizer
from scripts.protocol import Method

MODEL = "adam"  # a class without its own row begins with this row's rate and weight decay
FLAGS = ("decoupled_weight_decay", "weight_decouple")  # settings by which some classes decouple the decay


class Line(Named):
    """Its lr is the middle of the grid."""

    lr: PositiveFloat


class Lines(RootModel[dict[str, Line]]):
    """A file of configs/search: row to optimizer."""


def read_methods(path: Path, names: Sequence[str]) -> list[Method]:
    """The methods called `names`: rows in `path`, or dotted names of classes.

    Raises UserError for a name that is neither, and for an optimizer that does not take its settings.
    """
    lines = load_config(Lines, path).model_dump()
    methods = [method_of(name, lines, path) for name in dict.fromkeys(names)]
    rows = [method.row for method in methods]
    if twice := next((row for row in rows if rows.count(row) > 1), None):
        raise UserError(f"--methods: two are called {twice}: give one of them a line with another name in {path}")
    return methods


def method_of(name: str, lines: dict[str, Any], path: Path) -> Method:
    if name in lines:
        row, settings = name, lines[name]
    elif "." in name:
        row, settings = name.rpartition(".")[2], {"name": name, "lr": lines[MODEL]["lr"]}
        if "weight_decay" in group_of(settings):
            settings["weight_decay"] = lines[MODEL]["weight_decay"]
    else:
        raise UserError(
            f"--methods: {path} has no '{name}'{nearest(name, lines)}; valid: {', '.join(lines)}, or the dotted "
            "name of a class"
        )
    return Method(row, settings, is_decoupled(group_of(settings)))


def group_of(optimizer: dict[str, Any]) -> dict[str, Any]:
    """All settings of an optimizer. Raises UserError where it cannot be made."""
    settings = {key: value for key, value in optimizer.items() if key != "name"}
    with settings_of("optimizer"):
        made = create_optimizer(optimizer["name"], [torch.nn.Parameter(torch.zeros(2, 2))], **settings)
    decouples = {FLAGS[0]: True} if isinstance(made, torch.optim.AdamW) else {}
    return made.param_groups[0] | decouples


def is_decoupled(group: dict[str, Any]) -> bool:
    """Whether the weight decay, times the rate, is subtracted from the weights and not added to the gradient."""
    return group.get("weight_decay_type", "L2") != "L2" or any(group.get(flag) for flag in FLAGS)
