"""Train an image classifier: python -m classification.train CONFIG [key=value ...]     (also under torchrun)

Read it top to bottom; `prepare` makes what the loop needs. After an interruption the same command goes on where it was,
and on the CPU ends with bit-identical weights.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from classification.augment import Batch, ImageData
from classification.batch_norm import normalise_in_groups, renew_statistics, track_statistics
from classification.config import Config
from classification.cuda_graph import use_graphs, uses_graph
from classification.data import load_data
from classification.models import create_model
from engine import evaluated
from engine import run as runs
from engine.distributed import World, setup
from engine.errors import run_main, settings_of
from engine.interrupt import Wish
from engine.metrics import Sums
from engine.run_record import RunRecord
from engine.seed import seed_step

USAGE = "usage: python -m classification.train CONFIG [key=value ...]     e.g. configs/cifar10/apollo_milestone.yaml"


@dataclass(kw_only=True)
class ImageRun(runs.Run):
    METRICS, COUNTED = ("loss", "correct", "examples", "damaged"), "examples"

    config: Config
    data: ImageData
    forward_backward: Callable[..., tuple[torch.Tensor, ...]]  # the function below, or a CUDA graph of it


def main(arguments: list[str]) -> int:
    config = runs.read_arguments(Config, arguments, USAGE)
    with closing(setup(config.device, config.deterministic)) as world:
        return train(config, world)


def train(config: Config, world: World) -> int:
    """Train until the end or a signal; returns the exit status."""
    record = RunRecord(config, config.folder, world, config.tensorboard)
    if record.complete:
        return record.say_complete()
    with record.start():
        run = prepare(config, world, record)
    with runs.progress_bar(run, config.epochs * run.data.updates_per_epoch(config.batch, config.passes)) as bar:
        while run.progress.epoch < config.epochs:
            if not train_epoch(run, bar):
                return runs.say_stopped(run)
            finish_epoch(run, evaluated.scores(run, evaluate, renew_statistics))
    finish(run)
    return 0


def train_epoch(run: ImageRun, bar: tqdm) -> bool:
    """Train to the end of the epoch; False if a signal came before (all is saved then)."""
    config, world, progress = run.config, run.world, run.progress
    run.network.train()
    batches = run.data.train_batches(
        progress.epoch,
        config.batch,
        config.passes,
        world.rank,
        world.world_size,
        start_update=progress.update_in_epoch,
        channels_last=config.channels_last,
    )
    runs.start_clock(run)
    for passes in batches:
        take_gradients(run, passes)
        wish = runs.end_update(run, bar, partial(take_gradients, run, passes, again=True))

        if progress.update % config.log_every == 0:
            log(run, bar)
        if wish != Wish.GO_ON:
            runs.save(run)
        if wish == Wish.STOP:
            return False
    log(run, bar)
    return True


def forward_backward(
    run: ImageRun, images: torch.Tensor, labels: torch.Tensor, passes: int = 1, is_last: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add one pass to the gradients; returns the mean loss, and the number of right images."""
    with run.precision.autocast():
        logits = run.network(images)
        loss = cross_entropy(logits.float(), labels)
    run.precision.backward(loss / passes, is_last)
    return loss.detach(), (logits.argmax(1) == labels).sum()


def take_gradients(run: ImageRun, passes: list[tuple[int, Batch]], again: bool = False) -> torch.Tensor:
    """Take an update's gradients; returns this rank's mean loss. `again`: for a closure, uncounted."""
    config, world, total = run.config, run.world, 0.0
    run.optimizer.zero_grad()
    for index, (images, labels) in passes:
        is_last = index + world.world_size >= config.passes
        seed_step(config.seed, "step", run.progress.update, index)  # the same dropout on any rank
        if config.passes > 1 or run.needs == "closure":
            track_statistics(run.model, index == 0 and not again)
        with runs.averaged_over_ranks(run, is_last):
            loss, correct = run.forward_backward(run, images, labels, len(passes), is_last)
        total += loss / len(passes)
        if not again:
            damaged = run.data.take_damaged()
            run.window.add(loss=loss * len(labels), correct=correct, examples=len(labels), damaged=damaged)
    return total


def log(run: ImageRun, bar: tqdm) -> None:
    if sums := runs.close_window(run):
        runs.log_window(run, bar, **means(sums))


