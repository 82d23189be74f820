"""The words that a model knows, most frequent first, and their ids.

Every sentence is wrapped in <S> and </S>. Unknown words become <UNK>. A file holds `word count` lines. That of One
Billion Words has no </S>, which then gets the count of <S> and the last id, as in the published preprocessing.
"""

import heapq
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from engine.errors import UserError

MARKS = START, END, UNKNOWN = "<S>", "</S>", "<UNK>"
BREAK = "\0"  # marks the end of a line among words
COUNTED_AT_ONCE = 4_000_000  # different words in memory, about 600 MB


class Vocabulary:
    """`words` in the order of their ids, with `counts`. They must contain <S>, </S> and <UNK>."""

    def __init__(self, words: Sequence[str], counts: Sequence[int]) -> None:
        self.words, self.counts = words, counts
        ids = {word: index for index, word in enumerate(words)}
        self.start, self.end, self.unknown = ids[START], ids[END], ids[UNKNOWN]
        self._ids = _Ids(ids | {BREAK: len(words)})
        self._ids.unknown = self.unknown

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The sentences of `text`, one per line: ids, uint32 [tokens], and sentence lengths, int64 [sentences].

        Lines end as in str.splitlines(), and so in the published code. Lines without a word are left out.
        """
        lines = text.replace(BREAK, "\N{REPLACEMENT CHARACTER}").splitlines() or [""]
        # Two places for a line's end: its </S> and the next line's <S>.
        words = f" {BREAK} {BREAK} ".join([*lines, ""]).split()
        tokens = np.fromiter(map(self._ids.__getitem__, words), np.uint32, len(words))
        tokens = np.roll(tokens, 1)
        places = np.flatnonzero(tokens == len(self.words))
        starts, ends = places[0::2], places[1::2]
        tokens[starts], tokens[ends] = self.start, self.end
        lengths = ends - starts + 1
        if lengths.min() == 2:
            tokens, lengths = tokens[np.repeat(lengths > 2, lengths)], lengths[lengths > 2]
        return tokens, lengths

    def dump(self) -> str:
        return "".join(f"{word} {count}\n" for word, count in zip(self.words, self.counts, strict=True))


class _Ids(dict):
    """Word to id, or `unknown`. The lookup runs in C."""

    __slots__ = ("unknown",)

    def __missing__(self, word: str) -> int:
        return self.unknown


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def read_vocabulary(path: Path) -> Vocabulary:
    """Words by falling counts, without those of count 0. UserError unless `path` holds `word count` lines.

    As in the published code, words with equal counts keep their order, and a word's last line gives its count.
    """
    counts: dict[str, int] = {}
    twice = []
    for word, count in _read_pairs(path):
        if word in counts:
            twice.append(word)
        counts[word] = count
    if twice:
        logging.warning(
            "warning: %s: %s there twice, and taken with the last count: %s%s",
            path, "a word is" if len(twice) == 1 else f"{len(twice):,} words are", ", ".join(map(repr, twice[:5])),
            " ..." if len(twice) > 5 else "",
        )  # fmt: skip
    counts = dict(sorted(counts.items(), key=itemgetter(1), reverse=True))
    for mark in (START, UNKNOWN):
        if mark not in counts:
            raise UserError(f"{path}: there is no line for {mark}: a vocabulary holds {START}, {END} and {UNKNOWN}")
    counts.setdefault(END, counts[START])
    counts = {word: count for word, count in counts.items() if count or word in MARKS}
    return Vocabulary(list(counts), list(counts.values()))


def load_vocabulary(path: Path) -> Vocabulary:
    """A vocabulary that `dump` wrote."""
    words, counts = zip(*_read_pairs(path), strict=True)
    return Vocabulary(words, counts)


def _read_pairs(path: Path) -> Iterator[tuple[str, int]]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start:,} is not UTF-8: is this a vocabulary?") from None
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if len(fields) != 2 or not fields[1].isdecimal():
            raise UserError(f"{path}: line {number:,} must be of the form `word count`, not {line[:80]!r}")
        yield fields[0], int(fields[1])


def count_words(texts: Iterable[str]) -> Counter[str]:
    """The count of <S> is the number of lines with words."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
        counts[START] += sum(1 for line in text.splitlines() if line and not line.isspace())
    return counts


def counted_vocabulary(counts: Iterable[Counter[str]], threshold: int, scratch: Path = Path()) -> Vocabulary:
    """The words that occur at least `threshold` times in all `counts`. The others count as <UNK>.

    Words with equal counts are sorted. Beyond COUNTED_AT_ONCE, they go to sorted files in `scratch`, which are merged.
    """
    total: Counter[str] = Counter()
    spilled: list[Path] = []
    try:
        for some in counts:
            total.update(some)
            if len(total) > COUNTED_AT_ONCE:
                spilled.append(_spill(total, scratch / f"counts.{len(spilled)}.tmp"))
                total.clear()
        kept = dict.fromkeys(MARKS, 0)
        runs = [_unspill(path) for path in spilled] + [iter(sorted(total.items()))]
        for word, same in groupby(heapq.merge(*runs), key=itemgetter(0)):
            count = sum(count for _, count in same)
            if count < threshold and word not in MARKS:
                word = UNKNOWN
            kept[word] = kept.get(word, 0) + count
    finally:
        for path in spilled:
            path.unlink(missing_ok=True)
    kept[END] += kept[START]
    ordered = sorted(kept.items(), key=lambda pair: (-pair[1], pair[0]))
    return Vocabulary([word for word, _ in ordered], [count for _, count in ordered])


def _spill(counts: Counter[str], path: Path) -> Path:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{word} {count}\n" for word, count in sorted(counts.items()))
    return path


def _unspill(path: Path) -> Iterator[tuple[str, int]]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            word, count = line.split()
            yield word, int(count)
