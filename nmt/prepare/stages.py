"""The three stages of a preparation: Moses tokens, the BPE learned on them, ids of the pairs that pass filters.

A killed one continues with the first missing file of the work folder.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from engine.errors import UserError
from engine.files import wait_for_disk
from engine.workers import worker_pool
from nmt.codec import EOS, UNK, Codec, learn
from nmt.prepare.raw_text import CHUNK, TextFile
from nmt.prepare.recipes import Recipe
from nmt.prepared import EVALUATED, paths_of, write_json
from nmt.text import moses

MAX_EVALUATED = 1000  # tokens; a longer line to evaluate on means a broken file

Pair = tuple[TextFile, TextFile]
Result = TypeVar("Result")
Map = Callable[[Callable[["Chunk"], Result], Sequence["Chunk"]], Iterator[Result]]  # keeps the order


@dataclass(frozen=True)
class Chunk:
    """CHUNK lines of both sides."""

    split: str
    files: Pair
    index: int  # in the files
    tokens: tuple[Path, Path]
    counts: Path  # written last: then the tokens are whole

    @property
    def lines(self) -> int:
        return min(CHUNK, self.files[0].lines - self.index * CHUNK)


def make_chunks(split: str, pairs: Sequence[Pair], recipe: Recipe, work: Path) -> list[Chunk]:
    chunks = []
    for files in pairs:
        for index in range(files[0].chunks):
            stem = f"{split}.{len(chunks):05}"
            tokens = tuple(work / f"{stem}.{language}" for language in (recipe.source, recipe.target))
            chunks.append(Chunk(split, files, index, tokens, work / f"{stem}.json"))
    return chunks


@contextmanager
def processes(workers: int) -> Iterator[Map]:
    if workers == 1:
        yield map
        return
    with worker_pool(workers, {"TOKENIZERS_PARALLELISM": "false"}) as pool:  # one thread in each process
        yield pool.map


def tokenize(split: str, chunks: Sequence[Chunk], recipe: Recipe, each: Map) -> Counter[str]:
    """The first stage: write every chunk's tokens, and count each character."""
    characters = Counter()
    with _bar(f"tokens of {split}", chunks) as bar:
        for chunk, found in zip(chunks, each(partial(tokenize_chunk, recipe), chunks), strict=True):
            characters.update(found)
            bar.update(chunk.lines)
    return characters


def tokenize_chunk(recipe: Recipe, chunk: Chunk) -> dict[str, int]:
    """Write the tokens unless they are there. Returns each character's count."""
    if chunk.counts.exists():
        return json.loads(chunk.counts.read_text(encoding="utf-8"))
    sides = []
    for language, file in zip((recipe.source, recipe.target), chunk.files, strict=True):
        sides.append([moses(language).tokenize(line) for line in file.read(chunk.index)])
    if chunk.split in EVALUATED:
        words = [max(len(line.split()) for line in pair) for pair in zip(*sides, strict=True)]
        _refuse_long(chunk, np.array(words), "words")
    characters = Counter()
    for side, path in zip(sides, chunk.tokens, strict=True):
        text = "".join(f"{line}\n" for line in side)
        characters.update(text)
        path.write_text(text, encoding="utf-8", newline="")
        wait_for_disk(path)
    write_json(chunk.counts, characters)
    return characters


def learn_codec(chunks: Sequence[Chunk], characters: Counter[str], recipe: Recipe, work: Path) -> Codec:
    """The second stage: the codec in `work`."""
    if (work / "codec.json").exists():
        return Codec.load(work)
    if not characters.keys() - {"\n"}:
        raise UserError("the training files hold no text: every line is empty")
    files = list(chain.from_iterable(chunk.tokens for chunk in chunks))
    logging.info("learning %s merges from both sides of the training text", f"{recipe.merges:,}")
    codec = learn(files, characters, recipe.merges, recipe.source, recipe.target)
    codec.save(work)
    return codec


