"""Makes a table's data ready for training.

    bash scripts/prepare.sh cifar10|imagenet|one_billion_words|wmt14 [SOURCE] [DEST] [--workers N]

SOURCE is the download, in a form that docs/data.md names; without it the published files are downloaded (except
ImageNet's). DEST is by default where the configs look. After an interruption, the same command continues.
"""

import argparse
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from classification.cifar import ARCHIVES
from engine.download import download
from engine.errors import UserError, positive, run_main
from engine.files import hold
from engine.machine import core_count
from engine.nearest_folder import nearest_folder
from language_model import benchmark
from scripts.arguments import Parser

GB = 1e9
# Trials that estimate the whole time.
TRIAL_BYTES = 8 << 20  # of text, encoded
TRIAL_LINES = 1_000  # of each language, tokenized
COPY_BYTES = 64 << 20  # read and written
CIFAR_FILES = (ARCHIVES["cifar10"].file, ARCHIVES["cifar10"].unpacked)


class Plan(NamedTuple):
    found: str
    bytes: float  # to write
    seconds: float  # estimate
    make: Callable[[], object]


class Table(NamedTuple):
    plan: Callable[[Path | None, Path, argparse.Namespace], Plan]
    dest: Path  # data.root in the configs
    finished: str | None  # the file that is written last; None if only `make` can tell
    script: str  # of its Apollo row


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    table = TABLES[options.table]
    dest = options.dest or table.dest
    finished = table.finished is not None and (dest / table.finished).exists()
    if finished and options.source is None:
        print(f"{dest} is complete")
    else:
        plan = table.plan(options.source, dest, options)
        print(f"found: {plan.found}", flush=True)
        if not finished:
            print(f"will write: {amount(plan.bytes)} to {dest}, in {duration(plan.seconds)}", flush=True)
            require_space(dest, plan.bytes)
        plan.make()  # only compares finished data with the source
    where = "" if dest == table.dest else f" {shlex.quote(f'data.root={dest}')}"
    print(f"to train a row: bash scripts/{table.script}{where}")


def plan_cifar10(source: Path | None, dest: Path, options: argparse.Namespace) -> Plan:
    from classification.data import read_cifar10  # importing torch takes seconds

    def cifar_in(folder: Path) -> Path | None:
        return next((folder / name for name in CIFAR_FILES if (folder / name).exists()), None)

    copied, there = None, cifar_in(dest)
    if source:
        place = source.parent if source.name in CIFAR_FILES else source
        copied = cifar_in(place)
        if copied is None:
            near = nearest_folder(place, cifar_in)
            raise UserError(
                f"no CIFAR-10 in {source}: looked for {' and '.join(CIFAR_FILES)}; what is there: "
                f"{nearest_entries(place, 'cifar')}{f'; the nearest folder that has it: {near}' if near else ''}"
            )

    def make() -> None:
        if copied and not (dest / copied.name).exists():
            dest.mkdir(parents=True, exist_ok=True)
            with hold(dest, "copying", wait=True):
                copy_once(copied, dest / copied.name)
        read_cifar10(dest)  # downloads, unpacks, compares checksums

    found = copied or there or "nothing yet: the published archive, 170 MB, will be downloaded"
    return Plan(str(found), 0.36 * GB, 20, make)


def copy_once(source: Path, target: Path) -> None:
    """Copy a file or folder, unless another process has meanwhile."""
    if not target.exists():
        temporary = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, temporary)
        temporary.rename(target)


def plan_imagenet(source: Path | None, dest: Path, options: argparse.Namespace) -> Plan:
    from classification.imagenet.labels import LabelFiles
    from classification.imagenet.prepare import build
    from classification.imagenet.raw import find_layout

    if source is None:
        raise UserError(
            "imagenet cannot be downloaded without its terms: docs/data.md says how to get it; then give it as SOURCE"
        )
    layout = find_layout(source)
    files = list(layout.files())
    size = sum(os.path.getsize(path) for path in files)
    labels = LabelFiles(options.val_labels, options.ids)
    return Plan(
        f"{layout.in_words}, {len(files):,} files with {amount(size)}",
        1.02 * size,
        size / copy_speed(files, dest),
        lambda: build(source, dest, labels),
    )


