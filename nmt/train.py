"""Train a translation model: python -m nmt.train CONFIG [key=value ...]     (also under torchrun)

The whole run, top to bottom: config, distributed, seed, data, model, optimizer, schedule, resume; then update after
update, with a validation and weights kept for averaging every so many; at the end the average of the last kept weights
translates the test set. Batches are counted in tokens; losses are in nats per target token, EOS counted, padding not.

Interrupt it at any moment and run the same command again: it goes on where it was, and on the CPU it ends with
bit-identical weights.
"""

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from tqdm import tqdm

from engine.allocator import keep_freed_memory
from engine.checkpoint import Checkpoints, Progress
from engine.clipping import COUNTS, ClippingWatch
from engine.config import RunConfig, Strict, load_config
from engine.distributed import World, setup
from engine.errors import UserError, run_main, settings_of
from engine.interrupt import StopRequest, Wish, agree
from engine.metrics import Sums, require_finite
from engine.precision import Precision, create_precision, optimizer_step
from engine.run_record import RunRecord, peak_memory_mb
from engine.seed import seed_step
from nmt.averaging import average_weights, keep_weights
from nmt.beam_search import translate
from nmt.codec import EOS
from nmt.data import Batch, ParallelData, Split, eval_batches, load_data, train_batches, updates_per_epoch
from nmt.model import ModelConfig, Transformer, create_model
from nmt.scoring import all_scores, sacre_bleu
from optim import create_optimizer
from optim.lr_scheduler import create_schedule

USAGE = "usage: python -m nmt.train CONFIG [key=value ...]     e.g. configs/wmt14_en_de/apollo.yaml"
METRICS = ("loss", "nll", "tokens")


class DataConfig(Strict):
    name: str  # of the recipe that the data were prepared by
    root: str


class AverageConfig(Strict):
    every: PositiveInt | None = None  # updates between the weights kept; None: they are kept at the end of each epoch
    last: PositiveInt = 10  # how many are kept and averaged


class DecodingConfig(Strict):
    beam: PositiveInt = 5
    length_penalty: NonNegativeFloat = 0.6


class Config(RunConfig):
    batch: PositiveInt  # tokens of one pass, the longer side with its padding counted
    passes: PositiveInt = 1  # that make an update; the ranks divide them
    global_batch: None = None  # not a key here
    accumulation: None = None  # not a key here
    updates: PositiveInt
    data: DataConfig
    model: ModelConfig = ModelConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    gradient_clip: PositiveFloat = 1.0  # greatest norm of all gradients together
    validate_every: PositiveInt  # updates
    average: AverageConfig
    decoding: DecodingConfig = DecodingConfig()
    eval_batch: PositiveInt = 4096  # tokens per rank, in validation and in decoding


@dataclass
class Run:
    """What the loop works with, made once by `prepare`."""

    config: Config
    world: World
    record: RunRecord
    data: ParallelData
    model: Transformer  # the model itself: evaluated and saved
    network: torch.nn.Module  # the model as trained: with several ranks, in DistributedDataParallel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    precision: Precision
    window: Sums  # training metrics since the last log line
    progress: Progress  # its totals and epoch_s count from the last validation on
    checkpoints: Checkpoints
    stop: StopRequest
    clipping: ClippingWatch
    updates_per_epoch: int
    gradient_norm: torch.Tensor | None = None  # of the last update, before clipping
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
    with tqdm(
        total=config.updates, initial=progress.update, unit="update", disable=None if world.is_main else True
    ) as bar:
        if not train_updates(run, bar):
            record.say(
                f"stopped at update {progress.update} by {run.stop.signal.name}; saved: the same command goes on"
            )
            return run.stop.exit_status
    tested = test(run)
    record.finish(
        table=config.table,
        row=config.row,
        schedule=config.schedule.name,
        seed=config.seed,
        metric="fairseq_bleu",
        final=tested["fairseq_bleu"],
        best=progress.best,
        updates=progress.update,
        epochs=progress.epoch,
        evaluated=len(run.data.test),
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        vocabulary=run.data.codec.size,
        **tested,
        tokens_per_s=round(progress.last["tokens"] / progress.train_s, 1),
        optimizer_ms_per_step=round(median(run.optimizer_ms), 3) if run.optimizer_ms else None,
        peak_memory_mb=round(peak_memory_mb(world.device), 1),
    )
    record.say(
        f"done: test BLEU {tested['fairseq_bleu']:.2f} as fairseq prints it, sacreBLEU {tested['sacrebleu']:.2f} "
        f"({tested['signature']}); {record.folder}/result.json"
    )
    return 0


