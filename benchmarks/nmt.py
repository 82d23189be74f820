"""Translation: speed of training and decoding, and padding.

    python -m benchmarks.nmt train configs/grammar/apollo.yaml [key=value ...]
    python -m benchmarks.nmt decode [--precision fp32]
    python -m benchmarks.nmt full-size [--updates 2 --batch 8192 --passes 8 --precision fp32]

    train       three loops in turn over the last updates of the first epoch, in target tokens per second:
                train.py        its `train_epoch`, from data to metrics
                bare loop       forward, backward, clipping and optimizer of the same model, on batches in memory
                torch's own     torch.nn.Transformer of the same size, cross entropy over all positions
                then that epoch's share of padding, on both sides
    decode      beam search for a forced number of steps, with and without caches
    full-size   updates of Transformer-base with the published vocabulary and batch: speed and memory

For a GPU: device=cuda (train) or --device cuda.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import cross_entropy, linear

import nmt.train
from benchmarks.turns import Contender, bare_loop, end_of_epoch, machine, prepared, report, speeds
from engine.distributed import World, setup
from engine.errors import UserError, run_main
from engine.precision import Precision
from engine.run_record import peak_memory_mb
from nmt.beam_search import beam_search
from nmt.codec import BOS, EOS, PAD
from nmt.data import Batch, train_batches
from nmt.model import ModelConfig, Transformer, create_model, sinusoids
from nmt.train import TranslationRun
from optim import create_optimizer

WORDS = 40_624  # the types in the author's log of the published runs
DECODED = ModelConfig(width=256, inner_width=1024, heads=4, encoder_layers=3, decoder_layers=3)
VOCABULARY, SENTENCES, SOURCE_WORDS, STEPS, BEAM = 8000, 100, 20, 30, 5  # of decoding


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    measures = {"train": measure_training, "decode": measure_decoding, "full-size": measure_full_size}
    measures[options.command](options)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train")
    train.add_argument("config")
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("--updates", type=int, default=20, help="in a round")
    train.add_argument("--rounds", type=int, default=7)
    decode = commands.add_parser("decode")
    decode.add_argument("--rounds", type=int, default=5)
    full = commands.add_parser("full-size")
    full.add_argument("--updates", type=int, default=2)
    full.add_argument("--batch", type=int, default=8192, help="tokens of a pass")
    full.add_argument("--passes", type=int, default=8, help="of an update")
    for command in (decode, full):
        command.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16", "fp16"))
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    if arguments[:1] == ["train"]:  # its options may stand between its overrides
        return train.parse_intermixed_args(arguments[1:], argparse.Namespace(command="train"))
    return parser.parse_args(arguments)


def measure_training(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        never = 10 * options.updates * (options.rounds + 1)  # the first round does not count
        ours = [f"run_dir={scratch}", f"updates={never}", f"validate_every={never}", f"average.every={never}"]
        run = prepared(nmt.train, options.config, *options.overrides, *ours)
        config, world = run.config, run.world
        describe(world, f"{options.config} {' '.join(options.overrides)}, {options.updates} updates a round")
        epoch = [run.data.train, config.batch, config.passes, config.seed, 0, world.rank, world.world_size]
        start = run.updates_per_epoch - options.updates
        if start < 0:
            raise UserError(f"--updates {options.updates}: an epoch of {options.config} has fewer")
        updates = [[batch for _, batch in passes] for passes in train_batches(*epoch, start_update=start)]
        tokens = sum(batch.tokens for passes in updates for batch in passes)
        there = [[batch.to(world.device) for batch in passes] for passes in updates]
        contenders = {
            "train.py": lambda: train_py(run, options.updates),
            "bare loop": same_model(run, there),
            "torch's own": torchs_own(run, there),
        }
        found = speeds(contenders, tokens, options.rounds, world)
        report("target tokens/s", found, [("train.py", "bare loop"), ("train.py", "torch's own")])
        share = padding_share(batch for passes in train_batches(*epoch) for _, batch in passes)
        print(f"\npadding: {100 * share:.1f} % of the tokens of both sides, batches of {config.batch:,} tokens")


def padding_share(batches: Iterator[Batch]) -> float:
    padding = total = 0
    for batch in (batch for batch in batches if batch.tokens):
        for side in (batch.source, batch.target_out):
            padding += int((side == PAD).sum())
            total += side.numel()
    return padding / total


def train_py(run: TranslationRun, updates: int) -> None:
    """The last updates of the first epoch, each time."""
    run.progress.update = run.progress.epoch = 0
    end_of_epoch(nmt.train, run, updates)


def same_model(run: TranslationRun, updates: list[list[Batch]]) -> Contender:
    torch.manual_seed(0)
    model = create_model(run.config.model, run.data.codec.size).to(run.world.device).train()
    label_smoothing = run.config.label_smoothing

    def loss_of(batch: Batch) -> torch.Tensor:
        return model(batch.source, batch.target_in, batch.target_out, batch.tokens, label_smoothing)[0]

    return plain_updates(run, model, updates, loss_of)


def torchs_own(run: TranslationRun, updates: list[list[Batch]]) -> Contender:
    """With the same embeddings, positions and dropout (one rate for all)."""
    torch.manual_seed(0)
    config, words = run.config.model, run.data.codec.size
    embedding = torch.nn.Embedding(words, config.width, padding_idx=PAD)
    transformer = torch.nn.Transformer(
        config.width, config.heads, config.encoder_layers, config.decoder_layers, config.inner_width, config.dropout,
        batch_first=True, norm_first=config.norm == "pre",
    )  # fmt: skip
    model = torch.nn.ModuleList([embedding, transformer]).to(run.world.device).train()
    positions = sinusoids(1024, config.width, run.world.device)

    def embed(ids: torch.Tensor) -> torch.Tensor:
        x = embedding(ids) * math.sqrt(config.width) + positions[: ids.shape[1]]
        return torch.nn.functional.dropout(x, config.dropout)

    def loss_of(batch: Batch) -> torch.Tensor:
        padded = batch.source == PAD
        length = batch.target_in.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=padded.device).triu(1)
        hidden = transformer(
            embed(batch.source), embed(batch.target_in), tgt_mask=later, tgt_is_causal=True,
            src_key_padding_mask=padded, memory_key_padding_mask=padded,
        )  # fmt: skip
        logits = linear(hidden, embedding.weight).flatten(0, 1).float()
        target = batch.target_out.flatten()
        smoothing = run.config.label_smoothing
        return cross_entropy(logits, target, ignore_index=PAD, reduction="sum", label_smoothing=smoothing)

    return plain_updates(run, model, updates, loss_of)


def plain_updates(
    run: TranslationRun,
    model: torch.nn.Module,
    updates: list[list[Batch]],
    loss_of: Callable[[Batch], torch.Tensor],
) -> Contender:
    config = run.config
    optimizer = create_optimizer(config.optimizer.name, model.parameters(), **config.optimizer.settings)
    cast = Precision(config.precision, run.world.device)
    share = lambda batch: loss_of(batch) / batch.update_tokens  # noqa: E731
    return bare_loop(model, optimizer, cast, updates, share, config.gradient_clip)


class WithoutCaches:
    """For beam_search. Every step decodes whole hypotheses."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def start(self, source: torch.Tensor, hypotheses: int) -> "WithoutCaches":
        memory, _, mask = self.model.encode(source)
        memory = memory[: source.numel()].unflatten(0, source.shape).repeat_interleave(hypotheses, 0)
        self.memory, self.hypotheses = memory, hypotheses
        self.mask = None if mask is None else mask.repeat_interleave(hypotheses, 0)
        self.words = source.new_empty(len(source), hypotheses, 0)
        return self

    def step(self, words: torch.Tensor, state: "WithoutCaches") -> torch.Tensor:
        self.words = torch.cat((self.words, words[..., None]), 2)
        rows = self.words.flatten(0, 1)
        hidden = self.model.decode(rows, self.memory.flatten(0, 1), self.memory.shape[:2], self.mask)
        last = hidden[: rows.numel()].unflatten(0, rows.shape)[:, -1]
        return linear(last, self.model.embedding.weight).unflatten(0, words.shape)

    def reorder(self, parents: torch.Tensor) -> None:
        self.words = self.words.gather(1, parents[..., None].expand_as(self.words))

    def keep(self, sentences: torch.Tensor) -> None:
        self.words = self.words[sentences]
        of_each = sentences[:, None] * self.hypotheses + torch.arange(self.hypotheses, device=sentences.device)
        self.memory = self.memory[of_each.flatten()]
        self.mask = None if self.mask is None else self.mask[of_each.flatten()]


