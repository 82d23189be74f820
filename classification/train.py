"""Train an image classifier: python -m classification.train CONFIG [key=value ...]     (also under torchrun)

The whole run, top to bottom: config, distributed, seed, data, model, optimizer, schedule, resume; then, for each epoch,
train, evaluate, record, save. Interrupt it at any moment and run the same command again: it goes on where it was, and
on the CPU it ends with bit-identical weights.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from classification.data import ImageData, load_data
from classification.models import create_model
from engine.allocator import keep_freed_memory
from engine.checkpoint import Checkpoints, Progress
from engine.config import RunConfig, Strict, load_config
from engine.distributed import World, setup
from engine.errors import UserError, run_main, settings_of
from engine.interrupt import StopRequest, Wish, agree
from engine.metrics import Sums, require_finite
from engine.precision import Precision, create_precision, optimizer_step
from engine.run_record import RunRecord, peak_memory_mb
from engine.seed import seed_step
from optim import create_optimizer
from optim.lr_scheduler import create_schedule

USAGE = "usage: python -m classification.train CONFIG [key=value ...]     e.g. configs/cifar10/apollo_milestone.yaml"
METRICS = ("loss", "correct", "count")
TRAIN_METRICS = (*METRICS, "damaged")


class DataConfig(Strict):
    name: Literal["cifar10", "cifar100", "folder", "digits", "imagenet"]
    root: str = "data"
    mean: list[float] | None = None  # per channel, of images in 0..1; default: the data set's own
    std: list[float] | None = None
    # imagenet alone; ImageNetData says what they mean, and has the defaults
    size: PositiveInt | None = None
    resize: PositiveInt | None = None
    decoder: Literal["exact", "fast"] | None = None
    on_damaged: Literal["error", "skip"] | None = None
    workers: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _imagenet_alone(self) -> "DataConfig":
        for key in ("size", "resize", "decoder", "on_damaged", "workers"):
            if self.name != "imagenet" and getattr(self, key) is not None:
                raise ValueError(f"data.{key} is a setting of data.name=imagenet alone")
        return self


class ModelConfig(Strict):
    name: str
    depth: PositiveInt | None = None


class Config(RunConfig):
    epochs: PositiveInt
    data: DataConfig
    model: ModelConfig
    channels_last: bool = True
    sync_batchnorm: bool = False  # with several GPUs: statistics over the batches of all of them
    eval_batch: PositiveInt = 1000  # per rank


@dataclass
class Run:
    """What the loop works with, made once by `prepare`."""

    config: Config
    world: World
    record: RunRecord
    data: ImageData
    model: torch.nn.Module  # the model itself: evaluated and saved
    network: torch.nn.Module  # the model as trained: compiled, in DistributedDataParallel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    precision: Precision
    window: Sums  # training metrics since the last log line
    progress: Progress
    checkpoints: Checkpoints
    stop: StopRequest
    optimizer_ms: list[float] = field(default_factory=list)  # a sample, one an interval of log_every


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    config = load_config(Config, arguments[0], arguments[1:])
    world = setup(config.device)
    try:
        return train(config, world)
    finally:
        world.close()


def train(config: Config, world: World) -> int:
    """Train to the end, or until a signal asks to stop; returns the exit status."""
    record = RunRecord(config, config.folder, world, config.tensorboard)
    if record.complete:
        record.say(f"{record.folder} is complete: nothing to do")
        return 0
    run = prepare(config, world, record)
    progress = run.progress
    updates = config.epochs * run.data.updates_per_epoch(config.global_batch)
    with tqdm(total=updates, initial=progress.update, unit="update", disable=None if world.is_main else True) as bar:
        while progress.epoch < config.epochs:
            trained = train_epoch(run, bar)
            if trained is None:
                record.say(
                    f"stopped at update {progress.update} by {run.stop.signal.name}; saved: the same command goes on"
                )
                return run.stop.exit_status
            tested = evaluate(run)
            finish_epoch(run, trained, tested)
    last = progress.last
    record.finish(
        table=config.table,
        row=config.row,
        schedule=config.schedule.name,
        seed=config.seed,
        metric="top1",
        final=last["test_top1"],
        best=progress.best,
        epochs=progress.epoch,
        evaluated=run.data.test_size,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        examples_per_s=round(progress.update * config.global_batch / progress.train_s, 1),
        optimizer_ms_per_step=round(median(run.optimizer_ms), 3) if run.optimizer_ms else None,
        peak_memory_mb=round(peak_memory_mb(world.device), 1),
    )
    record.say(
        f"done: top-1 {last['test_top1']:.2f} at the end, {progress.best:.2f} at best; {record.folder}/result.json"
    )
    return 0


def prepare(config: Config, world: World, record: RunRecord) -> Run:
    """Build everything the loop needs, and take up the run folder's last checkpoint if there is one."""
    per_pass = world.share(config.global_batch, config.accumulation)
    precision = create_precision(config.precision, world.device)
    torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if world.device.type == "cpu":
        keep_freed_memory()

    if not world.is_main:
        world.barrier()  # rank 0 downloads, the others then find the files
    data = load_data(config.data, world.device, config.seed)
    if world.is_main:
        world.barrier()

    seed_step(config.seed, "initialisation")
    with settings_of("model"):
        model = create_model(config.model.name, data.num_classes, depth=config.model.depth)
    if config.sync_batchnorm and world.world_size > 1:
        if world.device.type != "cuda":
            raise UserError("sync_batchnorm=true exists on CUDA devices only: leave it out")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(world.device, memory_format=memory_format)

    with settings_of("optimizer"):
        optimizer = create_optimizer(config.optimizer.name, model.parameters(), **config.optimizer.settings)
    model, optimizer = precision.prepare(model, optimizer)
    network = torch.compile(model) if config.compile else model
    if world.world_size > 1:
        network = precision.data_parallel(network, world.device)
    with settings_of("schedule"):
        schedule = create_schedule(
            optimizer,
            config.schedule.name,
            updates_per_unit=data.updates_per_epoch(config.global_batch),
            total=config.epochs,
            **config.schedule.settings,
        )

    window = Sums(TRAIN_METRICS, world.device)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "precision": precision}
    progress = Progress()
    checkpoints = Checkpoints(
        record.folder, parts, world, config.checkpoint.keep, config.checkpoint.minutes, say=record.say
    )
    saved = checkpoints.restore(progress)
    if saved:
        window.scatter(saved["window"], world)
        record.say(f"resuming at epoch {progress.epoch + 1}, update {progress.update}")
    record.rewind(saved and saved["record"])
    record.environment(
        world_size=world.world_size,
        global_batch=config.global_batch,
        per_rank_batch=per_pass * config.accumulation,
        accumulation=config.accumulation,
        batchnorm_batch=per_pass * (world.world_size if config.sync_batchnorm else 1),
        train_examples=data.train_size,
        test_examples=data.test_size,
    )
    return Run(
        config, world, record, data, model, network, optimizer, schedule, precision, window, progress, checkpoints,
        stop=StopRequest(),
    )  # fmt: skip


