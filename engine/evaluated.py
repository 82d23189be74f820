"""Which weights are evaluated: those of the optimizer's eval mode, and their average.

Schedule-free optimizers (Defazio et al., arXiv 2405.15682) have two modes: after `train()` the model has the weights at
which gradients are taken, after `eval()` those of the result. A run trains and saves checkpoints in train mode, and
evaluates and averages in eval mode.

A run with `average:` is evaluated twice. The average's metrics end in `_average`. result.json has its score as `final`,
and that of the weights themselves as `final_unaveraged`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engine.averaging import average_weights, keep_weights
from engine.errors import UserError
from engine.metrics import require_finite, require_finite_weights
from engine.weights import Weights, write_weights

if TYPE_CHECKING:
    from engine.config import RunConfig
    from engine.run import Run

    RunT = TypeVar("RunT", bound=Run)
    Evaluate = Callable[[RunT], dict[str, float]]
    Renew = Callable[[RunT], None] | None  # takes BatchNorm's statistics anew, for other weights

AVERAGE = "_average"


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def exponential_average(model: torch.nn.Module, config: RunConfig) -> AveragedModel | None:
    """The exponential average, if the config asks for one."""
    if not (config.average and config.average.decay):
        return None
    if config.precision == "apex-O2":
        raise UserError("average.decay: with precision=apex-O2 the weights are float16; use precision=apex-O1 or fp16")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.average.decay))


@contextmanager
def eval_mode(run: RunT, renew: Renew = None) -> Iterator[None]:
    """Within, the model has the weights of eval mode."""
    if not has_modes(run.optimizer):
        yield
        return
    with _undone(run.model):
        run.optimizer.eval()
        try:
            if renew:
                renew(run)
            yield
        finally:
            run.optimizer.train()


@contextmanager
def averaged(run: RunT, renew: Renew = None) -> Iterator[list[int]]:
    """Within, the model has the run's average. Yields the updates of kept weights in it; UserError if none are kept."""
    if run.average:
        state, updates = run.average.module.state_dict(), []
    else:
        run.world.barrier()  # rank 0 has written the last weights
        state, updates = average_weights(run.record.folder, run.config.average.last, run.vocabulary)
    with _undone(run.model):
        run.model.load_state_dict(state)
        if renew:
            renew(run)
        yield updates


@contextmanager
def _undone(model: torch.nn.Module) -> Iterator[None]:
    """Restore parameters and buffers bit for bit after the block."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)


def final(run: RunT, renew: Renew = None) -> AbstractContextManager:
    """Within, the model has the result's weights: the average, or else those of eval mode."""
    return averaged(run, renew) if run.config.average else eval_mode(run, renew)


def scores(run: RunT, evaluate: Evaluate, renew: Renew = None) -> dict[str, float]:
    """What `evaluate` finds about the weights and their exponential average, if any.

    Weights other than the checkpoint's are written to the run folder.
    """
    with eval_mode(run, renew):
        found = evaluate(run)
        if has_modes(run.optimizer) and not run.config.average:
            _write(run)
    if run.average:
        found |= _scores_of_average(run, evaluate, renew)
    return found


def last_scores(run: RunT, evaluate: Evaluate, renew: Renew = None) -> dict[str, float]:
    """At the end: metrics of the last evaluation, and of the mean of the kept weights."""
    if not run.config.average or run.average:
        return run.progress.last
    found = _scores_of_average(run, evaluate, renew)
    record_final(run, **found)
    return run.progress.last | found


def _scores_of_average(run: RunT, evaluate: Evaluate, renew: Renew) -> dict[str, float]:
    with averaged(run, renew) as updates:
        found = {f"{name}{AVERAGE}": value for name, value in evaluate(run).items()}
        _write(run, updates)
    return found


def record_final(run: RunT, **values: float) -> None:
    """Write a line of metrics that only the end takes."""
    progress = run.progress
    for name, value in values.items():
        require_finite(value, progress.update, name)
    begun = progress.epoch + (progress.update_in_epoch > 0)
    run.record.metrics("final", progress.update, epoch=begun, **values)


def of_result(metrics: dict[str, float], name: str) -> float:
    return metrics.get(f"{name}{AVERAGE}", metrics[name])


def results(metrics: dict[str, float], **names: str) -> dict[str, float]:
    """Keys of result.json, for each key=name whose metric exists."""
    found = {}
    for key, name in names.items():
        if name in metrics:
            found[key] = of_result(metrics, name)
        if f"{name}{AVERAGE}" in metrics:
            found[f"{key}_unaveraged"] = metrics[name]
    return found


def update_average(run: Run) -> None:
    average, model = run.average, run.model
    if average is None:
        return
    with eval_mode(run):
        if average.n_averaged == 0:
            average.update_parameters(model)
            return
        # update_parameters would wait for a copy of its count to the GPU.
        average.multi_avg_fn([*average.module.parameters()], [*model.parameters()], average.n_averaged)
        for kept, buffer in zip(average.module.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        average.n_averaged += 1


def is_kept(run: Run) -> bool:
    """Whether this update's weights are averaged. A run that would keep none keeps the last."""
    average, progress = run.config.average, run.progress
    if not average or average.decay:
        return False
    is_end = progress.update == run.updates
    if average.every:
        return is_end or progress.update % average.every == 0
    return progress.update_in_epoch == run.updates_per_epoch or (is_end and progress.epoch == 0)


def keep_for_average(run: Run) -> None:
    """Keep the weights for averaging. Raises UserError where the training loss or a weight is not finite."""
    update = run.progress.update
    require_finite(run.window.reduce(run.world)["loss"], update)
    with eval_mode(run):
        require_finite_weights(run.model, run.world, update)
        if run.world.is_main:
            keep_weights(run.record.folder, update, run.model, run.vocabulary, run.config.average.last)


def _write(run: Run, updates: Sequence[int] = ()) -> None:
    """Write the weights for the tasks' evaluate.py."""
    if run.world.is_main:
        weights = Weights(run.model.state_dict(), run.progress.update, run.vocabulary, tuple(updates))
        write_weights(run.record.folder, weights)