def encode(split: str, chunks: Sequence[Chunk], codec: Codec, recipe: Recipe, out: Path, each: Map) -> dict[str, Any]:
    """The third stage: write arrays and raw text. Returns the split's manifest entry."""
    dtype = np.dtype("<u2" if codec.size <= 1 << 16 else "<u4")
    languages = (recipe.source, recipe.target)
    lengths: dict[str, list[np.ndarray]] = {language: [] for language in languages}
    unknown = dict.fromkeys(languages, 0)
    lines = Counter()
    with ExitStack() as files, _bar(f"ids of {split}", chunks) as bar:
        arrays = {name: files.enter_context(open(out / f"{split}.{name}.bin", "wb")) for name in languages}
        work = partial(encode_chunk, recipe, chunks[0].counts.parent, dtype)
        for chunk, (left, sides) in zip(chunks, each(work, chunks), strict=True):
            lines.update(left)
            for language, (ids, found) in zip(languages, sides, strict=True):
                arrays[language].write(ids.tobytes())
                lengths[language].append(found)
                unknown[language] += int((ids == UNK).sum())
            bar.update(chunk.lines)
    entry: dict[str, Any] = {"lines": dict(lines), "pairs": sum(map(len, lengths[recipe.source]))}
    if not entry["pairs"]:
        raise UserError(f"no pair of {split} is left after the filter: are these the two sides of the same text?")
    for side, language in enumerate(languages):
        offsets = np.concatenate([[0], *lengths[language]]).cumsum(dtype=np.int64)
        offsets.astype("<i8").tofile(out / f"{split}.{language}.offsets")
        entry[language] = {"tokens": int(offsets[-1]), "unknown": unknown[language], "token_bytes": dtype.itemsize}
        if split in EVALUATED:  # raw, for sacreBLEU
            text = "".join(f"{line}\n" for chunk in chunks for line in chunk.files[side].read(chunk.index))
            (out / f"{split}.{language}.txt").write_text(text, encoding="utf-8", newline="")
    paths = paths_of(out, split, languages)
    for path in paths:
        wait_for_disk(path)
    entry["sha256"] = {path.name: file_sha256(path) for path in paths}
    return entry


def encode_chunk(
    recipe: Recipe, work: Path, dtype: np.dtype, chunk: Chunk
) -> tuple[dict[str, int], list[tuple[np.ndarray, np.ndarray]]]:
    """The lines left after each filter; then each side's ids end to end, and its sentences' lengths, with </s>."""
    sides = []
    for path in chunk.tokens:
        lines = path.read_bytes().decode().split("\n")[:-1]
        sides.append([[*ids, EOS] for ids in _codec(work).encode_tokens(lines)])
    pieces = np.array([[len(ids) - 1 for ids in side] for side in sides])
    kept, left = np.arange(chunk.lines), {"read": chunk.lines}
    if chunk.split == "train":
        for name, passes in _filters(recipe, pieces).items():
            kept = kept[passes[kept]]
            left[name] = len(kept)
    else:
        _refuse_long(chunk, pieces.max(axis=0), "pieces")
    sides = [[side[index] for index in kept] for side in sides]
    return left, [
        (np.fromiter(chain.from_iterable(side), dtype), np.fromiter(map(len, side), np.int64, len(side)))
        for side in sides
    ]


def _filters(recipe: Recipe, pieces: np.ndarray) -> dict[str, np.ndarray]:
    """Which training pairs, with `pieces` int64 [2, pairs], pass each filter, bool [pairs].

    They are those of clean-corpus-n.perl, which fairseq's prepare-wmt14en2de.sh runs after BPE.
    """
    longer, shorter = pieces.max(axis=0), pieces.min(axis=0)
    return {
        "not_empty": shorter > 0,
        "within_length": longer <= recipe.max_length,
        "within_ratio": longer <= recipe.ratio * shorter,
    }


def file_sha256(path: Path) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_long(chunk: Chunk, lengths: np.ndarray, unit: str) -> None:
    if lengths.max() > MAX_EVALUATED:
        at = int(lengths.argmax())
        raise UserError(
            f"{chunk.files[0].path}, line {chunk.index * CHUNK + at + 1:,}: {lengths[at]:,} {unit} on one side are no "
            f"sentence to evaluate on (at most {MAX_EVALUATED:,}), and nothing is left out there: repair the files"
        )


@lru_cache(maxsize=1)
def _codec(folder: Path) -> Codec:
    return Codec.load(folder)


def _bar(what: str, chunks: Sequence[Chunk]) -> tqdm:
    total = sum(chunk.lines for chunk in chunks)
    return tqdm(total=total, desc=what, unit="pair", unit_scale=True, disable=None)