def train_epoch(run: Run, bar: tqdm) -> dict[str, float] | None:
    """Train to the end of the epoch; its metrics, or None where a signal asked to stop (everything is saved then)."""
    config, world, progress = run.config, run.world, run.progress
    run.network.train()
    batches = run.data.train_batches(
        progress.epoch,
        config.global_batch,
        world.rank,
        world.world_size,
        accumulation=config.accumulation,
        start_update=progress.update_in_epoch,
        channels_last=config.channels_last,
    )
    clock = time.perf_counter()
    for micro_batches in batches:
        seed_step(config.seed, "step", progress.update, world.rank)
        run.optimizer.zero_grad()
        for index, (images, labels) in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last or world.world_size == 1 else run.network.no_sync():
                with run.precision.autocast():
                    logits = run.network(images)
                    loss = cross_entropy(logits.float(), labels)
                run.precision.backward(loss / len(micro_batches), is_last)
            correct = (logits.argmax(1) == labels).sum()
            damaged = run.data.take_damaged()
            run.window.add(loss=loss * len(labels), correct=correct, count=len(labels), damaged=damaged)
        progress.lr = float(run.optimizer.param_groups[0]["lr"])
        sample = run.optimizer_ms if progress.update % config.log_every == 0 else None
        if optimizer_step(run.precision, run.optimizer, world, sample):
            run.schedule.step()  # an update that the scaler skips advances nothing
        progress.update += 1
        progress.update_in_epoch += 1
        progress.epoch_s += time.perf_counter() - clock
        clock = time.perf_counter()
        bar.update()

        if progress.update % config.log_every == 0:
            means = close_window(run)
            bar.set_postfix(epoch=progress.epoch + 1, loss=f"{means['loss']:.4f}")
        wish = agree(world, run.stop, run.checkpoints.due(), progress.update)
        if wish != Wish.GO_ON:
            save(run)
            clock = time.perf_counter()
        if wish == Wish.STOP:
            return None
    close_window(run)
    totals = progress.totals
    damaged = {"damaged": int(totals["damaged"])} if totals["damaged"] else {}
    return damaged | {
        "train_loss": totals["loss"] / totals["count"],
        "train_top1": 100 * totals["correct"] / totals["count"],
        "lr": progress.lr,
        "examples_per_s": round(totals["count"] / progress.epoch_s, 1),
    }


