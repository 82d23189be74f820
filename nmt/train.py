"""Train a translation model: python -m nmt.train CONFIG [key=value ...]     (also under torchrun)

The whole run, top to bottom: main, train, train_epoch with the loop itself, which validates and keeps weights every so
many updates, the score of their average on the test set; `prepare`, below, makes all that they work with. `batch`
counts tokens, those of the longer side with its padding; losses are in nats per target token, EOS counted, padding not.
Interrupt it at any moment and run the same command again: it goes on where it was, and on the CPU it ends with
bit-identical weights.
"""

import math
from contextlib import closing
from dataclasses import dataclass

import torch
from tqdm import tqdm

from engine import run as runs
from engine.clipping import COUNTS, ClippingWatch
from engine.distributed import World, setup
from engine.errors import run_main
from engine.interrupt import Wish
from engine.metrics import require_finite, require_finite_weights
from engine.run_record import RunRecord
from engine.seed import seed_step
from nmt.averaging import average_weights, keep_weights
from nmt.config import Config
from nmt.data import ParallelData, Split, load_data, train_batches, updates_per_epoch
from nmt.model import Transformer, create_model
from nmt.scoring import all_scores, loss_sums, sacre_bleu, translate_split

USAGE = "usage: python -m nmt.train CONFIG [key=value ...]     e.g. configs/wmt14_en_de/apollo.yaml"
METRIC = "fairseq_bleu"  # the score that is `final`


@dataclass(kw_only=True)
class TranslationRun(runs.Run):
    METRICS, COUNTED = ("loss", "nll", "tokens", *COUNTS), "tokens"

    config: Config
    model: Transformer
    data: ParallelData
    clipping: ClippingWatch
    updates_per_epoch: int
    gradient_norm: torch.Tensor | None = None  # of the last update, before clipping


def main(arguments: list[str]) -> int:
    config = runs.read_arguments(Config, arguments, USAGE)
    with closing(setup(config.device, config.deterministic)) as world:
        return train(config, world)


def train(config: Config, world: World) -> int:
    """Train to the end, or until a signal asks to stop; returns the exit status."""
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
    """Train to the end of the epoch, or of the run; False where a signal asked to stop before (all is saved then)."""
    config, world, progress = run.config, run.world, run.progress
    batches = train_batches(
        run.data.train, config.batch, config.passes, config.seed, progress.epoch, world.rank, world.world_size,
        start_update=progress.update_in_epoch,
    )  # fmt: skip
    runs.start_clock(run)
    for passes in batches:
        run.network.train()
        run.optimizer.zero_grad()
        for index, batch in passes:
            is_last = index + world.world_size >= config.passes
            seed_step(config.seed, "step", progress.update, index)  # dropout is the same whichever rank takes the pass
            source, target_in, target_out = batch.to(world.device)[:3]
            with runs.averaged_over_ranks(run, is_last):
                with run.precision.autocast():
                    loss, nll = run.network(source, target_in, target_out, batch.tokens, config.label_smoothing)
                # The gradients are averaged over ranks after each has divided by the tokens of all.
                run.precision.backward(loss * (world.world_size / batch.update_tokens), is_last)
            run.window.add(loss=loss, nll=nll, tokens=batch.tokens)
        run.gradient_norm = run.precision.clip(run.optimizer, run.model.parameters(), config.gradient_clip)
        run.window.add(clipped=run.gradient_norm > config.gradient_clip, updates=1)
        wish = runs.end_update(run, bar)

        is_end = progress.update == config.updates
        validates, keeps = is_end or progress.update % config.validate_every == 0, is_kept(run)
        if validates or progress.update % config.log_every == 0:
            log(run, bar)
        if validates:
            validate(run)
        if keeps:
            keep_for_average(run)
        if validates or keeps or wish != Wish.GO_ON:
            runs.save(run)
        if is_end or wish == Wish.STOP:
            return is_end
    runs.end_epoch(run)
    return True


def log(run: TranslationRun, bar: tqdm) -> None:
    """Record the training metrics since the last log line."""
    if sums := runs.close_window(run):
        norm = float(run.gradient_norm)  # of the last update; an overflow, where it was skipped
        clipped = run.clipping.share(sums, run.progress.update, run.world.world_size)
        runs.log_window(run, bar, **means(sums), gradient_norm=norm if math.isfinite(norm) else None, clipped=clipped)


def means(sums: dict[str, float], split: str = "") -> dict[str, float]:
    """Mean label-smoothed loss and nll per target token; the names begin with `split`."""
    return {f"{split}{name}": sums[name] / sums["tokens"] for name in ("loss", "nll")}


