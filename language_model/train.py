"""Train a language model: python -m language_model.train CONFIG [key=value ...]     (also under torchrun)

Read it top to bottom; `prepare` makes what the loop needs. After an interruption the same command continues the run, on
the CPU to bit-identical weights.
"""

import math
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm

from engine import evaluated
from engine import run as runs
from engine.clipping import COUNTS, ClippingWatch
from engine.distributed import World, setup
from engine.errors import UserError, run_main, settings_of
from engine.interrupt import Wish
from engine.metrics import require_finite
from engine.run_record import RunRecord
from engine.seed import seed_step
from language_model.config import Config
from language_model.data import TextData, TrainBatch, hold_out, load_corpus, read_text
from language_model.model import Network, create_model
from language_model.scoring import final_perplexities, perplexity, score
from language_model.softmax import cluster_sizes

USAGE = "usage: python -m language_model.train CONFIG [key=value ...]     e.g. configs/one_billion_words/apollo.yaml"


@dataclass(kw_only=True)
class TextRun(runs.Run):
    METRICS, COUNTED = ("loss", "tokens", *COUNTS), "tokens"

    config: Config
    model: Network
    data: TextData
    clipping: ClippingWatch
    states: dict[int, torch.Tensor]  # of this rank's passes, with the rows in dimension 2


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
    with runs.progress_bar(run, config.epochs * run.data.updates_per_epoch) as bar:
        while run.progress.epoch < config.epochs:
            if not train_epoch(run, bar):
                return runs.say_stopped(run)
            finish_epoch(run, evaluated.scores(run, evaluate))
    finish(run)
    return 0


def train_epoch(run: TextRun, bar: tqdm) -> bool:
    """Train to the end of the epoch; False if a signal came before that (all is saved then)."""
    config, world, progress = run.config, run.world, run.progress
    run.network.train()
    batches = run.data.train_batches(
        progress.epoch, world.rank, world.world_size, start_update=progress.update_in_epoch
    )
    runs.start_clock(run)
    for passes in batches:
        before = dict(run.states)
        take_gradients(run, passes, before)
        wish = runs.end_update(run, bar, partial(take_gradients, run, passes, before, again=True))

        if progress.update % config.log_every == 0:
            log(run, bar)
        if wish != Wish.GO_ON:
            save(run)
        if wish == Wish.STOP:
            return False
    log(run, bar)
    return True


def take_gradients(
    run: TextRun, passes: list[tuple[int, TrainBatch]], before: dict[int, torch.Tensor], again: bool = False
) -> torch.Tensor:
    """Take an update's gradients from states `before`; returns the mean loss. `again`: for a closure, uncounted."""
    config, world, total = run.config, run.world, 0.0
    run.optimizer.zero_grad()
    for index, (tokens, targets, starts_shard, on_host) in passes:
        is_last = index + world.world_size >= config.passes
        seed_step(config.seed, "step", run.progress.update, index)  # the same dropout on any rank
        state = torch.zeros_like(before[index]) if starts_shard else before[index]
        with runs.averaged_over_ranks(run, is_last):
            with run.precision.autocast():
                sizes = cluster_sizes(run.model.softmax, on_host)
                log_prob, state = run.network(tokens, targets, state, sizes)
            loss = -log_prob.mean()
            share = loss / len(passes)
            run.precision.backward(share, is_last)
        total += share.detach()
        if not again:
            run.states[index] = state
            run.window.add(loss=loss * targets.numel(), tokens=targets.numel())
    if config.gradient_clip:
        norm = run.precision.clip(run.optimizer, run.model.parameters(), config.gradient_clip)
        if not again:
            run.window.add(clipped=norm > config.gradient_clip, updates=1)
    return total


def log(run: TextRun, bar: tqdm) -> None:
    if sums := runs.close_window(run):
        own = means(sums)
        if sums["updates"]:
            own["clipped"] = run.clipping.share(sums, run.progress.update, run.world.world_size)
        runs.log_window(run, bar, **own)


def means(sums: dict[str, float], split: str = "") -> dict[str, float]:
    """Mean loss per token in nats, and perplexity; names begin with `split`."""
    loss = sums["loss"] / sums["tokens"]
    return {f"{split}loss": loss, f"{split}ppl": perplexity(loss)}