def prepare(config: Config, world: World, record: RunRecord) -> Run:
    """Build everything the loop needs, and take up the run folder's last checkpoint if there is one."""
    if config.passes % world.world_size:
        raise UserError(
            f"passes={config.passes} cannot be divided among {world.world_size} ranks: start as many as divide it, or "
            "change passes and batch (which is another recipe)"
        )
    precision = create_precision(config.precision, world.device)
    if world.device.type == "cpu":
        keep_freed_memory()

    if not world.is_main:
        world.barrier()  # rank 0 may have to make the data, the others then find them
    data = load_data(config.data.name, config.data.root)
    if world.is_main:
        world.barrier()

    seed_step(config.seed, "initialisation")
    model = create_model(config.model, data.codec.size).to(world.device)
    with settings_of("optimizer"):
        optimizer = create_optimizer(config.optimizer.name, model.parameters(), **config.optimizer.settings)
    model, optimizer = precision.prepare(model, optimizer)
    if config.compile:  # the layers, where the time goes; embeddings and loss stay as they are
        for layer in (*model.encoder, *model.decoder):
            layer.compile(dynamic=True)
    network = model if world.world_size == 1 else precision.data_parallel(model, world.device)
    with settings_of("schedule"):
        schedule = create_schedule(optimizer, config.schedule.name, total=config.updates, **config.schedule.settings)

    window = Sums((*METRICS, *COUNTS), world.device)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "precision": precision}
    progress = Progress()
    checkpoints = Checkpoints(
        record.folder, parts, world, config.checkpoint.keep, config.checkpoint.minutes, say=record.say
    )
    saved = checkpoints.restore(progress)
    if saved:
        if saved["codec"] != data.codec.digest:
            raise UserError(
                f"{record.folder} was trained with another vocabulary than that of {config.data.root}: "
                "choose another run_dir, or the data.root it was trained from"
            )
        window.scatter(saved["window"], world)
        record.say(f"resuming at epoch {progress.epoch + 1}, update {progress.update}")
    record.rewind(saved and saved["record"])
    if world.is_main:
        data.codec.save(record.folder)  # so that the run folder can translate without the data
    epoch_updates = updates_per_epoch(data.train, config.batch, config.passes)
    record.environment(
        world_size=world.world_size,
        batch=config.batch,
        passes=config.passes,
        updates_per_epoch=epoch_updates,
        vocabulary=data.codec.size,
        codec=data.codec.digest,
        train_pairs=len(data.train),
        valid_pairs=len(data.valid),
        test_pairs=len(data.test),
    )
    return Run(
        config, world, record, data, model, network, optimizer, schedule, precision, window, progress, checkpoints,
        stop=StopRequest(), clipping=ClippingWatch(config.optimizer, config.schedule, record.say),
        updates_per_epoch=epoch_updates,
    )  # fmt: skip


def train_updates(run: Run, bar: tqdm) -> bool:
    """Train to the last update; False where a signal asked to stop before it (everything is saved then)."""
    config, progress = run.config, run.progress
    clock = time.perf_counter()
    for passes in upcoming(run):
        update(run, passes)
        progress.epoch_s += time.perf_counter() - clock
        if progress.update % config.log_every == 0:
            means = close_window(run)
            bar.set_postfix(epoch=progress.epoch + 1, loss=f"{means['loss']:.4f}")
        bar.update()

        is_last = progress.update == config.updates
        validates, keeps = is_last or progress.update % config.validate_every == 0, is_kept(run)
        if validates:
            validate(run)
        if keeps:
            keep(run)
        wish = agree(run.world, run.stop, run.checkpoints.due(), progress.update)
        if wish != Wish.GO_ON or validates or keeps:
            save(run)
        if is_last:
            break
        if wish == Wish.STOP:
            return False
        clock = time.perf_counter()
    return True