def validate(run: TranslationRun) -> None:
    """Loss and BLEU on the validation set, recorded beside the mean training loss since the last time."""
    progress, sums = run.progress, run.progress.since_evaluation
    config, split = run.config, run.data.valid
    valid = loss_sums(run.model, split, config.eval_batch, config.label_smoothing, run.precision, run.world)
    valid = means(valid, "valid_")
    hypotheses = translated(run, split)
    bleu, _ = sacre_bleu([run.data.codec.decode(ids) for ids in hypotheses], split.references)
    progress.best = max(bleu, progress.best or 0.0)
    trained = means(sums, "train_") | {"tokens": progress.trained_on + sums["tokens"]}
    valid |= {"valid_ppl": math.exp(min(valid["valid_nll"], 700.0)), "valid_bleu": bleu}
    runs.record_evaluation(run, "validation", trained, valid)
    last = progress.last
    run.record.say(
        f"update {progress.update:>6}  epoch {progress.epoch + 1:>3}  train loss {last['train_loss']:.4f}  "
        f"valid loss {last['valid_loss']:.4f}  ppl {last['valid_ppl']:.5g}  BLEU {bleu:.2f}  lr {last['lr']:.3g}  "
        f"{last['tokens_per_s']:.0f} tokens/s"
    )


def translated(run: TranslationRun, split: Split) -> list[list[int]]:
    """The ids of the model's translations of all of `split`, known to each rank."""
    return translate_split(run.model, split, run.config.decoding, run.config.eval_batch, run.world)


def is_kept(run: TranslationRun) -> bool:
    """Whether the weights after this update are to be averaged; the last ones are where there would be none else."""
    config, progress = run.config, run.progress
    is_end = progress.update == config.updates
    if config.average.every:
        return is_end or progress.update % config.average.every == 0
    return progress.update_in_epoch == run.updates_per_epoch or (is_end and progress.epoch == 0)


def keep_for_average(run: TranslationRun) -> None:
    """Keep the weights for averaging, unless the training loss or a weight is not finite."""
    runs.wait_for_device(run)
    require_finite(run.window.reduce(run.world)["loss"], run.progress.update)
    require_finite_weights(run.model, run.world, run.progress.update)
    if run.world.is_main:
        digest, last = run.data.codec.digest, run.config.average.last
        keep_weights(run.record.folder, run.progress.update, run.model, digest, last)
    runs.start_clock(run)


def score_test_set(run: TranslationRun) -> dict[str, object]:
    """Scores of the averaged weights on the test set; the translations are written to the run folder.

    `validation` is their score on the validation set, of the kind that is the run's `final`.
    """
    run.world.barrier()  # rank 0 has written the last weights
    weights, updates = average_weights(run.record.folder, run.config.average.last, run.data.codec.digest)
    run.model.load_state_dict(weights)
    hypotheses = translated(run, run.data.test)
    if run.world.is_main:
        path = run.record.folder / f"test.{run.data.codec.target}.txt"
        path.write_text("".join(run.data.codec.decode(ids) + "\n" for ids in hypotheses), encoding="utf-8")
    scores = all_scores(hypotheses, run.data.test.references, run.data.codec)
    validation = all_scores(translated(run, run.data.valid), run.data.valid.references, run.data.codec)[METRIC]
    return {"validation": validation, **scores, **run.config.decoding.model_dump(), "averaged_updates": updates}


def finish(run: TranslationRun, scores: dict[str, object]) -> None:
    """Write result.json, and say what came out."""
    runs.write_result(
        run,
        metric=METRIC,
        final=scores[METRIC],
        updates=run.progress.update,
        evaluated=len(run.data.test),
        vocabulary=run.data.codec.size,
        **scores,
    )
    run.record.say(
        f"done: test BLEU {scores['fairseq_bleu']:.2f} as fairseq prints it, sacreBLEU {scores['sacrebleu']:.2f} "
        f"({scores['signature']}); {run.record.folder}/result.json"
    )


def prepare(config: Config, world: World, record: RunRecord) -> TranslationRun:
    """Build everything the loop needs, and take up the run folder's last checkpoint if there is one."""
    world.require_divisible(config.batch, config.passes)
    precision = runs.create_precision(config.precision, world.device, record.say)
    with world.main_first():  # it may have to make the data
        data = load_data(config.data.name, config.data.root)

    seed_step(config.seed, "initialisation")
    model = create_model(config.model, data.codec.size).to(world.device)
    model, optimizer = runs.with_optimizer(model, config, precision)
    if config.compile:  # the layers, where the time goes; embeddings and loss stay as they are
        for layer in (*model.encoder, *model.decoder):
            layer.compile(dynamic=True)

    run = runs.assemble(
        TranslationRun,
        config,
        world,
        record,
        precision,
        model,
        optimizer,
        total=config.updates,
        data=data,
        clipping=ClippingWatch(config.optimizer, config.schedule, record.say),
        updates_per_epoch=updates_per_epoch(data.train, config.batch, config.passes),
        vocabulary=data.codec.digest,
    )
    runs.restore(run)
    if world.is_main:
        data.codec.save(record.folder)  # so that the run folder can translate without the data
    runs.write_environment(
        run,
        updates_per_epoch=run.updates_per_epoch,
        vocabulary=data.codec.size,
        codec=data.codec.digest,
        train_pairs=len(data.train),
        valid_pairs=len(data.valid),
        test_pairs=len(data.test),
    )
    return run


if __name__ == "__main__":
    run_main(main)
