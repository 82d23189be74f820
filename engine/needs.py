"""What some optimizers need besides gradients: a closure, or gradients that can be differentiated again.

`needs: closure` hands `step` a function that takes the update's gradients again, at the current weights: SAM calls it
once, L-BFGS some 20 times. Passes, augmentation and dropout are the same. Metrics, BatchNorm's running statistics and
carried state are those of the first time.
`needs: create_graph` keeps the graph of the gradients, from which AdaHessian takes products with the Hessian.
"""

import inspect
import traceback
import warnings
from collections.abc import Callable
from itertools import count
from typing import Any

import torch

from engine.config import RunConfig
from engine.distributed import World
from engine.errors import UserError
from engine.parameter_groups import SeveralOptimizers
from engine.seed import seed_step

HINTS = {  # words of an error, and the setting that probably helps
    "closure": "optimizer.needs=closure",
    "does not have a grad_fn": "optimizer.needs=create_graph",
    "view size is not compatible": "channels_last=false",  # torch's L-BFGS reads gradients as contiguous
}


def needs_of(config: RunConfig, optimizer: torch.optim.Optimizer, world: World) -> str | None:
    """What the config says, or a closure where the step requires one. Raises UserError if a setting excludes that."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    required = closure is not None and closure.default is inspect.Parameter.empty
    needs = config.optimizer.needs or ("closure" if required else None)
    obstacles: dict[str, Any] = {
        "an optimizer of another name in optimizer.groups": isinstance(optimizer, SeveralOptimizers),
        f"precision={config.precision}": config.precision == "fp16" or config.precision.startswith("apex-"),
    }
    if needs == "create_graph":
        obstacles |= {
            "compile=true": config.compile,
            f"{world.world_size} ranks, whose averaging of gradients cannot be differentiated": world.world_size > 1,
            "this task's models, whose own loss has no second derivative": not config.DIFFERENTIABLE_TWICE,
        }
    if needs and (found := next((name for name, is_there in obstacles.items() if is_there), None)):
        raise UserError(f"optimizer {config.optimizer.name} needs {needs}, which does not go together with {found}")
    if needs == "create_graph":  # gradients and graph are freed before the next update
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
    return needs


def closure_of(
    again: Callable[[], torch.Tensor], world: World, seed: int, *place: int | str
) -> Callable[[], torch.Tensor]:
    """A closure that calls `again` for this rank's gradients and loss, and returns the ranks' mean loss.

    After a call the optimizer's own draws go on from `place`, alike on all ranks.
    """
    calls = count(1)

    def closure() -> torch.Tensor:
        loss = world.sum(again().detach().clone()) / world.world_size
        seed_step(seed, *place, next(calls))
        return loss

    return closure


def explain_failure(error: Exception, needs: str | None) -> str:
    """The error and its place in one line, with the setting that probably helps."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    hint = next((setting for words, setting in HINTS.items() if words in str(error)), None)
    advice = f"; set {hint}" if hint and hint != f"optimizer.needs={needs}" else ""
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno}){advice}"
