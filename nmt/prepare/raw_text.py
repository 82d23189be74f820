"""Parallel text files, read in independent chunks.

Only a newline ends a line: Common Crawl holds carriage returns, form feeds and Unicode's line separators inside
sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.errors import UserError

CHUNK = 10_000  # lines
BLOCK = 1 << 23  # bytes read at once
OTHER_SETS = {  # by number of lines
    2_737: "the filtered test set; this recipe wants that of test-full.tgz",
    4_508_785: "the number of Hugging Face's wmt14, another set",
}


@dataclass(frozen=True)
class TextFile:
    """`starts` holds the offset of every CHUNK-th line, and the file's end."""

    path: Path
    lines: int
    starts: tuple[int, ...]
    sha256: str

    @property
    def chunks(self) -> int:
        return len(self.starts) - 1

    def read(self, chunk: int) -> list[str]:
        """A chunk's lines. UserError if one is not UTF-8."""
        with open(self.path, "rb") as file:
            file.seek(self.starts[chunk])
            block = file.read(self.starts[chunk + 1] - self.starts[chunk])
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError as error:
            line = chunk * CHUNK + block.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{self.path}, line {line:,} is not UTF-8 (byte 0x{block[error.start]:02x}): convert the file "
                "(iconv -f ... -t UTF-8), or remove the line on both sides"
            ) from None
        if chunk == 0:
            text = text.removeprefix("\ufeff")  # a byte order mark
        lines = text.removesuffix("\n").split("\n")
        return [line.removesuffix("\r") for line in lines]


def scan(path: Path) -> TextFile:
    """Read `path` once. UserError if it is missing or empty."""
    digest, lines, place, starts, last = sha256(), 0, 0, [0], b"\n"
    try:
        with open(path, "rb") as file, _bar(path) as bar:
            while block := file.read(BLOCK):
                digest.update(block)
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                every = ends[CHUNK - 1 - lines % CHUNK :: CHUNK]
                starts += (place + 1 + every).tolist()
                lines += len(ends)
                place += len(block)
                last = block[-1:]
                bar.update(len(block))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if last != b"\n":
        lines += 1
    if not lines:
        raise UserError(f"{path} is empty")
    if starts[-1] != place:
        starts.append(place)
    return TextFile(path, lines, tuple(starts), digest.hexdigest())


def scan_pair(paths: Sequence[Path], lines: int | None = None) -> tuple[TextFile, TextFile]:
    """Both sides of a text. UserError if their lines differ in number, or are not `lines`."""
    one, other = map(scan, paths)
    if one.lines != other.lines:
        raise UserError(
            f"{one.path} has {one.lines:,} lines and {other.path.name} {other.lines:,}: the two sides must match line "
            "by line; get the files again"
        )
    if lines and one.lines != lines:
        known = f"; that is {OTHER_SETS[one.lines]}" if one.lines in OTHER_SETS else ""
        raise UserError(f"{one.path} has {one.lines:,} lines, not the {lines:,} of the published file{known}")
    return one, other


def _bar(path: Path) -> tqdm:
    size = path.stat().st_size
    return tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, leave=False, disable=None)
