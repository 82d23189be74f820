"""Groups of parameters with settings of their own, or with another optimizer.

    optimizer: {name: adamw, lr: 3.0e-4, weight_decay: 0.1, groups: [
      {match: embedding, lr: 1.0e-3},                   # a regular expression, searched in the name
      {match: 1, weight_decay: 0},                      # tensors of one dimension: biases, scales of norms
      {match: 2, name: torch.optim.Muon, lr: 0.02}]}    # the other matrices get another optimizer

A parameter belongs to the first group that matches it, or else to the optimizer itself. A group inherits the settings
that it does not give, or none if it has a name. Loops, schedule, scaler and checkpoints see several optimizers as one.
"""

import inspect
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from engine.config import GroupConfig, OptimizerConfig
from engine.errors import UserError, nearest, settings_of
from optim import create_optimizer, optimizer_class

TORCH_FUSED = ("adam", "adamw", "sgd")  # torch's with a fused step


class SeveralOptimizers(Optimizer):
    """Optimizers that step one after the other. Its `param_groups` are the same dictionaries as theirs."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = optimizers
        super().__init__([group for one in optimizers for group in one.param_groups], {})
        if modal := [one for one in optimizers if hasattr(one, "train") and hasattr(one, "eval")]:
            self.train, self.eval = partial(_all, modal, "train"), partial(_all, modal, "eval")  # schedule-free ones

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `state` has another number of optimizers."""
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        self.param_groups = [group for one in self.optimizers for group in one.param_groups]  # new ones


def _all(optimizers: Sequence[Optimizer], mode: str) -> None:
    for optimizer in optimizers:
        getattr(optimizer, mode)()


def create_grouped_optimizer(model: Module, config: OptimizerConfig, device_type: str) -> Optimizer:
    """The optimizer of `config` over the parameters of `model`.

    On CUDA torch's own take their fused step unless the config names another: the default, foreach, reads and writes
    memory about three times as often. Raises UserError for a group without parameters and for settings that do not fit.
    """
    settings = _with_fused(config.name, config.settings, device_type)
    if not config.groups:
        with settings_of("optimizer"):
            return create_optimizer(config.name, model.parameters(), **settings)
    rest, *parts = divide_parameters(model, config.groups)
    own = [_one_group(config.name, settings, rest)] if rest else []
    others = []
    for group, parameters in zip(config.groups, parts, strict=True):
        with settings_of(f"optimizer.groups: {group.match!r}"):
            if group.name:
                theirs = _with_fused(group.name, group.settings, device_type)
                others.append(over_one_group(group.name, theirs, parameters))
            else:
                own.append(_one_group(config.name, settings | group.settings, parameters, group.settings))
    if not own:
        raise UserError(f"optimizer.groups: the groups leave no parameter for {config.name}: let it be one of theirs")
    with settings_of("optimizer"):
        first = create_optimizer(config.name, own, **settings)
    return SeveralOptimizers([first, *others]) if others else first


def _with_fused(name: str, settings: dict[str, Any], device_type: str) -> dict[str, Any]:
    chooses = device_type == "cuda" and name in TORCH_FUSED and not settings.keys() & {"foreach", "fused"}
    return settings | {"fused": True} if chooses else settings


def divide_parameters(model: Module, groups: Sequence[GroupConfig]) -> list[list[Parameter]]:
    """Parameters without a group, then those of each group. Raises UserError for a group without any."""
    parts: list[list[Parameter]] = [[] for _ in range(len(groups) + 1)]
    for name, parameter in model.named_parameters():
        matching = (index for index, group in enumerate(groups, start=1) if _matches(group.match, name, parameter))
        parts[next(matching, 0)].append(parameter)
    for group, part in zip(groups, parts[1:], strict=True):
        if not part:
            named = list(model.named_parameters())
            taken = any(_matches(group.match, name, parameter) for name, parameter in named)
            reason = "a group before it has all that it matches" if taken else "it matches no parameter"
            hint = "" if taken else nearest(str(group.match), (name for name, _ in named))
            raise UserError(f"optimizer.groups: {group.match!r} has nothing to train: {reason}{hint}")
    return parts


def describe_groups(model: Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters without a group come first."""
    divided = zip([None, *config.groups], divide_parameters(model, config.groups), strict=True)
    return [
        {
            "match": group and group.match,
            "name": (group and group.name) or config.name,
            "tensors": len(part),
            "parameters": sum(parameter.numel() for parameter in part),
        }
        for group, part in divided
        if part
    ]


def _matches(match: str | int, name: str, parameter: torch.Tensor) -> bool:
    return parameter.dim() == match if isinstance(match, int) else re.search(match, name) is not None


def over_one_group(name: str, settings: dict[str, Any], parameters: list[Parameter]) -> Optimizer:
    """An optimizer over one group, which also gets settings that the constructor does not name.

    There pytorch_optimizer.Muon looks for `use_muon`.
    """
    named = inspect.signature(optimizer_class(name)).parameters
    flags = {key: value for key, value in settings.items() if key not in named}
    return create_optimizer(name, [{"params": parameters, **flags}], **settings)


def _one_group(
    name: str, settings: dict[str, Any], parameters: list[Parameter], own: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The group that the constructor makes of `settings`. Raises ValueError if it keeps one of `own` outside of it."""
    group = over_one_group(name, settings, parameters).param_groups[0]
    for key in own or {}:
        if key not in group:
            raise ValueError(f"{name} has one {key} for all of its groups")
    return group