def measure_decoding(options: argparse.Namespace) -> None:
    world = setup(options.device)
    torch.manual_seed(0)
    model = create_model(DECODED, VOCABULARY).to(world.device).eval()
    source = random_words(SENTENCES, SOURCE_WORDS, VOCABULARY).to(world.device)
    longest = torch.full((SENTENCES,), STEPS, device=world.device)
    cast = Precision(options.precision, world.device)
    size = f"{DECODED.width} wide, {DECODED.encoder_layers}+{DECODED.decoder_layers} layers, {VOCABULARY:,} words"
    work = f"{SENTENCES} sentences, beam {BEAM}, {STEPS} forced steps"
    describe(world, f"{size}, {options.precision}; {work}")

    def decode(decoder: Transformer | WithoutCaches) -> None:
        with cast.autocast():
            found = beam_search(decoder, source, BEAM, 0.6, longest)
        if any(len(hypothesis.words) != STEPS - 1 for hypothesis in found):
            raise RuntimeError("a hypothesis ended before its last step: this random model will not do")

    contenders = {"with caches": lambda: decode(model), "without": lambda: decode(WithoutCaches(model))}
    found = speeds(contenders, SENTENCES, options.rounds, world)
    report("sentences/s", found, [("with caches", "without")])


def measure_full_size(options: argparse.Namespace) -> list[float]:
    """Prints each update; returns target tokens a second."""
    world = setup(options.device)
    torch.manual_seed(0)
    model = create_model(ModelConfig(), WORDS).to(world.device).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    update = f"{options.passes} passes of {options.batch:,} tokens an update"
    describe(world, f"Transformer-base, {parameters:,} parameters, {update}, {options.precision}")
    optimizer = create_optimizer("apollo", model.parameters(), lr=0.01, weight_decay=1e-8)
    cast = Precision(options.precision, world.device)
    tokens, found = options.passes * options.batch, []
    print(f"{'update':>6}{'loss':>9}{'s':>9}{'tokens/s':>10}{'peak MiB':>10}")
    for number in range(1, options.updates + 1):
        started = time.perf_counter()
        optimizer.zero_grad()
        total = 0.0
        for _ in range(options.passes):
            source, target = (random_words(options.batch // 32, 31, WORDS).to(world.device) for _ in range(2))
            target_in = torch.cat((torch.full_like(target[:, :1], BOS), target[:, :-1]), 1)
            with cast.autocast():
                loss, _ = model(source, target_in, target, target.numel(), 0.1)
            cast.backward(loss / tokens)
            total += loss.item() / tokens
        cast.clip(optimizer, model.parameters(), 1.0)
        cast.step(optimizer)
        world.synchronize()
        seconds = time.perf_counter() - started
        found.append(tokens / seconds)
        memory = peak_memory_mb(world.device)
        print(f"{number:>6}{total:>9.4f}{seconds:>9.2f}{found[-1]:>10.0f}{memory:>10.0f}", flush=True)
    return found


def random_words(sentences: int, words: int, vocabulary: int) -> torch.Tensor:
    """[sentences, words + 1] random ids, EOS last."""
    ids = torch.randint(EOS + 1, vocabulary, (sentences, words + 1))
    ids[:, -1] = EOS
    return ids


def describe(world: World, what: str) -> None:
    print(f"{what}\n{machine(world)}\n", flush=True)


if __name__ == "__main__":
    run_main(main)
