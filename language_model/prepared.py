"""A prepared corpus: a shard for each part of the text, and a manifest.

    train/NAME.tokens, test/NAME.tokens      ids of all sentences, with <S> and </S>; uint16 for up to 65,536 words,
                                             else uint32; little-endian
    train/NAME.offsets, test/NAME.offsets    each sentence's start, and the last one's end; uint32
    vocabulary.txt                           one `word count` per line, in the order of the ids
    manifest.json                            written last; training reads nothing without it

Training compares a shard's checksum when it opens it.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64

from engine.errors import UserError
from engine.files import wait_for_disk, write_atomically
from engine.manifest import MANIFEST, read_manifest
from language_model.benchmark import TEST_FILE
from language_model.raw_text import Part
from language_model.vocabulary import Vocabulary, digest, load_vocabulary

FORMAT = 2
VOCABULARY = "vocabulary.txt"
SUFFIXES = (".tokens", ".offsets")
SHARD_FIELDS = dict.fromkeys(("name", "split", "file", "digest"), str) | dict.fromkeys(
    ("bytes_per_token", "tokens", "sentences", "words", "unknown"), int
)
MANIFEST_FIELDS = {
    "format": int,
    "made_from": dict,
    "vocabulary": {"words": int, "sha256": str},
    "dtype": str,
    "train": dict,
    "test": dict,
    "shards": [SHARD_FIELDS],
}
OFFSET = np.dtype("<u4")
PREPARE_COMMAND = "python -m language_model.prepare SOURCE OUT"

Arrays = tuple[np.ndarray, np.ndarray]  # a shard: ids [tokens], offsets [sentences + 1]


@dataclass(frozen=True)
class Shard:
    tokens: int
    sentences: int
    read: Callable[[], Arrays]


@dataclass(frozen=True)
class Corpus:
    """`test` is the benchmark's test file, or else all test files. `all_test` holds all if there are more."""

    train: Sequence[Shard]
    test: Sequence[Shard]
    words: int  # in the vocabulary
    vocabulary_digest: str
    load_vocabulary: Callable[[], Vocabulary]
    facts: dict[str, Any]  # identifies the text in a run's record
    all_test: Sequence[Shard] = ()
    valid: Sequence[Shard] = ()  # taken from the training text by `hold_out`


def token_dtype(words: int) -> np.dtype:
    return np.dtype("<u2" if words <= 1 << 16 else "<u4")


def write_shard(part: Part, vocabulary: Vocabulary, out: Path) -> dict[str, Any]:
    """Encode `part` to two files in `out`; returns its manifest entry. UserError e.g. for a full disk."""
    path = out / part.name
    dtype = token_dtype(len(vocabulary))
    checksum, ends, unknown, lines = xxh3_64(), [np.zeros(1, np.int64)], 0, 0
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        with open(_with(path, ".tokens.tmp"), "wb") as file:
            for text in part.texts():
                lines += text.count("\n") + (not text.endswith("\n"))
                tokens, lengths = vocabulary.encode(text)
                unknown += int(np.count_nonzero(tokens == vocabulary.unknown))
                content = tokens.astype(dtype).tobytes()
                checksum.update(content)
                file.write(content)
                ends.append(ends[-1][-1] + np.cumsum(lengths))
        offsets = np.concatenate(ends)
        content = offsets.astype(OFFSET).tobytes()
        checksum.update(content)
        _with(path, ".offsets.tmp").write_bytes(content)
        for suffix in SUFFIXES:
            os.replace(_with(path, f"{suffix}.tmp"), _with(path, suffix))
    return {
        "name": part.name,
        "split": part.split,
        "file": part.file,
        "part": part.index,
        "bytes_per_token": dtype.itemsize,
        "tokens": int(offsets[-1]),
        "sentences": len(offsets) - 1,
        "words": int(offsets[-1]) - 2 * (len(offsets) - 1),
        "lines": lines,
        "unknown": unknown,
        "digest": checksum.hexdigest(),
    }


def wait_for_shard(entry: dict[str, Any], out: Path) -> None:
    for suffix in SUFFIXES:
        path = _with(out / entry["name"], suffix)
        with disk_errors(path):
            wait_for_disk(path)