def plan_one_billion_words(source: Path | None, dest: Path, options: argparse.Namespace) -> Plan:
    from language_model.prepare import build
    from language_model.prepared import token_dtype
    from language_model.raw_text import find_source
    from language_model.vocabulary import read_vocabulary

    if source is None:
        source = dest.with_name(f"{dest.name}_source")
        source.mkdir(parents=True, exist_ok=True)
        try:
            with hold(source, "downloading", wait=True):
                if options.vocabulary is None:
                    download(benchmark.VOCABULARY_URL, source / benchmark.VOCABULARY)
                download(benchmark.ARCHIVE_URL, source / benchmark.ARCHIVE, benchmark.ARCHIVE_CHECKSUM)
        except UserError as error:
            raise UserError(
                f"{error}: get it on a machine with network, put it into {source}, and run the same command again"
            ) from None
    text = find_source(source, options.test)
    places = (source, source.parent, text.place.parent)
    beside = (place / benchmark.VOCABULARY for place in places if (place / benchmark.VOCABULARY).is_file())
    vocabulary = options.vocabulary or next(beside, None)
    if vocabulary is None:
        raise UserError(
            f"no {benchmark.VOCABULARY} in {source} or beside it: get {benchmark.VOCABULARY_URL}, or give another "
            "file with --vocabulary"
        )
    words = read_vocabulary(vocabulary)

    consumed: list[int] = []  # bytes of the source; of an archive, compressed ones
    parts = text.parts(consumed.append)
    start = time.perf_counter()
    part = next(parts)  # an archive's part is already unpacked
    reading = time.perf_counter() - start
    next(parts, None)  # now `consumed` holds the first part's bytes
    size, share = part.stop - part.start, text.total / consumed[0]
    done = tokens = sentences = 0
    start = time.perf_counter()
    for block in part.texts():
        found, lengths = words.encode(block)
        done, tokens, sentences = done + len(block.encode()), tokens + len(found), sentences + len(lengths)
        if done >= TRIAL_BYTES:
            break
    encoding = (time.perf_counter() - start) * size / max(done, 1)
    written = (tokens * token_dtype(len(words)).itemsize + 4 * sentences) * size / max(done, 1) * share
    seconds = share * max(reading, encoding / options.workers) + 10
    return Plan(
        f"{text.place} with {amount(text.total)}, vocabulary {vocabulary} of {len(words):,} words",
        written,
        seconds,
        lambda: build(source, dest, vocabulary=vocabulary, tests=options.test, workers=options.workers),
    )


def plan_wmt14(source: Path | None, dest: Path, options: argparse.Namespace) -> Plan:
    from nmt.prepare.command import prepare
    from nmt.prepare.download import get_archives
    from nmt.prepare.recipes import WMT14
    from nmt.prepare.sources import first_lines, locate
    from nmt.text import moses

    texts, languages = (*WMT14.train, WMT14.valid, WMT14.test), (WMT14.source, WMT14.target)
    if source is None:
        source = dest.with_name(f"{dest.name}_source")
        get_archives(source, texts)
    places = locate(source, texts, languages)
    start = time.perf_counter()
    lines = 0
    for language in languages:
        for line in first_lines(places[WMT14.train[0], language], TRIAL_LINES):
            moses(language).tokenize(line)
            lines += 1
    tokens = (time.perf_counter() - start) / lines * 2 * sum(WMT14.lines.values())
    is_plain = all(place.is_plain for place in places.values())
    # Time besides tokenizing: a third of it for the pieces, two minutes in one process to learn the BPE.
    # Disk: 1.4 GB of unpacked text, 1.5 GB of temporary files, 0.5 GB of arrays.
    return Plan(
        ", ".join(dict.fromkeys(str(place.path) for place in places.values())),
        (2.0 if is_plain else 3.4) * GB,
        tokens * 4 / 3 / options.workers + 120,
        lambda: prepare(WMT14, source, dest, options.workers),
    )


