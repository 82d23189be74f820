"""A comparison's methods: rows of configs/search/<task>.yaml, or any optimizer by its dotted name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveFloat, RootModel
from torch.nn import Parameter
from torch.optim import Optimizer

from engine.config import OptimizerConfig, load_config
from engine.errors import UserError, nearest, settings_of
from engine.parameter_groups import over_one_group
from scripts.protocol import Method

MODEL = "adam"  # a class without a row begins with this row's rate and weight decay
FLAGS = ("decoupled_weight_decay", "weight_decouple")  # settings that decouple the decay
DECOUPLED = {  # classes that always do, without a flag or (Adan) whatever it is
    *("Adafactor", "Muon"),  # of torch.optim
    *("AdamWScheduleFree", "RAdamScheduleFree"),  # of schedulefree (1.4.1): added to the normalised gradient
    *("Adan", "Conda", "DASH", "Fira", "FlashAdamW", "GaLore", "ScheduleFreeAdamW", "ScheduleFreeRAdam"),
    *("SOAP", "SPAM", "StableSPAM"),  # with the line above, of pytorch_optimizer (4.1.0)
}


class Line(OptimizerConfig):
    """Its lr is the middle of the grid."""

    lr: PositiveFloat


class Lines(RootModel[dict[str, Line]]):
    """Row to optimizer, in configs/search."""


def read_methods(path: Path, names: Sequence[str]) -> list[Method]:
    """The methods called `names`: rows in `path`, or dotted names of classes.

    Raises UserError for another name, and for wrong settings.
    """
    lines = load_config(Lines, path).model_dump()
    methods = [method_of(name, lines, path) for name in dict.fromkeys(names)]
    rows = [method.row for method in methods]
    if twice := next((row for row in rows if rows.count(row) > 1), None):
        raise UserError(f"--methods: two are called {twice}: give one of them a line with another name in {path}")
    return methods


def method_of(name: str, lines: dict[str, Any], path: Path) -> Method:
    if name in lines:
        row, optimizer = name, lines[name]
    elif "." in name:
        row, optimizer = name.rpartition(".")[2], {"name": name, "lr": lines[MODEL]["lr"]}
        if "weight_decay" in made_of(optimizer).param_groups[0]:
            optimizer["weight_decay"] = lines[MODEL]["weight_decay"]
    else:
        raise UserError(
            f"--methods: {path} has no '{name}'{nearest(name, lines)}; valid: {', '.join(lines)}, or the dotted "
            "name of a class"
        )
    return complete_method(row, optimizer)


def complete_method(row: str, optimizer: dict[str, Any]) -> Method:
    """A row's method, whose optimizer and groups name rates and decays, so that class defaults are tuned too.

    Raises UserError where one factor cannot tune the decays.
    """
    own = {key: value for key, value in optimizer.items() if key not in ("needs", "groups")}
    parts, groups = [made_of(own)], []
    for group in optimizer.get("groups", []):
        group = {key: value for key, value in group.items() if value is not None}
        parts.append(made_of(group if "name" in group else own | group))
        groups.append(completed(group, parts[-1]) if "name" in group else group)
    optimizer = completed(optimizer, parts[0])
    if groups:
        optimizer["groups"] = groups
    kinds = [is_decoupled(part) for part in parts if part.param_groups[0].get("weight_decay")]
    if len(set(kinds)) > 1 or (kinds and not optimizer.get("weight_decay")):
        raise UserError(
            f"{row}: one factor cannot tune its weight decays: the optimizer itself must have one, and either all are "
            "decoupled or all are added to the gradient"
        )
    return Method(row, optimizer, kinds[:1] == [True])


def made_of(settings: dict[str, Any]) -> Optimizer:
    """An optimizer over a matrix. Raises UserError."""
    with settings_of("optimizer"):
        others = {key: value for key, value in settings.items() if key not in ("name", "match")}
        return over_one_group(settings["name"], others, [Parameter(torch.zeros(2, 2))])


def completed(settings: dict[str, Any], made: Optimizer) -> dict[str, Any]:
    """`settings`, with the class's rate and weight decay as defaults."""
    group = made.param_groups[0]
    return settings | {key: group[key] for key in ("lr", "weight_decay") if group.get(key) and key not in settings}


def is_decoupled(optimizer: Optimizer) -> bool:
    """Whether rate times decay is subtracted from the weights, not added to the gradient."""
    group = optimizer.param_groups[0]
    return not group.get("fixed_decay") and (  # pytorch_optimizer's decay without the rate
        group.get("weight_decay_type", "L2") != "L2"
        or any(group.get(flag) for flag in FLAGS)
        or isinstance(optimizer, torch.optim.AdamW)
        or any(cls.__name__ in DECOUPLED for cls in type(optimizer).__mro__)
    )
