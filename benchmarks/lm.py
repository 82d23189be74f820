"""Language modelling: speed and memory of preparing a corpus and of training, against plain ways.

    python -m benchmarks.lm prepare [--text FILE ...] [--tokens 1 10 50] [--rounds 3]
    python -m benchmarks.lm train [--precision fp32 bf16] [--optimizers adam radam apollo] [--device cuda] ...
    python -m benchmarks.lm train --full-size --updates 5

prepare   `python -m language_model.prepare` with one and two processes against the published way
          (benchmarks/lm_literal.py). Then peak memory, workers included.
train     `train_epoch` of language_model/train.py against a bare loop, in turn: forward, backward and torch's fused
          AdamW on one fixed batch, without clipping.
--full-size  the published model: each contender in its own process, and its memory; on a CPU, with some 12 GB, only
          train.py.

The text is Python's manual, repeated, or --text. Training takes noise with the word frequencies of English (1 / r**1.1
for rank r), on which the adaptive softmax's work depends.
"""

import argparse
import itertools
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import language_model.train
from benchmarks.turns import CONFIGS, Contender, bare_loop, end_of_epoch, machine, prepared, report, speeds, table
from engine.allocator import keep_freed_memory
from engine.distributed import setup
from engine.errors import UserError, run_main
from engine.machine import memory_of_tree_mb
from engine.precision import Precision
from engine.run_record import peak_memory_mb
from language_model import prepare as preparation
from language_model.config import ModelConfig
from language_model.data import TextData
from language_model.model import LanguageModel
from language_model.prepared import open_corpus
from language_model.raw_text import FOLDERS
from language_model.toy_text import paragraphs
from language_model.vocabulary import count_words, counted_vocabulary, load_vocabulary
from optim import AdamW

FILE_BYTES = 8_200_000  # a fifth of a training file of the benchmark
SPEED_TOKENS = 40_000_000  # prepared to measure the speed
EXPONENT = 1.1  # of the word frequencies
BATCH, LENGTH = 128, 20  # rows of an update, and their tokens
LITERAL = "line by line, pickled"


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    print(machine(setup(options.device)))
    if options.command == "prepare":
        measure_preparation(options)
    else:
        measure_training(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="encoding a corpus")
    command.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="one sentence a line; repeated as needed")
    command.add_argument("--tokens", type=int, nargs="+", default=[1, 10, 50], help="million tokens, for the memory")
    command.add_argument("--rounds", type=int, default=3)
    command.set_defaults(device="cpu")
    command = commands.add_parser("train", help="training")
    command.add_argument("--full-size", action="store_true", help="the published model")
    command.add_argument("--precision", nargs="+", default=["fp32"], help="fp32, tf32, bf16, fp16")
    command.add_argument("--optimizers", nargs="+", default=["apollo"], help="rows of configs/one_billion_words")
    command.add_argument("--updates", type=int, default=10, help="updates of each contender in a round")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args(arguments)


# Preparation


def measure_preparation(options: argparse.Namespace) -> None:
    lines = text_lines(options.text)
    with tempfile.TemporaryDirectory() as scratch:
        measure_speed(Path(scratch), lines, options.rounds)
        measure_memory(Path(scratch), lines, options.tokens)


def measure_speed(folder: Path, lines: list[str], rounds: int) -> None:
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text(counted_vocabulary([count_words(lines)], 3).dump(), encoding="utf-8")
    source, out = write_source(folder / "text", lines, SPEED_TOKENS), folder / "out"
    tokens, words = source_tokens(source), len(load_vocabulary(vocabulary))
    print(f"preparing {tokens:,} tokens, {words:,} words in the vocabulary, {rounds} rounds\n")
    ours = ["language_model.prepare", source, out, "--vocabulary", vocabulary, "--workers"]
    commands = {
        LITERAL: ["benchmarks.lm_literal", source, out, vocabulary],
        "language_model.prepare, 1 process": [*ours, "1"],
        "language_model.prepare, 2 processes": [*ours, "2"],
    }
    bytes_ = dict.fromkeys(commands, 0)

    def encode(name: str) -> None:
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run([sys.executable, "-m", *commands[name]], check=True, stderr=subprocess.DEVNULL)
        bytes_[name] = sum(path.stat().st_size for path in out.rglob("*") if path.suffix != ".txt")

    contenders = {name: partial(encode, name) for name in commands}
    found = speeds(contenders, tokens, rounds, setup("cpu"), warmup=False)
    report("tokens/s", found, [(name, LITERAL) for name in commands if name != LITERAL])
    print("\n" + table([["", "bytes a token"], *([name, f"{size / tokens:.2f}"] for name, size in bytes_.items())]))


