"""Train a language model: python -m language_model.train CONFIG [key=value ...]     (also under torchrun)

The whole run, top to bottom: config, distributed, seed, data, model, optimizer, schedule, resume; then, for each epoch,
train, evaluate, record, save. Interrupt it at any moment and run the same command again: it goes on where it was, the
network's state included, and on the CPU it ends with bit-identical weights.
"""

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from tqdm import tqdm

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
from language_model.data import ScoredBatch, TextData, load_corpus, perplexities, perplexity
from language_model.model import LanguageModel
from optim import create_optimizer
from optim.lr_scheduler import create_schedule

USAGE = "usage: python -m language_model.train CONFIG [key=value ...]     e.g. configs/one_billion_words/apollo.yaml"
METRICS = ("loss", "count")


class DataConfig(Strict):
    name: Literal["prepared", "pydoc_topics"]  # a folder that language_model.prepare wrote, or Python's own topics
    root: str = "data/one_billion_words"  # of prepared


class ModelConfig(Strict):
    name: Literal["lstm", "gru", "rnn"]
    cutoffs: list[PositiveInt]  # of the adaptive softmax; LanguageModel says what all of these mean
    embedding: PositiveInt = 300
    hidden: PositiveInt = 2048
    layers: PositiveInt = 2
    dropout: float = Field(0.1, ge=0, lt=1)
    div_value: float = Field(4.0, ge=1)


class Config(RunConfig):
    epochs: PositiveInt
    data: DataConfig
    model: ModelConfig
    sequence_length: PositiveInt = 20  # tokens of each of the global_batch rows in an update
    gradient_clip: PositiveFloat | None = None
    gradient_clip_norm: Literal["total", "tensor"] = "total"  # of all gradients together, or of each tensor's own
    eval_rows: PositiveInt = 32  # that the test text is cut into; the state starts from zero in each


@dataclass
class Run:
    """What the loop works with, made once by `prepare`."""

    config: Config
    world: World
    record: RunRecord
    data: TextData
    model: LanguageModel  # the model itself: evaluated and saved
    network: torch.nn.Module  # the model as trained: in DistributedDataParallel
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    precision: Precision
    state: torch.Tensor  # of this rank's rows
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
    updates = config.epochs * run.data.updates_per_epoch
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
        metric="ppl",
        final=last["test_ppl"],
        best=progress.best,
        epochs=progress.epoch,
        evaluated=run.data.test_tokens,
        test_files=run.data.corpus.facts["test"]["files"],
        **final_perplexities(run),
        vocabulary=run.data.corpus.words,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        tokens_per_s=round(progress.update * config.global_batch * config.sequence_length / progress.train_s, 1),
        optimizer_ms_per_step=round(median(run.optimizer_ms), 3) if run.optimizer_ms else None,
        peak_memory_mb=round(peak_memory_mb(world.device), 1),
    )
    record.say(
        f"done: perplexity {last['test_ppl']:.2f} at the end, {progress.best:.2f} at best, over "
        f"{run.data.test_tokens:,} tokens of {', '.join(run.data.corpus.facts['test']['files'])}; "
        f"{record.folder}/result.json"
    )
    return 0