def damage(entry: dict[str, Any], out: Path) -> str | None:
    """What is wrong with the files' sizes, or None."""
    sizes = entry["tokens"] * entry["bytes_per_token"], (entry["sentences"] + 1) * OFFSET.itemsize
    for suffix, size in zip(SUFFIXES, sizes, strict=True):
        path = _with(out / entry["name"], suffix)
        try:
            found = path.stat().st_size
        except OSError as error:
            return f"{path}: {error.strerror}"
        if found != size:
            return f"{path} has {found:,} bytes and should have {size:,}"
    return None


def write_manifest(out: Path, manifest: dict[str, Any]) -> None:
    with disk_errors(out / MANIFEST):
        write_atomically(out / MANIFEST, json.dumps({"format": FORMAT} | manifest, indent=1) + "\n")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that says how to continue."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: {error.strerror}: the shards finished so far are kept; mend that (free some "
            "space?), then run the same command to go on"
        ) from None


def finished(out: Path) -> dict[str, Any] | None:
    """The manifest in `out`, or None. UserError if a field is missing or wrong."""
    command = PREPARE_COMMAND.replace("OUT", str(out))
    manifest = read_manifest(out, MANIFEST_FIELDS, command, FORMAT)
    if manifest and manifest["dtype"] not in ("<u2", "<u4"):
        raise UserError(f"{out / MANIFEST} is damaged (dtype {manifest['dtype']}): delete it, then {command}")
    return manifest


def open_corpus(root: Path) -> Corpus:
    """The corpus prepared in `root`. UserError if something is missing or does not fit."""
    manifest = finished(root)
    if manifest is None:
        raise UserError(
            f"{root}: no finished corpus there (no {MANIFEST}): "
            f"bash scripts/prepare.sh one_billion_words SOURCE {root} (of other text: {PREPARE_COMMAND})"
        )
    again = f"run `{PREPARE_COMMAND.replace('OUT', str(root))}` as before: it makes what is missing"
    vocabulary = manifest["vocabulary"]
    try:
        content = (root / VOCABULARY).read_bytes()
    except OSError as error:
        raise UserError(f"{root / VOCABULARY}: {error.strerror}; {again}") from None
    if digest(content) != vocabulary["sha256"]:
        raise UserError(
            f"{root / VOCABULARY} is not the vocabulary that the shards beside it were encoded with: put that one "
            "back, or delete the folder and prepare again"
        )
    for entry in manifest["shards"]:
        if problem := damage(entry, root):
            raise UserError(f"{problem}; {again}")
    entries = {split: [entry for entry in manifest["shards"] if entry["split"] == split] for split in ("train", "test")}
    if own := [entry for entry in entries["test"] if entry["file"] == TEST_FILE]:
        if len(own) < len(entries["test"]):
            entries["all_test"] = entries["test"]
        entries["test"] = own
    words, sha256 = vocabulary["words"], vocabulary["sha256"]
    facts = {"vocabulary": {"words": words, "sha256": sha256}}
    facts |= {name: summary(of_text) for name, of_text in entries.items()}
    facts["train"]["files"] = len(facts["train"]["files"])

    def shard(entry: dict[str, Any]) -> Shard:
        read = partial(_read_shard, root / entry["name"], np.dtype(manifest["dtype"]), entry["digest"])
        return Shard(entry["tokens"], entry["sentences"], read)

    # An empty file cannot be mapped.
    shards = {name: [shard(entry) for entry in of_text if entry["tokens"]] for name, of_text in entries.items()}
    load = partial(load_vocabulary, root / VOCABULARY)
    return Corpus(**shards, words=words, vocabulary_digest=sha256, load_vocabulary=load, facts=facts)


def summary(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tokens, sentences, words, unknown = (
        sum(entry[key] for entry in entries) for key in ("tokens", "sentences", "words", "unknown")
    )
    return {
        "files": list(dict.fromkeys(entry["file"] for entry in entries)),
        "tokens": tokens,
        "sentences": sentences,
        "oov_rate": round(unknown / max(words, 1), 6),
    }


def _read_shard(path: Path, dtype: np.dtype, expected: str) -> Arrays:
    arrays = [np.memmap(_with(path, s), t, "r") for s, t in zip(SUFFIXES, (dtype, OFFSET), strict=True)]
    checksum = xxh3_64()
    for array in arrays:
        checksum.update(array)
    if checksum.hexdigest() != expected:
        raise UserError(f"{path}.tokens or .offsets is damaged (checksum): delete both, then {PREPARE_COMMAND} again")
    return arrays[0], arrays[1]


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
