"""What the three training loops share. A train.py calls these functions in this order:

    read_arguments                                                       in `main`
    create_precision, with_optimizer, assemble, restore, write_environment        in `prepare`
    start_clock, averaged_over_ranks, end_update, close_window, log_window, save        in `train_epoch`
    start_clock, wait_for_device                                         around what is not training
    record_evaluation, end_epoch                                         after an evaluation
    say_stopped, write_result                                                      at the end

engine/evaluated.py says which weights are evaluated.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, ClassVar, TypeVar

import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from engine import evaluated
from engine.allocator import keep_freed_memory
from engine.apex_adapter import ApexPrecision, require_apex
from engine.checkpoint import Checkpoints, Progress, unreadable
from engine.config import RunConfig, load_config
from engine.distributed import World
from engine.errors import UserError, settings_of
from engine.interrupt import Agreement, StopRequest, Wish
from engine.machine import cpu_has_bf16
from engine.metrics import Sums, require_finite, require_finite_weights
from engine.needs import closure_of, explain_failure, needs_of
from engine.parameter_groups import create_grouped_optimizer, describe_groups
from engine.precision import Precision
from engine.run_record import RunRecord, peak_memory_mb
from engine.seed import seed_step
from optim import Apollo
from optim.lr_scheduler import create_schedule

ConfigT = TypeVar("ConfigT", bound=RunConfig)
RunT = TypeVar("RunT", bound="Run")


@dataclass(kw_only=True)
class Run:
    """What a loop works with. A task's subclass adds its own fields."""

    METRICS: ClassVar[tuple[str, ...]]  # summed over a window, the loss first
    COUNTED: ClassVar[str]  # one of METRICS: "examples" or "tokens"

    config: RunConfig
    world: World
    record: RunRecord
    model: torch.nn.Module  # evaluated and saved
    network: torch.nn.Module  # trained: perhaps compiled, or in DistributedDataParallel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    precision: Precision
    needs: str | None  # of the optimizer's step: closure or create_graph
    window: Sums  # since the last log line
    progress: Progress
    checkpoints: Checkpoints
    stop: StopRequest
    agreement: Agreement
    updates: int  # of the whole run
    updates_per_epoch: int
    average: AveragedModel | None  # the exponential one of the weights
    vocabulary: str | None = None  # digest of the data's
    take_step: Callable[[], bool]  # the optimizer's; False where the scaler skipped it
    clock: float = 0.0  # the start of timed training
    optimizer_ms: list[float] = field(default_factory=list)  # one sample every log_every updates


def read_arguments(config: type[ConfigT], arguments: list[str], usage: str) -> ConfigT:
    """The config that a command line names. Without one, print the usage and exit. Raises UserError."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit(0 if arguments else 2)
    return load_config(config, arguments[0], arguments[1:])


def create_precision(name: str, device: torch.device, say: Callable[[str], None]) -> Precision:
    """The precision `name`. Raises UserError where device or installation lack it.

    `say` gets a warning where it is far slower than fp32.
    """
    if name.startswith("apex-"):
        require_apex(name, device)
        return ApexPrecision(name, device)
    if name == "bf16" and device.type == "cpu" and cpu_has_bf16() is False:
        # 1024 x 1024 matrix products, torch 2.14, AMD EPYC restricted by ONEDNN_MAX_CPU_ISA: with AVX2 50 to 100 times
        # as long as in fp32, with AVX-512 twice as long.
        say(
            "warning: this CPU has no bf16 arithmetic (AVX-512-BF16, AMX, or ARM's BF16), so precision=bf16 is slower "
            "than fp32, up to 100 times without AVX-512: use precision=fp32"
        )
    return Precision(name, device)


def with_optimizer(
    model: torch.nn.Module, config: RunConfig, precision: Precision
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Model and optimizer, as `precision` wants them. Raises UserError where settings do not fit."""
    optimizer = create_grouped_optimizer(model, config.optimizer, precision.device_type)
    if any("lr" not in group for group in optimizer.param_groups):
        raise UserError(f"optimizer {config.optimizer.name} has no learning rate, lr, that a schedule could set")
    return precision.prepare(model, optimizer)