def means(sums: dict[str, float], split: str = "") -> dict[str, float]:
    """Mean loss and top-1 accuracy in per cent; names begin with `split`."""
    return {
        f"{split}loss": sums["loss"] / sums["examples"],
        f"{split}top1": 100 * sums["correct"] / sums["examples"],
    }


def evaluate(run: ImageRun) -> dict[str, float]:
    """Loss and top-1 accuracy on the test images and validation images, if any."""
    config, data, world = run.config, run.data, run.world
    world.copy_buffers(run.model)
    part = (config.eval_batch, world.rank, world.world_size, config.channels_last)
    found = means(score(run, data.test_batches(*part), data.test_size), "test_")
    if data.valid_size:
        found |= means(score(run, data.valid_batches(*part), data.valid_size), "valid_")
    return found


@torch.inference_mode()
def score(run: ImageRun, batches: Iterable[Batch], size: int) -> dict[str, float]:
    """Sums over a set of `size` images, each counted once over all ranks."""
    run.model.eval()
    sums = Sums(("loss", "correct", "examples"), run.world.device)
    for images, labels in batches:
        with run.precision.autocast():
            logits = run.model(images)
        loss = cross_entropy(logits.float(), labels, reduction="sum")
        sums.add(loss=loss, correct=(logits.argmax(1) == labels).sum(), examples=len(labels))
    total = sums.reduce(run.world)
    if total["examples"] != size:
        raise RuntimeError(f"evaluated {total['examples']:.0f} images of a set of {size}")
    return total


def finish_epoch(run: ImageRun, tested: dict[str, float]) -> None:
    """Record the epoch, and save."""
    progress, sums = run.progress, run.progress.since_evaluation
    damaged = {"damaged": int(sums["damaged"])} if sums["damaged"] else {}
    progress.best = max(evaluated.of_result(tested, "test_top1"), progress.best or 0.0)
    runs.record_evaluation(run, "epoch", damaged | means(sums, "train_"), tested)
    runs.end_epoch(run)
    last = progress.last
    run.record.say(
        f"epoch {progress.epoch:>3}/{run.config.epochs}  train loss {last['train_loss']:.4f}  "
        f"test loss {last['test_loss']:.4f}  top-1 {last['test_top1']:.2f}  "
        f"lr {last['lr']:.3g}  {last['examples_per_s']:.0f} images/s"
    )
    runs.save(run)


def finish(run: ImageRun) -> None:
    """Write result.json and say the scores."""
    last = evaluated.last_scores(run, evaluate, renew_statistics)
    found = evaluated.results(last, final="test_top1", validation="valid_top1")
    run.progress.best = best = max(found["final"], run.progress.best)
    runs.write_result(run, metric="top1", **found, evaluated=run.data.test_size)
    run.record.say(f"done: top-1 {found['final']:.2f} at the end, {best:.2f} at best; {run.record.folder}/result.json")


def prepare(config: Config, world: World, record: RunRecord) -> ImageRun:
    """Build what the loop needs, and restore the last checkpoint if there is one."""
    world.require_divisible(config.batch, config.passes)
    precision = runs.create_precision(config.precision, world.device, record.say)
    torch.backends.cudnn.benchmark = not config.deterministic  # every batch has the same shape
    with world.main_first():  # it may have to download
        data = load_data(config.data, world.device, config.seed)

    seed_step(config.seed, "initialisation")
    with settings_of("model"):
        model = create_model(config.model.name, data.num_classes, depth=config.model.depth)
    if config.batchnorm_group:
        normalise_in_groups(model, config.batchnorm_group)
    model.to(world.device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    model, optimizer = runs.with_optimizer(model, config, precision)
    graph = uses_graph(config, optimizer, world.device, world.world_size)

    run = runs.assemble(
        ImageRun,
        config,
        world,
        record,
        precision,
        model,
        optimizer,
        network=torch.compile(model) if config.compile else model,
        total=config.epochs,
        updates_per_unit=data.updates_per_epoch(config.batch, config.passes),
        data=data,
        forward_backward=forward_backward,
    )
    runs.restore(run)
    if graph:
        use_graphs(run)
    runs.write_environment(
        run,
        graph=graph,
        batchnorm_batch=config.batchnorm_group or config.batch,
        train_examples=data.train_size,
        valid_examples=data.valid_size,
        test_examples=data.test_size,
    )
    return run


if __name__ == "__main__":
    run_main(main)
