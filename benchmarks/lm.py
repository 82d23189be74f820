"""Language modelling: speed and memory of preparing a corpus and of training, against plain ways.

    python -m benchmarks.lm prepare [--text FILE ...] [--tokens 1 10 50] [--rounds 3]
    python -m benchmarks.lm train [--precision fp32 bf16] [--optimizers adam radam apollo] [--device cuda] ...
    python -m benchmarks.lm train --full-size --updates 5

prepare   `python -m language_model.prepare` with one and with two processes against the published way
          (benchmarks/lm_literal.py). Then peak memory, workers included.
train     `train_epoch` of language_model/train.py against a bare loop, in turn: forward, backward and torch's fused
          AdamW on one fixed batch, without clipping.
--full-size  the published model, 793,470 words and 2 x 2048: each contender in its own process, and its memory.
          On a CPU only train.py runs: 5 updates need some 12 GB.

The text is Python's manual, repeated, or --text. Training takes noise with the word frequencies of English (1 / r**1.1
for rank r), because the adaptive softmax's work depends on them.
"""

import argparse
import itertools
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.turns import end_of_epoch, machine, ratios, speeds, turns
from engine.allocator import keep_freed_memory
from engine.config import load_config
from engine.distributed import setup
from engine.errors import UserError, run_main
from engine.precision import Precision
from engine.run_record import RunRecord, peak_memory_mb
from language_model import prepare as preparation
from language_model.config import ModelConfig
from language_model.data import TextData
from language_model.model import LanguageModel
from language_model.prepared import open_corpus
from language_model.raw_text import FOLDERS
from language_model.toy_text import paragraphs
from language_model.train import Config, prepare, train_epoch
from language_model.vocabulary import count_words, counted_vocabulary, load_vocabulary
from optim import AdamW

CONFIGS = Path(__file__).parents[1] / "configs" / "one_billion_words"
FILE_BYTES = 8_200_000  # a fifth of a training file of the benchmark
EXPONENT = 1.1  # of the word frequencies
LENGTH = 20  # tokens of a row in an update


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
    command.add_argument("--speed-tokens", type=int, default=40, help="million tokens, for the speed")
    command.add_argument("--rounds", type=int, default=3)
    command.set_defaults(device="cpu")
    command = commands.add_parser("train", help="training")
    command.add_argument("--words", type=int, default=32_000, help="in the vocabulary (%(default)s)")
    command.add_argument("--hidden", type=int, default=512)
    command.add_argument("--cutoffs", type=int, nargs="+", default=[2000, 10_000])
    command.add_argument("--full-size", action="store_true", help="the published model")
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--precision", nargs="+", default=["fp32"], help="fp32, tf32, bf16, fp16")
    command.add_argument("--optimizers", nargs="+", default=["apollo"], help="rows of configs/one_billion_words")
    command.add_argument("--updates", type=int, default=10, help="updates of each contender in a round")
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    if options.command == "train" and options.full_size:
        options.words, options.hidden, options.cutoffs = 793_470, 2048, [60_000, 100_000, 640_000]
    return options


# Preparation


def measure_preparation(options: argparse.Namespace) -> None:
    lines = text_lines(options.text)
    with tempfile.TemporaryDirectory() as scratch:
        measure_speed(Path(scratch), lines, options)
        measure_memory(Path(scratch), lines, options.tokens)