def prepare(config: Config, world: World, record: RunRecord) -> Run:
    """Build everything the loop needs, and take up the run folder's last checkpoint if there is one."""
    per_pass = world.share(config.global_batch, config.accumulation)
    precision = create_precision(config.precision, world.device)
    if (config.precision, config.model.name, world.device.type) == ("fp16", "lstm", "cpu"):
        raise UserError("precision=fp16: on CPUs there is no LSTM in float16; use precision=bf16")
    if config.compile:
        raise UserError("compile=true: torch.compile does not take LSTMs, nor clusters of ever new sizes; leave it out")
    if world.device.type == "cpu":
        keep_freed_memory()

    corpus = load_corpus(config.data)
    data = TextData(corpus, config.global_batch, config.sequence_length, device=world.device, seed=config.seed)
    seed_step(config.seed, "initialisation")
    sizes = config.model.model_dump(exclude={"name"})
    with settings_of("model"):
        model = LanguageModel(corpus.words, config.model.name, **sizes).to(world.device)

    with settings_of("optimizer"):
        optimizer = create_optimizer(config.optimizer.name, model.parameters(), **config.optimizer.settings)
    model, optimizer = precision.prepare(model, optimizer)
    network = precision.data_parallel(model, world.device) if world.world_size > 1 else model
    with settings_of("schedule"):
        schedule = create_schedule(
            optimizer,
            config.schedule.name,
            updates_per_unit=data.updates_per_epoch,
            total=config.epochs,
            **config.schedule.settings,
        )

    window = Sums(METRICS, world.device)
    rows = config.global_batch // world.world_size
    state = model.zero_state(rows)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "precision": precision}
    progress = Progress()
    checkpoints = Checkpoints(
        record.folder, parts, world, config.checkpoint.keep, config.checkpoint.minutes, say=record.say
    )
    saved = checkpoints.restore(progress)
    if saved:
        if saved["vocabulary"] != corpus.vocabulary_digest:
            raise UserError(
                f"{record.folder}: trained with another vocabulary than that of the data: use another run_dir"
            )
        window.scatter(saved["window"], world)
        state.copy_(saved["state"][:, :, world.rank * rows : (world.rank + 1) * rows])
        record.say(f"resuming at epoch {progress.epoch + 1}, update {progress.update}")
    else:
        record.say(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {corpus.words:,} words")
    record.rewind(saved and saved["record"])
    record.environment(
        world_size=world.world_size,
        global_batch=config.global_batch,
        per_rank_batch=per_pass * config.accumulation,
        accumulation=config.accumulation,
        updates_per_epoch=data.updates_per_epoch,
        data=corpus.facts,
    )
    return Run(
        config, world, record, data, model, network, optimizer, schedule, precision, state, window, progress,
        checkpoints, stop=StopRequest(),
    )  # fmt: skip


def train_epoch(run: Run, bar: tqdm) -> dict[str, float] | None:
    """Train to the end of the epoch; its metrics, or None where a signal asked to stop (everything is saved then)."""
    config, world, progress = run.config, run.world, run.progress
    run.network.train()
    batches = run.data.train_batches(
        progress.epoch, world.rank, world.world_size, start_update=progress.update_in_epoch
    )
    per_pass = world.share(config.global_batch, config.accumulation)
    clock = time.perf_counter()
    for batch in batches:
        if batch.starts_shard:
            run.state = torch.zeros_like(run.state)
        seed_step(config.seed, "step", progress.update, world.rank)
        run.optimizer.zero_grad()
        passes = zip(
            batch.tokens.split(per_pass, 1), batch.targets.split(per_pass, 1), run.state.split(per_pass, 2), strict=True
        )
        states = []
        for index, (tokens, targets, state) in enumerate(passes):
            is_last = index == config.accumulation - 1
            with nullcontext() if is_last or world.world_size == 1 else run.network.no_sync():
                with run.precision.autocast():
                    log_prob, state = run.network(tokens, targets, state)
                loss = -log_prob.mean()
                run.precision.backward(loss / config.accumulation, is_last)
            states.append(state)
            run.window.add(loss=loss * targets.numel(), count=targets.numel())
        run.state = torch.cat(states, 2)
        clip_gradients(run)
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
            bar.set_postfix(epoch=progress.epoch + 1, ppl=f"{means['ppl']:.1f}")
        wish = agree(world, run.stop, run.checkpoints.due(), progress.update)
        if wish != Wish.GO_ON:
            save(run)
            clock = time.perf_counter()
        if wish == Wish.STOP:
            return None
    close_window(run)
    loss = progress.totals["loss"] / progress.totals["count"]
    return {
        "train_loss": loss,
        "train_ppl": perplexity(loss),
        "lr": progress.lr,
        "tokens_per_s": round(progress.totals["count"] / progress.epoch_s, 1),
    }


def clip_gradients(run: Run) -> None:
    """Scale the gradients down to the norm `gradient_clip`: all of them together, or each tensor by itself."""
    limit = run.config.gradient_clip
    if limit is None:
        return
    parameters = list(run.model.parameters())
    if run.config.gradient_clip_norm == "total":
        run.precision.clip(run.optimizer, parameters, limit)
        return
    run.precision.clip(run.optimizer, parameters, math.inf)  # takes the loss's scale off, and no more
    for parameter in parameters:
        torch.nn.utils.clip_grad_norm_(parameter, limit)


def close_window(run: Run) -> dict[str, float]:
    """Record the training metrics since the last log line, and add them to the epoch's totals."""
    sums = run.window.reduce(run.world)
    run.window.zero()
    progress = run.progress
    progress.totals = {name: progress.totals.get(name, 0.0) + value for name, value in sums.items()}
    if not sums["count"]:  # the epoch ended with a log line
        return {}
    loss = sums["loss"] / sums["count"]
    require_finite(loss, progress.update)
    means = {"loss": loss, "ppl": perplexity(loss)}
    speed = round(progress.totals["count"] / progress.epoch_s, 1)
    run.record.metrics("train", progress.update, epoch=progress.epoch + 1, **means, lr=progress.lr, tokens_per_s=speed)
    return means


def evaluate(run: Run) -> dict[str, float]:
    """Loss and perplexity on the test text, each token counted exactly once over all ranks."""
    batches = run.data.test_batches(run.config.eval_rows, run.world.rank, run.world.world_size)
    total = score(run.model, batches, run.precision, run.world)
    if total["count"] != run.data.test_tokens:
        raise RuntimeError(f"evaluated {total['count']:.0f} tokens of a test set of {run.data.test_tokens}")
    loss = total["loss"] / total["count"]
    require_finite(loss, run.progress.update)
    return {"test_loss": loss, "test_ppl": perplexity(loss)}


def final_perplexities(run: Run) -> dict[str, float]:
    """By each denominator: of the test set; and of all held-out files (all_...), where they were prepared."""
    data, corpus, world = run.data, run.data.corpus, run.world
    sentences = sum(shard.sentences for shard in corpus.test)
    found = perplexities(run.progress.last["test_loss"] * data.test_tokens, data.test_tokens, sentences)
    if corpus.all_test:
        batches = data.test_batches(run.config.eval_rows, world.rank, world.world_size, shards=corpus.all_test)
        loss = score(run.model, batches, run.precision, world)["loss"]
        facts = corpus.facts["all_test"]
        found |= {"all_files": len(facts["files"]), "all_tokens": facts["tokens"]}
        of_all = perplexities(loss, facts["tokens"], facts["sentences"])
        found |= {f"all_{name}": value for name, value in of_all.items()}
    return found


@torch.inference_mode()
def score(model: LanguageModel, batches: Iterable[ScoredBatch], precision: Precision, world: World) -> dict[str, float]:
    """Sums over all ranks: `loss`, the negative log-probabilities of all tokens counted in `batches`, and `count`."""
    model.eval()
    sums, state = Sums(METRICS, world.device), None
    for tokens, targets, counted in batches:
        state = model.zero_state(tokens.shape[1]) if state is None else state
        with precision.autocast():
            log_prob, state = model(tokens, targets, state)
        sums.add(loss=-torch.where(counted, log_prob, 0.0).sum(dtype=torch.float64), count=counted.sum())
    return sums.reduce(world)


def finish_epoch(run: Run, trained: dict[str, float], tested: dict[str, float]) -> None:
    """Record the epoch, and save: the next one starts from here."""
    progress = run.progress
    progress.epoch += 1
    progress.train_s += progress.epoch_s
    progress.update_in_epoch, progress.epoch_s, progress.totals = 0, 0.0, {}
    progress.best = min(tested["test_ppl"], progress.best or math.inf)
    progress.last = trained | tested
    run.record.metrics(
        "epoch", progress.update, epoch=progress.epoch, **progress.last, wall_s=round(run.record.wall_s, 1)
    )
    run.record.say(
        f"epoch {progress.epoch:>3}/{run.config.epochs}  train ppl {trained['train_ppl']:.2f}  "
        f"test loss {tested['test_loss']:.4f}  ppl {tested['test_ppl']:.2f}  "
        f"lr {trained['lr']:.3g}  {trained['tokens_per_s']:.0f} tokens/s"
    )
    save(run)


def save(run: Run) -> None:
    """Write a checkpoint, unless the training loss has become non-finite: such weights must not push out good ones."""
    window = run.window.gather(run.world)
    require_finite(float(window[:, 0].sum()), run.progress.update)
    extra = {
        "window": window,
        "state": gather_state(run),
        "vocabulary": run.data.corpus.vocabulary_digest,
        "record": run.record.position(),
    }
    run.checkpoints.save(run.progress, extra)


def gather_state(run: Run) -> torch.Tensor:
    """The state of all rows of all ranks, [parts, layers, global_batch, hidden]: any number of ranks can take it up."""
    parts, layers, rows, hidden = run.state.shape
    state = run.state.new_zeros(parts, layers, run.config.global_batch, hidden)
    state[:, :, run.world.rank * rows : (run.world.rank + 1) * rows] = run.state
    return run.world.sum(state)


if __name__ == "__main__":
    run_main(main)