def measure_memory(folder: Path, lines: list[str], millions: list[int]) -> None:
    rows = [["million tokens", "files", "peak memory, MiB: parent + 2 workers", "seconds"]]
    for number in millions:
        source = write_source(folder / f"text{number}", lines, number * 1_000_000)
        command = [sys.executable, "-m", "language_model.prepare", source, folder / f"memory{number}", "--workers", "2"]
        started = time.perf_counter()
        peak = peak_memory_of(command)
        files = len(list((source / FOLDERS["train"]).iterdir()))
        rows.append([str(number), str(files), f"{peak:,.0f}", f"{time.perf_counter() - started:.1f}"])
    print(f"\n{table(rows)}")


def text_lines(files: list[Path] | None) -> list[str]:
    if files is None:
        return paragraphs()
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def write_source(root: Path, lines: list[str], tokens: int) -> Path:
    """A source of at least `tokens` tokens in files of about FILE_BYTES."""
    for folder in FOLDERS.values():
        (root / folder).mkdir(parents=True)
    (root / FOLDERS["test"] / preparation.TEST_FILE).write_text("\n".join(lines[:100]) + "\n", encoding="utf-8")
    repeated, written, number = itertools.cycle(lines), 0, 0
    while written < tokens:
        number += 1
        with open(root / FOLDERS["train"] / f"news.en-{number:05}-of-00100", "w", encoding="utf-8") as file:
            while written < tokens and file.tell() < FILE_BYTES:
                some = list(itertools.islice(repeated, 1000))
                file.write("\n".join(some) + "\n")
                written += sum(line.count(" ") + 3 for line in some)
    return root


def source_tokens(source: Path) -> int:
    texts = (path.read_text(encoding="utf-8") for path in source.rglob("news*"))
    return sum(len(text.split()) + 2 * text.count("\n") for text in texts)


