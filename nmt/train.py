"""Train a translation model: python -m nmt.train CONFIG [key=value ...]     (also under torchrun)

Read it top to bottom; `prepare` makes what the loop needs. `batch` counts tokens of the longer side, with padding.
Losses are in nats per target token, EOS counted, padding not. After an interruption the same command continues the run,
on the CPU to bit-identical weights.
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
from engine.errors import run_main
from engine.interrupt import Wish
from engine.run_record import RunRecord
from engine.seed import seed_step
from nmt.config import Config
from nmt.data import Batch, ParallelData, Split, load_data, train_batches, updates_per_epoch
from nmt.model import Transformer, create_model
from nmt.scoring import all_scores, loss_sums, sacre_bleu, translate_split

USAGE = "usage: python -m nmt.train CONFIG [key=value ...]     e.g. configs/wmt14_en_de/apollo.yaml"
METRIC = "fairseq_bleu"  # the `final` score


@dataclass(kw_only=True)
class TranslationRun(runs.Run):
    METRICS, COUNTED = ("loss", "nll", "tokens", *COUNTS), "tokens"

    config: Config
    model: Transformer
    data: ParallelData
    clipping: ClippingWatch
    gradient_norm: torch.Tensor | None = None  # of the last update, before clipping


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
    with runs.progress_bar(run, config.updates) as bar:
        while run.progress.update < config.updates:
            if not train_epoch(run, bar):
                return runs.say_stopped(run)
    finish(run, score_test_set(run))
    return 0


def train_epoch(run: TranslationRun, bar: tqdm) -> bool:
    """Train to the end of the epoch or the run; False if a signal came before (all is saved then)."""
    config, world, progress = run.config, run.world, run.progress
    batches = train_batches(
        run.data.train, config.batch, config.passes, config.seed, progress.epoch, world.rank, world.world_size,
        start_update=progress.update_in_epoch,
    )  # fmt: skip
    runs.start_clock(run)
    for passes in batches:
        run.network.train()
        take_gradients(run, passes)
        wish = runs.end_update(run, bar, partial(take_gradients, run, passes, again=True))

        is_end = progress.update == config.updates
        validates = is_end or progress.update % config.validate_every == 0
        if validates or progress.update % config.log_every == 0:
            log(run, bar)
        if validates:
            finish_validation(run, evaluated.scores(run, validate))
        if validates or wish != Wish.GO_ON:
            runs.save(run)
        if is_end or wish == Wish.STOP:
            return is_end
    runs.end_epoch(run)
    return True


def take_gradients(run: TranslationRun, passes: list[tuple[int, Batch]], again: bool = False) -> torch.Tensor:
    """Take an update's gradients; returns this rank's mean loss. `again`: for a closure, uncounted."""
    config, world, total = run.config, run.world, 0.0
    run.optimizer.zero_grad()
    for index, batch in passes:
        is_last = index + world.world_size >= config.passes
        seed_step(config.seed, "step", run.progress.update, index)  # the same dropout on any rank
        source, target_in, target_out = batch.to(world.device)[:3]
        with runs.averaged_over_ranks(run, is_last):
            with run.precision.autocast():
                loss, nll = run.network(source, target_in, target_out, batch.tokens, config.label_smoothing)
            # The gradients are averaged over ranks, each divided by the tokens of all.
            share = loss * (world.world_size / batch.update_tokens)
            run.precision.backward(share, is_last)
        total += share.detach()
        if not again:
            run.window.add(loss=loss, nll=nll, tokens=batch.tokens)
    norm = run.precision.clip(run.optimizer, run.model.parameters(), config.gradient_clip)
    if not again:
        run.gradient_norm = norm
        run.window.add(clipped=norm > config.gradient_clip, updates=1)
    return total


def log(run: TranslationRun, bar: tqdm) -> None:
    if sums := runs.close_window(run):
        norm = float(run.gradient_norm)  # not finite if an overflow skipped the update
        clipped = run.clipping.share(sums, run.progress.update, run.world.world_size)
        runs.log_window(run, bar, **means(sums), gradient_norm=norm if math.isfinite(norm) else None, clipped=clipped)


def means(sums: dict[str, float], split: str = "") -> dict[str, float]:
    """Mean loss and nll per target token; names begin with `split`."""
    return {f"{split}{name}": sums[name] / sums["tokens"] for name in ("loss", "nll")}


def validate(run: TranslationRun) -> dict[str, float]:
    config, split = run.config, run.data.valid
    sums = loss_sums(run.model, split, config.eval_batch, config.label_smoothing, run.precision, run.world)
    valid = means(sums, "valid_")
    bleu, _ = sacre_bleu([run.data.codec.decode(ids) for ids in translated(run, split)], split.references)
    return valid | {"valid_ppl": math.exp(min(valid["valid_nll"], 700.0)), "valid_bleu": bleu}


def finish_validation(run: TranslationRun, valid: dict[str, float]) -> None:
    """Record the validation, and the training loss since the last one."""
    progress, sums = run.progress, run.progress.since_evaluation
    progress.best = max(evaluated.of_result(valid, "valid_bleu"), progress.best or 0.0)
    trained = means(sums, "train_") | {"tokens": progress.trained_on + sums["tokens"]}
    runs.record_evaluation(run, "validation", trained, valid)
    last = progress.last
    run.record.say(
        f"update {progress.update:>6}  epoch {progress.epoch + 1:>3}  train loss {last['train_loss']:.4f}  "
        f"valid loss {last['valid_loss']:.4f}  ppl {last['valid_ppl']:.5g}  BLEU {last['valid_bleu']:.2f}  "
        f"lr {last['lr']:.3g}  {last['tokens_per_s']:.0f} tokens/s"
    )


def translated(run: TranslationRun, split: Split) -> list[list[int]]:
    return translate_split(run.model, split, run.config.decoding, run.config.eval_batch, run.world)


def score_test_set(run: TranslationRun) -> dict[str, object]:
    """The averaged weights' scores; writes the translations to the run folder.

    `validation` is their METRIC on the validation set; `final_unaveraged` is that of the last weights on the test set.
    """
    test, valid, codec = run.data.test, run.data.valid, run.data.codec
    with evaluated.eval_mode(run):
        unaveraged = all_scores(translated(run, test), test.references, codec)[METRIC]
    with evaluated.averaged(run) as updates:
        hypotheses = translated(run, test)
        validation = all_scores(translated(run, valid), valid.references, codec)[METRIC]
    if run.world.is_main:
        path = run.record.folder / f"test.{codec.target}.txt"
        path.write_text("".join(codec.decode(ids) + "\n" for ids in hypotheses), encoding="utf-8")
    scores = {
        "validation": validation,
        "final_unaveraged": unaveraged,
        **all_scores(hypotheses, test.references, codec),
    }
    evaluated.record_final(run, **{f"test_{METRIC}": unaveraged, f"test_{METRIC}_average": scores[METRIC]})
    return scores | run.config.decoding.model_dump() | ({"averaged_updates": updates} if updates else {})


def finish(run: TranslationRun, scores: dict[str, object]) -> None:
    """Write result.json and say the scores."""
    runs.write_result(
        run, metric=METRIC, final=scores[METRIC], updates=run.progress.update, evaluated=len(run.data.test),
        vocabulary=run.data.codec.size, **scores,
    )  # fmt: skip
    run.record.say(
        f"done: test BLEU {scores['fairseq_bleu']:.2f} as fairseq prints it, sacreBLEU {scores['sacrebleu']:.2f} "
        f"({scores['signature']}); {run.record.folder}/result.json"
    )


def prepare(config: Config, world: World, record: RunRecord) -> TranslationRun:
    """Build what the loop needs, and restore the last checkpoint if there is one."""
    world.require_divisible(config.batch, config.passes)
    precision = runs.create_precision(config.precision, world.device, record.say)
    with world.main_first():  # it may make the data
        data = load_data(config.data.name, config.data.root)

    seed_step(config.seed, "initialisation")
    model = create_model(config.model, data.codec.size).to(world.device)
    model, optimizer = runs.with_optimizer(model, config, precision)
    if config.compile:  # only where the time goes
        for layer in (*model.encoder, *model.decoder):
            layer.compile(dynamic=True)

    run = runs.assemble(
        TranslationRun, config, world, record, precision, model, optimizer,
        total=config.updates,
        updates_per_epoch=updates_per_epoch(data.train, config.batch, config.passes),
        data=data,
        vocabulary=data.codec.digest,
        clipping=ClippingWatch(config.optimizer, config.schedule, record.say),
    )  # fmt: skip
    runs.restore(run)
    if world.is_main:
        data.codec.save(record.folder)  # to translate without the data
    runs.write_environment(
        run, updates_per_epoch=run.updates_per_epoch, vocabulary=data.codec.size, codec=data.codec.digest,
        train_pairs=len(data.train), valid_pairs=len(data.valid), test_pairs=len(data.test),
    )  # fmt: skip
    return run


if __name__ == "__main__":
    run_main(main)