def upcoming(run: Run) -> Iterator[list[tuple[int, Batch]]]:
    """The passes of every update from where the run is to its end, on this rank, epoch after epoch."""
    config, world, progress = run.config, run.world, run.progress
    while progress.update < config.updates:
        yield from train_batches(
            run.data.train,
            config.batch,
            config.passes,
            config.seed,
            progress.epoch,
            world.rank,
            world.world_size,
            start_update=progress.update_in_epoch,
        )
        progress.epoch += 1
        progress.update_in_epoch = 0


def update(run: Run, passes: list[tuple[int, Batch]]) -> None:
    """One optimizer update from the mean loss of all target tokens, over all passes of all ranks."""
    config, world, progress = run.config, run.world, run.progress
    run.network.train()
    run.optimizer.zero_grad()
    tokens = torch.full((), float(sum(batch.tokens for _, batch in passes)), device=world.device)
    # The gradients are averaged over ranks after each has divided by the tokens of all.
    share = world.world_size / world.sum(tokens)
    for index, batch in passes:
        is_last = index + world.world_size >= config.passes
        seed_step(config.seed, "step", progress.update, index)  # dropout is the same whichever rank takes the pass
        source, target_in, target_out = batch.to(world.device)[:3]
        with nullcontext() if is_last or world.world_size == 1 else run.network.no_sync():
            with run.precision.autocast():
                loss, nll = run.network(source, target_in, target_out, batch.tokens, config.label_smoothing)
            run.precision.backward(loss * share, is_last)
        run.window.add(loss=loss, nll=nll, tokens=batch.tokens)
    run.gradient_norm = run.precision.clip(run.optimizer, run.model.parameters(), config.gradient_clip)
    run.window.add(clipped=run.gradient_norm > config.gradient_clip, updates=1)
    progress.lr = float(run.optimizer.param_groups[0]["lr"])
    sample = run.optimizer_ms if progress.update % config.log_every == 0 else None
    if optimizer_step(run.precision, run.optimizer, world, sample):
        run.schedule.step()  # an update that the scaler skips advances nothing
    progress.update += 1
    progress.update_in_epoch += 1


def close_window(run: Run) -> dict[str, float]:
    """Record the training metrics since the last log line, and add them to the totals since the last validation."""
    sums = run.window.reduce(run.world)
    run.window.zero()
    progress = run.progress
    progress.totals = {name: progress.totals.get(name, 0.0) + value for name, value in sums.items()}
    if not sums["tokens"]:  # the interval ended with a log line
        return {}
    require_finite(sums["loss"], progress.update)
    means = {name: sums[name] / sums["tokens"] for name in ("loss", "nll")}
    norm = float(run.gradient_norm)
    run.record.metrics(
        "train",
        progress.update,
        epoch=progress.epoch + 1,
        **means,
        gradient_norm=norm if math.isfinite(norm) else None,  # of the last update; an overflow, where it was skipped
        clipped=run.clipping.share(sums, progress.update, run.world.world_size),
        lr=progress.lr,
        tokens_per_s=round(progress.totals["tokens"] / progress.epoch_s, 1),
    )
    return means


def validate(run: Run) -> None:
    """Loss and BLEU on the validation set, recorded beside the mean training loss since the last time."""
    close_window(run)
    progress, totals = run.progress, run.progress.totals
    loss, nll = validation_loss(run, run.data.valid)
    hypotheses = translate_split(run.model, run.data.valid, run.config, run.world)
    bleu, _ = sacre_bleu([run.data.codec.decode(ids) for ids in hypotheses], run.data.valid.references)
    tokens = progress.last.get("tokens", 0.0) + totals["tokens"]
    speed = round(totals["tokens"] / progress.epoch_s, 1)
    progress.train_s += progress.epoch_s
    progress.epoch_s, progress.totals = 0.0, {}
    progress.best = max(bleu, progress.best or 0.0)
    progress.last = {
        "train_loss": totals["loss"] / totals["tokens"],
        "train_nll": totals["nll"] / totals["tokens"],
        "valid_loss": loss,
        "valid_nll": nll,
        "valid_ppl": math.exp(min(nll, 700.0)),
        "valid_bleu": bleu,
        "lr": progress.lr,
        "tokens": tokens,  # trained on so far
        "tokens_per_s": speed,
    }
    run.record.metrics(
        "validation", progress.update, epoch=progress.epoch + 1, **progress.last, wall_s=round(run.record.wall_s, 1)
    )
    run.record.say(
        f"update {progress.update:>6}  epoch {progress.epoch + 1:>3}  train loss {progress.last['train_loss']:.4f}  "
        f"valid loss {loss:.4f}  ppl {progress.last['valid_ppl']:.5g}  BLEU {bleu:.2f}  lr {progress.lr:.3g}  "
        f"{speed:.0f} tokens/s"
    )