def peak_memory_of(command: list) -> float:
    """Run `command`. Returns peak MiB, with its children."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, memory_of_tree_mb(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"{' '.join(map(str, command))} failed with status {process.returncode}")
    return peak


# Training


class Size(NamedTuple):
    words: int
    hidden: int
    cutoffs: list[int]


class Measured(NamedTuple):
    speeds: list[float]  # tokens/s in each round
    optimizer_ms: float | None
    peak_mb: float  # of the process


Maker = Callable[[Path, argparse.Namespace], tuple[Contender, list[float]]]  # the list: milliseconds of optimizer steps


def size_of(options: argparse.Namespace) -> Size:
    return Size(793_470, 2048, [60_000, 100_000, 640_000]) if options.full_size else Size(32_000, 512, [2000, 10_000])


def measure_training(options: argparse.Namespace) -> None:
    size, tokens = size_of(options), BATCH * LENGTH
    print(
        f"LSTM 2 x {size.hidden}, {size.words:,} words, {tokens:,} tokens an update, "
        f"{options.updates} updates x {options.rounds} rounds\n"
    )
    cells = [(row, precision) for precision in options.precision for row in options.optimizers]
    makers: dict[str, Maker] = {f"train.py, {row}, {p}": partial(train_loop, row, p) for row, p in cells}
    pairs = []
    if not (options.full_size and options.device == "cpu"):
        makers |= {f"bare loop, adamw, {p}": partial(on_one_batch, p) for p in options.precision}
        pairs = [(f"train.py, {row}, {p}", f"bare loop, adamw, {p}") for row, p in cells]
    with tempfile.TemporaryDirectory() as scratch:
        corpus = make_corpus(Path(scratch), size.words, (options.updates + 2) * tokens)
        if options.full_size:
            found = {name: alone(name, make, corpus, options) for name, make in makers.items()}
        else:
            found = measure(makers, corpus, options)
    report("tokens/s", {name: one.speeds for name, one in found.items()}, pairs)
    rows = [["", "optimizer, ms", "of the update", "peak MiB"]]
    for name, one in found.items():
        share = (one.optimizer_ms or 0.0) * statistics.median(one.speeds) / (1000 * tokens)
        texts = [f"{one.optimizer_ms:.1f}", f"{share:.0%}"] if one.optimizer_ms else ["", ""]
        rows.append([name, *texts, f"{one.peak_mb:,.0f}" if options.full_size else ""])
    print(f"\n{table(rows)}")


def train_loop(row: str, precision: str, corpus: Path, options: argparse.Namespace) -> tuple[Contender, list[float]]:
    """A round is the end of an epoch."""
    size = size_of(options)
    run = prepared(
        language_model.train,
        CONFIGS / "one_billion_words" / f"{row}.yaml",
        f"data.root={corpus}",
        f"model.hidden={size.hidden}",
        f"model.cutoffs={size.cutoffs}",
        f"batch={BATCH}",
        f"precision={precision}",
        f"device={options.device}",
        f"log_every={1 if options.full_size else min(5, options.updates)}",
        f"run_dir={corpus / f'run_{row}_{precision}'}",
    )
    return partial(end_of_epoch, language_model.train, run, options.updates), run.optimizer_ms


def on_one_batch(precision: str, corpus: Path, options: argparse.Namespace) -> tuple[Contender, list[float]]:
    keep_freed_memory()
    device, size = setup(options.device).device, size_of(options)
    config = ModelConfig(name="lstm", hidden=size.hidden, cutoffs=size.cutoffs)
    model = LanguageModel(config, size.words).to(device)
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    data = TextData(open_corpus(corpus), BATCH, LENGTH, device=device, seed=1)
    ((_, (tokens, targets, *_)),) = next(data.train_batches(0))
    updates, state = [[(tokens, targets)]] * options.updates, model.zero_state(BATCH)
    cast = Precision(precision, device)
    return bare_loop(model, optimizer, cast, updates, lambda batch: -model(*batch, state)[0].mean()), []


def measure(
    makers: dict[str, Maker], corpus: Path, options: argparse.Namespace, warmup: bool = True
) -> dict[str, Measured]:
    made, world = {name: make(corpus, options) for name, make in makers.items()}, setup(options.device)
    contenders = {name: contender for name, (contender, _) in made.items()}
    found = speeds(contenders, options.updates * BATCH * LENGTH, options.rounds, world, warmup)
    peak = peak_memory_mb(world.device)
    return {
        name: Measured(found[name], statistics.median(times) if times else None, peak)
        for name, (_, times) in made.items()
    }


def alone(name: str, make: Maker, corpus: Path, options: argparse.Namespace) -> Measured:
    """Measure one in its own process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, {name: make}, corpus, options, warmup=options.device != "cpu").result()[name]
        except BrokenProcessPool:
            raise UserError(f"{name}: its process was ended (out of memory?)") from None


def make_corpus(folder: Path, words: int, tokens: int) -> Path:
    """A prepared corpus of at least `tokens` tokens of noise, over so many `words`."""
    vocabulary = [*(f"w{number}" for number in range(words - 3)), "<S>", "<UNK>", "</S>"]
    counts = np.sort((1e9 / np.arange(1, words + 1) ** EXPONENT).astype(int))[::-1]
    (folder / "words.txt").write_text("".join(f"{w} {c}\n" for w, c in zip(vocabulary, counts, strict=True)))
    shares = np.cumsum(1 / np.arange(1, words - 2) ** EXPONENT)
    drawn = np.searchsorted(shares, np.random.default_rng(0).random(tokens) * shares[-1])
    lines = [" ".join(f"w{rank}" for rank in drawn[first : first + 25]) for first in range(0, tokens, 25)]
    source = write_source(folder / "text", lines, tokens)
    preparation.build(source, folder / "corpus", vocabulary=folder / "words.txt")
    return folder / "corpus"


if __name__ == "__main__":
    run_main(main)