def measure_speed(folder: Path, lines: list[str], options: argparse.Namespace) -> None:
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text(counted_vocabulary([count_words(lines)], 3).dump(), encoding="utf-8")
    words = len(load_vocabulary(vocabulary))
    source = write_source(folder / "text", lines, options.speed_tokens * 1_000_000)
    tokens = source_tokens(source)
    print(f"preparing {tokens:,} tokens, {words:,} words in the vocabulary, {options.rounds} rounds\n")
    baseline, out = "line by line, pickled", folder / "out"
    ours = ["language_model.prepare", str(source), str(out), "--vocabulary", str(vocabulary), "--workers"]
    contenders = {
        baseline: ["benchmarks.lm_literal", str(source), str(out), str(vocabulary)],
        "language_model.prepare, 1 process": [*ours, "1"],
        "language_model.prepare, 2 processes": [*ours, "2"],
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_s, bytes_ = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0)
    for name in turns(contenders, options.rounds):
        shutil.rmtree(out, ignore_errors=True)
        started, cpu_started = time.perf_counter(), cpu_of_children()
        subprocess.run([sys.executable, "-m", *contenders[name]], check=True, stderr=subprocess.DEVNULL)
        found[name].append(tokens / (time.perf_counter() - started))
        cpu_s[name] += cpu_of_children() - cpu_started
        bytes_[name] = sum(path.stat().st_size for path in out.rglob("*") if path.suffix != ".txt")
    header = f"{'tokens/s':>12}{'lowest':>12}{'highest':>12}{'ratio':>8}{'CPU ns/token':>14}{'bytes/token':>13}"
    print(f"{'':<36}{header}")
    for name, values in found.items():
        ratio = statistics.median(ratios(values, found[baseline]))
        cpu = 1e9 * cpu_s[name] / options.rounds / tokens
        line = f"{name:<36}{statistics.median(values):>12,.0f}{min(values):>12,.0f}{max(values):>12,.0f}"
        print(f"{line}{ratio:>8.2f}{cpu:>14.0f}{bytes_[name] / tokens:>13.2f}")


def measure_memory(folder: Path, lines: list[str], millions: list[int]) -> None:
    print(f"\n{'million tokens':<20}{'files':>8}{'peak memory, MiB: parent + 2 workers':>40}{'seconds':>10}")
    for number in millions:
        source = write_source(folder / f"text{number}", lines, number * 1_000_000)
        command = [sys.executable, "-m", "language_model.prepare", str(source), str(folder / f"memory{number}")]
        started = time.perf_counter()
        peak = peak_of_tree([*command, "--workers", "2"])
        files = len(list((source / FOLDERS["train"]).iterdir()))
        print(f"{number:<20}{files:>8}{peak:>40,.0f}{time.perf_counter() - started:>10.1f}")


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