@torch.no_grad()
def validation_loss(run: Run, split: Split) -> tuple[float, float]:
    """Label-smoothed loss and nll per target token, each pair counted exactly once over all ranks."""
    run.model.eval()
    world, sums = run.world, Sums((*METRICS, "count"), run.world.device)
    for batch, indices in eval_batches(split, run.config.eval_batch, world.rank, world.world_size):
        source, target_in, target_out = batch.to(world.device)[:3]
        with run.precision.autocast():
            loss, nll = run.model(source, target_in, target_out, batch.tokens, run.config.label_smoothing)
        sums.add(loss=loss, nll=nll, tokens=batch.tokens, count=len(indices))
    total = sums.reduce(world)
    if total["count"] != len(split):
        raise RuntimeError(f"evaluated {total['count']:.0f} pairs of {len(split)}")
    return total["loss"] / total["tokens"], total["nll"] / total["tokens"]


def translate_split(model: Transformer, split: Split, config: Config, world: World) -> list[list[int]]:
    """The ids of the translations of all of `split`, made by all ranks together, known to each; always in fp32."""
    decoding = config.decoding
    share = range(world.rank, len(split), world.world_size)
    sources = [split.source(i) for i in share]
    hypotheses = translate(model, sources, decoding.beam, decoding.length_penalty, config.eval_batch, world.is_main)
    longest = world.max(max((len(hypothesis.words) for hypothesis in hypotheses), default=0))
    rows = torch.zeros(len(split), longest + 1, dtype=torch.int64)
    for i, hypothesis in zip(share, hypotheses, strict=True):
        rows[i, : len(hypothesis.words) + 1] = torch.tensor([*hypothesis.words, EOS])
    rows = world.sum(rows.to(world.device)).tolist()
    return [row[: row.index(EOS)] for row in rows]


def test(run: Run) -> dict[str, object]:
    """Scores of the averaged weights on the test set; the translations are written to the run folder."""
    run.world.barrier()  # rank 0 has written the last weights
    weights, updates = average_weights(run.record.folder, run.config.average.last, run.data.codec.digest)
    run.model.load_state_dict(weights)
    hypotheses = translate_split(run.model, run.data.test, run.config, run.world)
    if run.world.is_main:
        path = run.record.folder / f"test.{run.data.codec.target}.txt"
        path.write_text("".join(run.data.codec.decode(ids) + "\n" for ids in hypotheses), encoding="utf-8")
    scores = all_scores(hypotheses, run.data.test.references, run.data.codec)
    return {**scores, **run.config.decoding.model_dump(), "averaged_updates": updates}


def is_kept(run: Run) -> bool:
    """Whether the weights after this update are to be averaged; the last ones are where there would be none else."""
    config, progress = run.config, run.progress
    is_last = progress.update == config.updates
    if config.average.every:
        return is_last or progress.update % config.average.every == 0
    return progress.update_in_epoch == run.updates_per_epoch or (is_last and progress.epoch == 0)


def keep(run: Run) -> None:
    """Keep the weights for averaging, unless the training loss has become non-finite."""
    require_finite(run.window.reduce(run.world)["loss"], run.progress.update)
    if run.world.is_main:
        digest, last = run.data.codec.digest, run.config.average.last
        keep_weights(run.record.folder, run.progress.update, run.model, digest, last)


def save(run: Run) -> None:
    """Write a checkpoint, unless the training loss has become non-finite: such weights must not push out good ones."""
    window = run.window.gather(run.world)
    require_finite(float(window[:, 0].sum()), run.progress.update)
    run.checkpoints.save(
        run.progress, extra={"window": window, "record": run.record.position(), "codec": run.data.codec.digest}
    )


if __name__ == "__main__":
    run_main(main)