def close_window(run: Run) -> dict[str, float]:
    """Record the training metrics since the last log line, and add them to the epoch's totals."""
    sums = run.window.reduce(run.world)
    run.window.zero()
    progress = run.progress
    progress.totals = {name: progress.totals.get(name, 0.0) + value for name, value in sums.items()}
    if not sums["count"]:  # the epoch ended with a log line
        return {}
    require_finite(sums["loss"], progress.update)
    means = {"loss": sums["loss"] / sums["count"], "top1": 100 * sums["correct"] / sums["count"]}
    speed = round(progress.totals["count"] / progress.epoch_s, 1)
    run.record.metrics(
        "train", progress.update, epoch=progress.epoch + 1, **means, lr=progress.lr, examples_per_s=speed
    )
    return means


@torch.inference_mode()
def evaluate(run: Run) -> dict[str, float]:
    """Loss and top-1 accuracy on the test images, each counted exactly once over all ranks."""
    run.world.copy_buffers(run.model)
    run.model.eval()
    sums = Sums(METRICS, run.world.device)
    for images, labels in run.data.test_batches(run.config.eval_batch, run.world.rank, run.world.world_size):
        with run.precision.autocast():
            logits = run.model(images)
        loss = cross_entropy(logits.float(), labels, reduction="sum")
        sums.add(loss=loss, correct=(logits.argmax(1) == labels).sum(), count=len(labels))
    total = sums.reduce(run.world)
    if total["count"] != run.data.test_size:
        raise RuntimeError(f"evaluated {total['count']:.0f} images of a test set of {run.data.test_size}")
    return {"test_loss": total["loss"] / total["count"], "test_top1": 100 * total["correct"] / total["count"]}


def finish_epoch(run: Run, trained: dict[str, float], tested: dict[str, float]) -> None:
    """Record the epoch, and save: the next one starts from here."""
    progress = run.progress
    progress.epoch += 1
    progress.train_s += progress.epoch_s
    progress.update_in_epoch, progress.epoch_s, progress.totals = 0, 0.0, {}
    progress.best = max(tested["test_top1"], progress.best or 0.0)
    progress.last = trained | tested
    run.record.metrics(
        "epoch", progress.update, epoch=progress.epoch, **progress.last, wall_s=round(run.record.wall_s, 1)
    )
    run.record.say(
        f"epoch {progress.epoch:>3}/{run.config.epochs}  train loss {trained['train_loss']:.4f}  "
        f"test loss {tested['test_loss']:.4f}  top-1 {tested['test_top1']:.2f}  "
        f"lr {trained['lr']:.3g}  {trained['examples_per_s']:.0f} images/s"
    )
    save(run)


def save(run: Run) -> None:
    """Write a checkpoint, unless the training loss has become non-finite: such weights must not push out good ones."""
    window = run.window.gather(run.world)
    require_finite(float(window[:, 0].sum()), run.progress.update)
    run.checkpoints.save(run.progress, extra={"window": window, "record": run.record.position()})


if __name__ == "__main__":
    run_main(main)