def cpu_of_children() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_of_tree(command: list[str]) -> float:
    """Run `command`. Returns the peak resident memory of it and its children together, in MiB."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(resident(pid) for pid in tree(process.pid)))
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"{' '.join(command)} failed with status {process.returncode}")
    return peak


def tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return
    for child in children:
        yield from tree(int(child))


def resident(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


# Training


def measure_training(options: argparse.Namespace) -> None:
    tokens = options.batch * LENGTH
    print(
        f"LSTM 2 x {options.hidden}, {options.words:,} words, {tokens:,} tokens an update, "
        f"{options.updates} updates x {options.rounds} rounds\n"
    )
    cells = [(row, precision) for precision in options.precision for row in options.optimizers]
    makers: dict[str, Maker] = {f"train.py, {row}, {p}": partial(train_loop, row, p) for row, p in cells}
    if not (options.full_size and options.device == "cpu"):
        makers |= {f"bare loop, adamw, {precision}": partial(bare_loop, precision) for precision in options.precision}
    with tempfile.TemporaryDirectory() as scratch:
        corpus = make_corpus(Path(scratch), options)
        if options.full_size:
            found = {name: alone(name, make, corpus, options) for name, make in makers.items()}
        else:
            found = in_turn({name: make(corpus, options) for name, make in makers.items()}, options)
    print(f"{'':<28}{'tokens/s':>10}{'lowest':>10}{'highest':>10}{'optimizer':>15}{'/ bare loop':>13}{'peak MiB':>10}")
    for name, (values, optimizer_ms, memory) in found.items():
        middle = statistics.median(values)
        step_ms = 1000 * tokens / middle
        share = f"{optimizer_ms:.1f} ms {100 * optimizer_ms / step_ms:>3.0f} %" if optimizer_ms else ""
        bare = found.get(f"bare loop, adamw, {name.rsplit(', ')[-1]}")
        ratio = f"{statistics.median(ratios(values, bare[0])):.3f}" if bare else ""
        line = f"{name:<28}{middle:>10,.0f}{min(values):>10,.0f}{max(values):>10,.0f}{share:>15}{ratio:>13}"
        print(line + (f"{memory:>10,.0f}" if memory else ""))


class Contender(NamedTuple):
    run: Callable[[], None]  # takes the updates of a round
    optimizer_ms: list[float]  # of some updates


Maker = Callable[[Path, argparse.Namespace], Contender]  # from the corpus


def train_loop(row: str, precision: str, corpus: Path, options: argparse.Namespace) -> Contender:
    """A round is the end of an epoch."""
    config = load_config(
        Config,
        CONFIGS / f"{row}.yaml",
        [
            f"data.root={corpus}",
            f"model.hidden={options.hidden}",
            f"model.cutoffs={options.cutoffs}",
            f"batch={options.batch}",
            f"precision={precision}",
            f"device={options.device}",
            f"log_every={1 if options.full_size else min(5, options.updates)}",
            f"run_dir={corpus / f'run_{row}_{precision}'}",
        ],
    )
    world = setup(options.device)
    run = prepare(config, world, RunRecord(config, config.folder, world))
    return Contender(lambda: end_of_epoch(run, train_epoch, options.updates), run.optimizer_ms)


def bare_loop(precision: str, corpus: Path, options: argparse.Namespace) -> Contender:
    keep_freed_memory()
    device = setup(options.device).device
    config = ModelConfig(name="lstm", hidden=options.hidden, cutoffs=options.cutoffs)
    model = LanguageModel(config, options.words).to(device)
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
    data = TextData(open_corpus(corpus), options.batch, LENGTH, device=device, seed=1)
    ((_, (tokens, targets, *_)),) = next(data.train_batches(0))
    state, cast = model.zero_state(options.batch), Precision(precision, device)

    def updates() -> None:
        for _ in range(options.updates):
            optimizer.zero_grad()
            with cast.autocast():
                log_prob, _ = model(tokens, targets, state)
            cast.backward(-log_prob.mean())
            cast.step(optimizer)

    return Contender(updates, [])


Found = tuple[list[float], float | None, float | None]  # tokens/s in each round; optimizer ms; peak MiB


def in_turn(contenders: dict[str, Contender], options: argparse.Namespace, warmup: bool = True) -> dict[str, Found]:
    """Measure all in this process."""
    runs = {name: each.run for name, each in contenders.items()}
    found = speeds(runs, options.updates * options.batch * LENGTH, options.rounds, setup(options.device), warmup)
    return {
        name: (found[name], statistics.median(each.optimizer_ms) if each.optimizer_ms else None, None)
        for name, each in contenders.items()
    }


def alone(name: str, make: Maker, corpus: Path, options: argparse.Namespace) -> Found:
    """Measure one in its own process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(with_memory, make, corpus, options).result()
        except BrokenProcessPool:
            raise UserError(f"{name}: its process was ended (out of memory?)") from None


def with_memory(make: Maker, corpus: Path, options: argparse.Namespace) -> Found:
    values, optimizer_ms, _ = in_turn({"": make(corpus, options)}, options, warmup=options.device != "cpu")[""]
    return values, optimizer_ms, peak_memory_mb(setup(options.device).device)


def make_corpus(folder: Path, options: argparse.Namespace) -> Path:
    """A prepared corpus of noise with the word frequencies of English."""
    random = np.random.default_rng(0)
    words = [*(f"w{number}" for number in range(options.words - 3)), "<S>", "<UNK>", "</S>"]
    counts = np.sort((1e9 / np.arange(1, len(words) + 1) ** EXPONENT).astype(int))[::-1]
    (folder / "words.txt").write_text("".join(f"{w} {c}\n" for w, c in zip(words, counts, strict=True)))
    drawn = draw_words((options.updates + 2) * options.batch * LENGTH, options.words - 3, random)
    lines = [" ".join(f"w{rank}" for rank in drawn[first : first + 25]) for first in range(0, len(drawn), 25)]
    source = write_source(folder / "text", lines, len(drawn))
    preparation.build(source, folder / "corpus", vocabulary=folder / "words.txt")
    return folder / "corpus"


def draw_words(count: int, words: int, random: np.random.Generator) -> np.ndarray:
    """Ranks of `count` words, int64."""
    shares = np.cumsum(1 / np.arange(1, words + 1) ** EXPONENT)
    return np.searchsorted(shares, random.random(count) * shares[-1])


if __name__ == "__main__":
    run_main(main)
