"""Encode a text corpus for training: python -m language_model.prepare SOURCE OUT [--vocabulary FILE]

SOURCE is the One Billion Word benchmark, unpacked or as its .tar.gz (raw_text.py), or text in the same layout:
tokenized, one sentence per line, UTF-8. prepared.py describes the output. After an interruption the same command
continues. Memory does not grow with the corpus.
"""

import argparse
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from engine.errors import UserError, positive, run_main
from engine.files import hold, write_atomically
from engine.machine import core_count
from engine.manifest import MANIFEST
from engine.workers import worker_pool
from language_model.benchmark import TEST_FILE, warnings
from language_model.prepared import (
    VOCABULARY,
    damage,
    disk_errors,
    finished,
    summary,
    token_dtype,
    wait_for_shard,
    write_manifest,
    write_shard,
)
from language_model.raw_text import ALL, ArchiveSource, FolderSource, Part, find_source
from language_model.vocabulary import (
    Vocabulary,
    count_words,
    counted_vocabulary,
    digest,
    load_vocabulary,
    read_vocabulary,
)

JOURNAL = "shards.jsonl"  # of an unfinished preparation: inputs, vocabulary, finished shards

Source = FolderSource | ArchiveSource
T = TypeVar("T")


def main(arguments: list[str]) -> None:
    options = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    build(**vars(options))


def build(
    source: Path,
    out: Path,
    *,
    vocabulary: Path | None = None,
    threshold: int = 3,
    tests: Iterable[str] = (TEST_FILE,),
    workers: int = 1,
) -> None:
    """Encode `source` into `out`, or finish an earlier preparation there.

    Without a `vocabulary` file, the words are those that occur at least `threshold` times in the training text.
    UserError if the source or the vocabulary cannot be used, `out` is in use or made from something else, or the disk
    is full.
    """
    text = find_source(source, sorted(set(tests)))
    given = read_vocabulary(vocabulary) if vocabulary else None
    made_from = {
        "text": digest(json.dumps(text.identity).encode()),
        "vocabulary": f"file {digest(given.dump().encode())}" if given else f"words that occur {threshold} times",
    }
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, "preparing a corpus"):
        known, done = _resume(out, made_from)
        if (out / MANIFEST).exists():
            logging.info("%s is complete: nothing to do", out)
            return
        words = _provide_vocabulary(text, out, known, given, threshold, workers)
        if words != known:
            done = {}  # encoded with another vocabulary
            _append(out, {"vocabulary": words})
        if done:
            logging.info("%s: %d shards are there already", out, len(done))
        encode = partial(_encode, out, words)
        left = (part for part in _with_bar(text, "encoding") if part.name not in done)
        with ThreadPoolExecutor(1) as disk:  # waits for the disk while shards are encoded
            recorded = []
            for entry in _in_parallel(encode, left, workers):
                recorded.append(disk.submit(_record, out, entry))
                done[entry["name"]] = entry
            for each in recorded:
                each.result()
        _finish(out, made_from, words, list(done.values()))


def _resume(out: Path, made_from: dict[str, str]) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """The vocabulary's digest and the whole shards' entries, as an earlier preparation has left them.

    Leaves a journal and no manifest, unless all is finished and undamaged.
    """
    for leftover in (*out.glob("*.tmp"), *out.glob("*/*.tmp")):
        leftover.unlink()
    manifest = finished(out)
    before, known, entries = made_from, None, []
    if manifest:
        before, known, entries = manifest["made_from"], manifest["vocabulary"]["sha256"], manifest["shards"]
    elif lines := _read_journal(out):
        before = lines[0]
        for line in lines[1:]:
            if "name" in line:
                entries.append(line)
            else:  # earlier shards had another vocabulary
                known, entries = line["vocabulary"], []
    if before != made_from:
        raise UserError(f"{out} holds other text, or another vocabulary: choose another folder, or delete it")
    path = out / VOCABULARY
    if known and (not path.exists() or digest(path.read_bytes()) != known):
        path.unlink(missing_ok=True)
    elif manifest and not any(damage(entry, out) for entry in entries):
        return known, {}
    whole = {entry["name"]: entry for entry in entries if not damage(entry, out)}
    lines = [made_from, *([{"vocabulary": known}] if known else []), *whole.values()]
    with disk_errors(out / JOURNAL):
        write_atomically(out / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines))
    (out / MANIFEST).unlink(missing_ok=True)
    return known, whole