def evaluate(run: TextRun) -> dict[str, float]:
    """Loss and perplexity of the test text and held-out sentences, if any."""
    found = {}
    for split, shards in (("test_", run.data.corpus.test), ("valid_", run.data.corpus.valid)):
        if shards:
            total = score(run.model, *read_text(shards), run.config.eval_rows, run.precision, run.world)
            require_finite(total["loss"], run.progress.update, f"{split}loss")
            found |= means(total, split)
    return found


def finish_epoch(run: TextRun, tested: dict[str, float]) -> None:
    """Record the epoch, and save."""
    progress = run.progress
    progress.best = min(evaluated.of_result(tested, "test_ppl"), progress.best or math.inf)
    runs.record_evaluation(run, "epoch", means(progress.since_evaluation, "train_"), tested)
    runs.end_epoch(run)
    last = progress.last
    run.record.say(
        f"epoch {progress.epoch:>3}/{run.config.epochs}  train ppl {last['train_ppl']:.2f}  "
        f"test loss {last['test_loss']:.4f}  ppl {last['test_ppl']:.2f}  "
        f"lr {last['lr']:.3g}  {last['tokens_per_s']:.0f} tokens/s"
    )
    save(run)


def finish(run: TextRun) -> None:
    """Write result.json and say the scores."""
    last, files = evaluated.last_scores(run, evaluate), run.data.corpus.facts["test"]["files"]
    found = evaluated.results(last, final="test_ppl", validation="valid_ppl")
    run.progress.best = best = min(found["final"], run.progress.best)
    loss = evaluated.of_result(last, "test_loss")
    with evaluated.final(run):
        found |= final_perplexities(run.data, run.model, run.config.eval_rows, run.precision, run.world, loss)
    runs.write_result(
        run, metric="ppl", **found, evaluated=run.data.test_tokens, test_files=files, vocabulary=run.data.corpus.words
    )
    run.record.say(
        f"done: perplexity {found['final']:.2f} at the end, {best:.2f} at best, over {run.data.test_tokens:,} tokens "
        f"of {', '.join(files)}; {run.record.folder}/result.json"
    )


def save(run: TextRun) -> None:
    """Write a checkpoint with all ranks' states: any number of ranks can restore it."""
    batch, passes = run.config.batch, run.config.passes
    state = run.model.zero_state(batch * passes)
    for index, own in run.states.items():
        state[:, :, rows_of(index, batch)] = own
    runs.save(run, state=run.world.sum(state))


def rows_of(index: int, batch: int) -> slice:
    return slice(index * batch, (index + 1) * batch)


def prepare(config: Config, world: World, record: RunRecord) -> TextRun:
    """Build what the loop needs, and restore the last checkpoint if there is one."""
    world.require_divisible(config.batch, config.passes)
    precision = runs.create_precision(config.precision, world.device, record.say)
    if (config.precision, config.model.name, world.device.type) == ("fp16", "lstm", "cpu"):
        raise UserError("precision=fp16: on CPUs there is no LSTM in float16; use precision=fp32")
    if config.compile:
        raise UserError("compile=true: torch.compile does not take LSTMs, nor clusters of ever new sizes; leave it out")
    corpus = load_corpus(config.data)
    if config.data.validation:
        corpus = hold_out(corpus, config.data.validation)
    data = TextData(
        corpus, config.batch, config.sequence_length, passes=config.passes, device=world.device, seed=config.seed
    )

    seed_step(config.seed, "initialisation")
    with settings_of("model"):
        model = create_model(config.model, corpus.words, config.sequence_length).to(world.device)
    model, optimizer = runs.with_optimizer(model, config, precision)

    run = runs.assemble(
        TextRun, config, world, record, precision, model, optimizer,
        total=config.epochs,
        updates_per_unit=data.updates_per_epoch,
        data=data,
        vocabulary=corpus.vocabulary_digest,
        clipping=ClippingWatch(config.optimizer, config.schedule, record.say),
        states={n: model.zero_state(config.batch) for n in range(world.rank, config.passes, world.world_size)},
    )  # fmt: skip
    if saved := runs.restore(run):
        for index, state in run.states.items():
            state.copy_(saved["state"][:, :, rows_of(index, config.batch)])
    else:
        record.say(f"{runs.parameter_count(model):,} parameters, {corpus.words:,} words")
    runs.write_environment(run, updates_per_epoch=data.updates_per_epoch, data=corpus.facts)
    return run


if __name__ == "__main__":
    run_main(main)