def assemble(
    kind: type[RunT],
    config: RunConfig,
    world: World,
    record: RunRecord,
    precision: Precision,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    total: int,
    updates_per_unit: int = 1,
    updates_per_epoch: int | None = None,
    network: torch.nn.Module | None = None,
    **own: Any,
) -> RunT:
    """A Run of class `kind` at its beginning, with this class's `own` fields.

    The schedule has `total` units of `updates_per_unit` updates; by default a unit is an epoch. `network` is called in
    training, by default `model`.
    """
    if evaluated.has_modes(optimizer):
        optimizer.train()  # some begin in eval mode
    needs = needs_of(config, optimizer, world)
    precision.create_graph = needs == "create_graph"
    with settings_of("schedule"):
        units = {"updates_per_unit": updates_per_unit, "total": total}
        schedule = create_schedule(optimizer, config.schedule.name, **units, **config.schedule.settings)
    if world.device.type == "cpu":
        keep_freed_memory()
    network = model if network is None else network
    average, stop = evaluated.exponential_average(model, config), StopRequest()
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "precision": precision}
    parts |= {"average": average} if average else {}
    return kind(
        config=config,
        world=world,
        record=record,
        model=model,
        network=precision.data_parallel(network, world.device) if world.world_size > 1 else network,
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
        needs=needs,
        window=Sums(kind.METRICS, world.device),
        progress=Progress(),
        checkpoints=Checkpoints(
            record.folder, parts, world, config.checkpoint.keep, config.checkpoint.minutes, say=record.say
        ),
        stop=stop,
        agreement=Agreement(world, stop),
        take_step=partial(precision.step, optimizer),
        updates=total * updates_per_unit,
        updates_per_epoch=updates_per_epoch or updates_per_unit,
        average=average,
        **own,
    )


def restore(run: Run) -> dict[str, Any] | None:
    """Load the last checkpoint, if any, and rewind the record to it. Returns the task's values in it.

    Raises UserError for the checkpoint of another run.
    """
    saved = run.checkpoints.restore(run.progress)
    if saved:
        if saved["vocabulary"] != run.vocabulary:
            raise UserError(
                f"{run.record.folder} was trained with another vocabulary than that of the data: choose another "
                "run_dir, or the data.root that it was trained from"
            )
        run.window.scatter(saved["window"], run.world)
        run.record.say(f"resuming at epoch {run.progress.epoch + 1}, update {run.progress.update}")
    run.record.rewind(saved and saved["record"], run.progress.update)
    return saved


def write_environment(run: Run, **own: Any) -> None:
    """Write environment.json: machine, recipe, the optimizer's groups and the task's `own` facts."""
    config = run.config
    if config.optimizer.groups:
        own["groups"] = describe_groups(run.model, config.optimizer)
        for group in own["groups"]:
            what = "the rest" if group["match"] is None else f"match {group['match']!r}"
            run.record.say(f"{group['name']}, {what}: {group['tensors']} tensors, {group['parameters']:,} parameters")
    run.record.environment(world_size=run.world.world_size, batch=config.batch, passes=config.passes, **own)


def progress_bar(run: Run, updates: int) -> tqdm:
    """A bar over the run's updates, on rank 0's terminal."""
    disable = None if run.world.is_main else True
    return tqdm(total=updates, initial=run.progress.update, unit="update", disable=disable)


def start_clock(run: Run) -> None:
    run.clock = time.perf_counter()


def wait_for_device(run: Run) -> None:
    """Wait for the device, and count training time up to here."""
    run.world.synchronize()
    now = time.perf_counter()
    run.progress.since_evaluation_s += now - run.clock
    run.progress.lr = float(run.progress.lr)
    run.clock = now


def averaged_over_ranks(run: Run, is_last: bool) -> AbstractContextManager:
    """Within, the ranks average gradients only if this pass is an update's last."""
    return nullcontext() if is_last or run.world.world_size == 1 else run.network.no_sync()


def end_update(run: Run, bar: tqdm, again: Callable[[], torch.Tensor]) -> Wish:
    """Take the optimizer's and the schedule's step; returns what the ranks agree to do next.

    `again` takes this update's gradients once more, uncounted, and returns this rank's loss. Weights kept for averaging
    also mean a save.
    """
    progress = run.progress
    rate = run.optimizer.param_groups[0]["lr"]
    progress.lr = rate.clone() if isinstance(rate, torch.Tensor) else rate  # float() would wait for the device
    # Timing waits for the device, so few steps are timed, and not the first, which builds kernels.
    is_timed = progress.update > 0 and (progress.update - 1) % run.config.log_every == 0
    step = _timed_step if is_timed else _step
    if step(run, again):  # the scaler did not skip it
        with settings_of("schedule"):  # it may be anyone's
            run.schedule.step()
        evaluated.update_average(run)
    progress.update += 1
    progress.update_in_epoch += 1
    bar.update()
    wish = run.agreement.after(progress.update, run.checkpoints.due())
    if not evaluated.is_kept(run):
        return wish
    wait_for_device(run)
    evaluated.keep_for_average(run)
    start_clock(run)
    return max(wish, Wish.SAVE)


def _step(run: Run, again: Callable[[], torch.Tensor]) -> bool:
    seed, place, name = run.config.seed, ("optimizer", run.progress.update), run.config.optimizer.name
    seed_step(seed, *place)  # the optimizer draws alike on all ranks
    closure = closure_of(again, run.world, seed, *place) if run.needs == "closure" else None
    try:
        taken = run.take_step() if closure is None else run.precision.step(run.optimizer, closure)
        if run.progress.update == 0 and (problem := unreadable(run.optimizer.state_dict())):
            raise UserError(f"the optimizer {name} cannot be resumed: no checkpoint can give back that its {problem}")
    except Exception as error:  # the optimizer may be anyone's
        if run.progress.update == 0:
            run.record.remove_if_new()
        if isinstance(error, UserError):
            raise
        failure = explain_failure(error, run.needs)
        raise UserError(f"the optimizer {name} failed in update {run.progress.update + 1}: {failure}") from error
    return taken