def _read_journal(out: Path) -> list[dict[str, Any]]:
    """The whole lines: a kill may cut off the last one."""
    try:
        lines = (out / JOURNAL).read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{out / JOURNAL} is damaged ({error}): delete {out}, then prepare again") from None


def _append(out: Path, line: dict[str, Any]) -> None:
    with disk_errors(out / JOURNAL), open(out / JOURNAL, "ab") as file:
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _record(out: Path, entry: dict[str, Any]) -> None:
    wait_for_shard(entry, out)
    _append(out, entry)


def _provide_vocabulary(
    text: Source, out: Path, known: str | None, given: Vocabulary | None, threshold: int, workers: int
) -> str:
    """Write the vocabulary if it is missing. Returns its digest."""
    if known and (out / VOCABULARY).exists():
        return known
    if given is None:
        train = (part for part in _with_bar(text, "counting words") if part.split == "train")
        given = counted_vocabulary(_in_parallel(_count, train, workers), threshold, out)
    content = given.dump()
    with disk_errors(out / VOCABULARY):
        write_atomically(out / VOCABULARY, content)
    logging.info("%s: %s words", out / VOCABULARY, f"{len(given):,}")
    return digest(content.encode())


def _finish(out: Path, made_from: dict[str, str], vocabulary: str, entries: list[dict[str, Any]]) -> None:
    entries.sort(key=lambda entry: (entry["split"], entry["file"], entry["part"]))
    words = len(_vocabulary(out, vocabulary))
    manifest = {"made_from": made_from, "vocabulary": {"words": words, "sha256": vocabulary}}
    manifest["dtype"] = token_dtype(words).str
    for split in ("train", "test"):
        manifest[split] = found = summary([entry for entry in entries if entry["split"] == split])
        if not found["tokens"]:
            raise UserError(
                f"the {split} files hold no sentence: is this the right SOURCE? --test names the test files"
            )
        logging.info(
            "%s: %s tokens in %s sentences of %d files, %.2f %% of the words out of vocabulary",
            split, f"{found['tokens']:,}", f"{found['sentences']:,}", len(found["files"]), 100 * found["oov_rate"],
        )  # fmt: skip
    for warning in warnings(entries):
        logging.warning("warning: %s", warning)
    write_manifest(out, manifest | {"shards": entries})
    (out / JOURNAL).unlink()
    logging.info("%s is complete", out)


def _with_bar(text: Source, what: str) -> Iterator[Part]:
    with tqdm(total=text.total, desc=what, unit="B", unit_scale=True, disable=None) as bar:
        yield from text.parts(bar.update)


@lru_cache(1)
def _vocabulary(out: Path, sha256: str) -> Vocabulary:
    return load_vocabulary(out / VOCABULARY)


def _encode(out: Path, sha256: str, part: Part) -> dict[str, Any]:
    return write_shard(part, _vocabulary(out, sha256), out)


def _count(part: Part) -> Counter[str]:
    return count_words(part.texts())


def _in_parallel(function: Callable[[Part], T], parts: Iterable[Part], workers: int) -> Iterator[T]:
    """Results as they finish. Only a few parts wait at a time."""
    if workers == 1:
        yield from map(function, parts)
        return
    pending: set[Future[T]] = set()
    with worker_pool(workers) as pool:
        for part in parts:
            pending.add(pool.submit(function, part))
            if len(pending) > workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m language_model.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the unpacked benchmark's folder, or its .tar.gz")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="`word count` lines; else from the text")
    parser.add_argument("--threshold", type=positive, default=3, help="least count of a counted word (%(default)s)")
    tests = {"dest": "tests", "nargs": "+", "metavar": "NAME", "default": [TEST_FILE]}
    parser.add_argument("--test", **tests, help=f"held-out files to test on, or {ALL} (%(default)s)")
    parser.add_argument("--workers", type=positive, default=core_count(), help="processes (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