TABLES = {
    "cifar10": Table(plan_cifar10, Path("data/cifar10"), None, "cifar_apollo.sh"),
    "imagenet": Table(plan_imagenet, Path("data/imagenet"), "manifest.json", "imagenet_apollo.sh"),
    "one_billion_words": Table(plan_one_billion_words, Path("data/one_billion_words"), "manifest.json", "lm_apollo.sh"),
    "wmt14": Table(plan_wmt14, Path("data/wmt14_en_de"), "manifest.json", "nmt_apollo.sh"),
}


def copy_speed(files: Iterable[str | Path], dest: Path) -> float:
    """Bytes per second when `files` are read and written below `dest` at once."""
    dest.mkdir(parents=True, exist_ok=True)
    trial = dest / "trial.tmp"
    read = written = 0.0
    size = 0
    try:
        with open(trial, "wb") as target:
            for path in files:
                with open(path, "rb") as source:
                    start = time.perf_counter()
                    block = source.read(COPY_BYTES - size)
                    read += time.perf_counter() - start
                start = time.perf_counter()
                target.write(block)
                written += time.perf_counter() - start
                size += len(block)
                if size >= COPY_BYTES:
                    break
            start = time.perf_counter()
            os.fsync(target.fileno())
            written += time.perf_counter() - start
    finally:
        trial.unlink(missing_ok=True)
    return max(size, 1) / max(read, written)


def require_space(dest: Path, size: float) -> None:
    """Raise UserError if the disk of `dest` lacks `size` bytes. Files of an earlier start count as free."""
    there = next(path for path in (dest.absolute(), *dest.absolute().parents) if path.exists())
    kept = sum(path.stat().st_size for path in dest.rglob("*") if path.is_file())
    free = shutil.disk_usage(there).free
    if free + kept < size:
        raise UserError(
            f"{dest} has {amount(free)} free, and this takes {amount(size - kept)}: make room, or give another DEST"
        )


def nearest_entries(folder: Path, start: str) -> str:
    """Up to four names, first those that begin with `start`."""
    names = (path.name for path in islice(folder.glob("[!.]*"), 10_000))
    return ", ".join(sorted(names, key=lambda name: (not name.startswith(start), name))[:4]) or "nothing"


def amount(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.3g} MB"


def duration(seconds: float) -> str:
    if seconds < 5:
        return "a few seconds"
    return f"about {seconds:.0f} seconds" if seconds < 90 else f"about {seconds / 60:.0f} minutes"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bash scripts/prepare.sh",
        description="The data of a table, ready for training. It asks nothing; run it again after an interruption. "
        "Paths are relative to the root of the repository.",
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("source", type=Path, nargs="?", help="what was downloaded (default: download it)")
    parser.add_argument("dest", type=Path, nargs="?", help="default: where the configs look for it")
    parser.add_argument("--workers", type=positive, default=core_count(), metavar="N", help="processes (default: all)")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="one_billion_words: `word count` lines")
    parser.add_argument(
        "--test", nargs="+", metavar="NAME", help="one_billion_words: held-out files to test on, or all"
    )
    parser.add_argument(
        "--val-labels", type=Path, metavar="FILE", help="imagenet: labels of the validation images, of any known kind"
    )
    parser.add_argument("--ids", type=Path, metavar="FILE", help="imagenet: what the ids in --val-labels stand for")
    options = parser.parse_intermixed_args(arguments)
    if options.source:
        options.source = options.source.absolute()  # for the messages
    if options.table != "one_billion_words" and (options.vocabulary or options.test):
        raise UserError("--vocabulary and --test are options of one_billion_words")
    if options.table != "imagenet" and (options.val_labels or options.ids):
        raise UserError("--val-labels and --ids are options of imagenet")
    options.test = options.test or [benchmark.TEST_FILE]
    return options


if __name__ == "__main__":
    run_main(main)