def _timed_step(run: Run, again: Callable[[], torch.Tensor]) -> bool:
    run.world.synchronize()
    started = time.perf_counter()
    taken = _step(run, again)
    run.world.synchronize()
    run.optimizer_ms.append(1000 * (time.perf_counter() - started))
    return taken


def close_window(run: Run) -> dict[str, float] | None:
    """The sums of METRICS over all ranks since the last call; None where nothing was counted.

    Raises UserError where the loss is not finite.
    """
    wait_for_device(run)
    sums = run.window.reduce(run.world)
    run.window.zero()
    totals = run.progress.since_evaluation
    run.progress.since_evaluation = {name: totals.get(name, 0.0) + value for name, value in sums.items()}
    if not sums[run.COUNTED]:
        return None
    require_finite(sums["loss"], run.progress.update)
    return sums


def log_window(run: Run, bar: tqdm, **means: float | None) -> None:
    """Write a line with `means` over the window, learning rate and speed."""
    progress = run.progress
    parts = getattr(run.optimizer, "optimizers", [run.optimizer])  # Apollo may be one of several
    if run.world.is_main and (apollo := next((one for one in parts if isinstance(one, Apollo)), None)):
        means["clamped"] = apollo.clamped()  # "Choosing a learning rate" in docs/apollo.md
    run.record.metrics("train", progress.update, epoch=progress.epoch + 1, **means, lr=progress.lr, **_speed(run))
    shown = {name: f"{mean:.4g}" for name, mean in means.items() if mean is not None}
    bar.set_postfix(epoch=progress.epoch + 1, **shown)


def save(run: Run, **own: torch.Tensor) -> None:
    """Write a checkpoint with the task's `own` values, the same on every rank.

    Raises UserError where the training loss or a weight is not finite: such weights must not push out good ones.
    """
    wait_for_device(run)
    window = run.window.gather(run.world)
    require_finite(float(window[:, 0].sum()), run.progress.update)
    require_finite_weights(run.model, run.world, run.progress.update)
    extra = {"window": window, "record": run.record.position(), "vocabulary": run.vocabulary}
    extra["train_mode"] = evaluated.has_modes(run.optimizer)
    run.checkpoints.save(run.progress, extra | own)
    start_clock(run)


def record_evaluation(run: Run, kind: str, trained: dict[str, float], found: dict[str, float]) -> None:
    """Write a line of `kind` (epoch, validation): metrics `trained` since the last evaluation, and `found` by this one.

    Raises UserError, and writes nothing, where one of `found` is not finite.
    """
    progress = run.progress
    for name, value in found.items():
        require_finite(value, progress.update, name)
    progress.last = trained | found | {"lr": progress.lr} | _speed(run)
    progress.trained_on += progress.since_evaluation[run.COUNTED]
    progress.train_s += progress.since_evaluation_s
    progress.since_evaluation, progress.since_evaluation_s = {}, 0.0
    run.record.metrics(
        kind, progress.update, epoch=progress.epoch + 1, **progress.last, wall_s=round(run.record.wall_s, 1)
    )
    start_clock(run)


def end_epoch(run: Run) -> None:
    run.progress.epoch += 1
    run.progress.update_in_epoch = 0


def say_stopped(run: Run) -> int:
    """Returns the exit status."""
    update, signal = run.progress.update, run.stop.signal.name
    run.record.say(f"stopped at update {update} by {signal}; saved: the same command goes on")
    return run.stop.exit_status


def write_result(run: Run, metric: str, final: float, **own: Any) -> None:
    """Write result.json with the value of `metric` and the task's `own` keys.

    Raises UserError where `final` or a weight is not finite.
    """
    config, progress = run.config, run.progress
    require_finite(final, progress.update, metric)
    require_finite_weights(run.model, run.world, progress.update)
    run.record.finish(
        table=config.table,
        row=config.row,
        schedule=config.schedule.name,
        seed=config.seed,
        metric=metric,
        final=final,
        best=progress.best,
        epochs=progress.epoch,
        **own,
        parameters=parameter_count(run.model),
        **{f"{run.COUNTED}_per_s": round(progress.trained_on / progress.train_s, 1)},
        optimizer_ms_per_step=round(median(run.optimizer_ms), 3) if run.optimizer_ms else None,
        peak_memory_mb=round(peak_memory_mb(run.world.device), 1),
    )


def parameter_count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _speed(run: Run) -> dict[str, float]:
    """Examples or tokens a second since the last evaluation."""
    progress = run.progress
    return {f"{run.COUNTED}_per_s": round(progress.since_evaluation[run.COUNTED] / progress.since_evaluation_s, 1)}
