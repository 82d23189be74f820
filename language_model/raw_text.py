"""The unpacked benchmark, or its .tar.gz read as a stream, in parts of bounded size.

    training-monolingual.tokenized.shuffled/news.en-*           training text, without news.en-00000-of-00100
    heldout-monolingual.tokenized.shuffled/news.en.heldout-*    the named files, or all, are the test set

A part becomes a shard. A large file is cut into parts of PART_BYTES, each continued to the end of a line.
"""

import io
import logging
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from engine.errors import UserError
from engine.nearest_folder import nearest_folder
from language_model.benchmark import ARCHIVE, ARCHIVE_CHECKSUM, NOT_FOR_TRAINING

FOLDERS = {"train": "training-monolingual.tokenized.shuffled", "test": "heldout-monolingual.tokenized.shuffled"}
PART_BYTES = 64 << 20  # a training file of the benchmark has 42 MB
BLOCK_BYTES = 1 << 18  # read and encoded at once
LINE_BYTES = 16 << 20  # the longest line accepted
ALL = "all"  # stands for all test files
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Part:
    """A file's lines from byte `start` to `stop`. `data` holds those of an archive."""

    split: str  # train or test
    file: str  # its name
    index: int  # of this part in the file
    start: int
    stop: int
    path: Path | None = None
    data: bytes | None = None

    @property
    def name(self) -> str:
        return f"{self.split}/{self.file}.{self.index:03}"

    def texts(self) -> Iterator[str]:
        """Text, some whole lines at a time. UserError if it is not UTF-8 or a line is too long."""
        with io.BytesIO(self.data) if self.path is None else open(self.path, "rb") as file:
            file.seek(0 if self.path is None else self.start)
            position = self.start
            while position < self.stop:
                block = _read_lines(file, min(BLOCK_BYTES, self.stop - position), self.file)
                if not block:
                    raise UserError(f"{self.path}: the file has become shorter while it was read: run again")
                try:
                    yield (block if position else block.removeprefix(BYTE_ORDER_MARK)).decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{self.file}: byte {position + error.start:,} (0x{block[error.start]:02x}) is not UTF-8: "
                        "convert the file to UTF-8, or remove the line"
                    ) from None
                position += len(block)


class FolderSource:
    def __init__(self, folder: Path, tests: Sequence[str]) -> None:
        train, held_out = (self._list(folder / name) for name in FOLDERS.values())
        train.pop(NOT_FOR_TRAINING, None)
        for name in tests if ALL not in tests else ():
            if name not in held_out:
                known = ", ".join(list(held_out)[:4]) or "nothing"
                raise UserError(
                    f"{folder / FOLDERS['test'] / name} is not there: name the held-out files with --test, or give "
                    f"--test all; what is there: {known}{' ...' if len(held_out) > 4 else ''}"
                )
        self.files = [("train", path) for path in train.values()] + [
            ("test", path) for name, path in held_out.items() if name in tests or ALL in tests
        ]
        self.total = sum(path.stat().st_size for _, path in self.files)
        self.place = folder

    @cached_property
    def identity(self) -> list[list[str]]:
        """Names and SHA-256 of the files."""
        with _bar(self.total, f"reading {self.place.name}") as bar:
            return [[split, path.name, _sha256(path, bar)] for split, path in self.files]

    @staticmethod
    def _list(folder: Path) -> dict[str, Path]:
        if not folder.is_dir():
            there = ", ".join(sorted(path.name for path in folder.parent.glob("[!.]*"))[:4]) or "nothing"
            raise UserError(
                f"{folder} is not there: SOURCE is the .tar.gz, the folder that holds {folder.name}, or the one above; "
                f"what {folder.parent} holds: {there}{_or_nearest(folder.parent)}"
            )
        return {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}

    def parts(self, advance: Callable[[int], None]) -> Iterator[Part]:
        """`advance` receives each part's bytes."""
        for split, path in self.files:
            start, index, size = 0, 0, path.stat().st_size
            with open(path, "rb") as file:
                while start < size:
                    stop = min(start + PART_BYTES, size)
                    file.seek(stop - 1)
                    stop = stop - 1 + len(_read_lines(file, 1, path.name))
                    yield Part(split, path.name, index, start, stop, path=path)
                    advance(stop - start)
                    start, index = stop, index + 1


class ArchiveSource:
    """A .tar or .tar.gz."""

    def __init__(self, archive: Path, tests: Sequence[str]) -> None:
        self.place, self.tests = archive, tests
        self.total = archive.stat().st_size

    @cached_property
    def identity(self) -> list[list[str]]:
        """The archive's SHA-256 and the test files' names."""
        with _bar(self.total, f"reading {self.place.name}") as bar:
            digest = _sha256(self.place, bar)
        if self.place.name == ARCHIVE and f"sha256:{digest}" != ARCHIVE_CHECKSUM:
            logging.warning("warning: %s is not the published archive, by its checksum (%s)", self.place, digest)
        return [["archive", digest], *(["test", name] for name in sorted(self.tests))]

    def parts(self, advance: Callable[[int], None]) -> Iterator[Part]:
        """`advance` receives the bytes read since the last call."""
        found: set[tuple[str, str]] = set()
        told = 0
        try:
            with open(self.place, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*", bufsize=BLOCK_BYTES) as tar:
                for member in tar:
                    split = self._split_of(member)
                    if split is None:
                        continue
                    name = os.path.basename(member.name)
                    found.add((split, name))
                    text, start, index = tar.extractfile(member), 0, 0
                    while data := _read_lines(text, PART_BYTES, name):
                        yield Part(split, name, index, start, start + len(data), data=data)
                        start, index = start + len(data), index + 1
                        advance(raw.tell() - told)
                        told = raw.tell()
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UserError(
                f"{self.place}: not a whole .tar or .tar.gz ({error}): download it again, or give a folder of text"
            ) from None
        named = [name for name in self.tests if name != ALL]
        missing = [f"{FOLDERS['test']}/{name}" for name in named if ("test", name) not in found]
        missing += [folder for split, folder in FOLDERS.items() if split not in dict(found)]
        if missing:
            raise UserError(f"{self.place}: there is no {missing[0]} in it")

    def _split_of(self, member: tarfile.TarInfo) -> str | None:
        folder, name = os.path.split(member.name)
        if not member.isfile() or name.startswith("."):
            return None
        folder = os.path.basename(folder)
        if folder == FOLDERS["train"]:
            return "train" if name != NOT_FOR_TRAINING else None
        return "test" if folder == FOLDERS["test"] and (name in self.tests or ALL in self.tests) else None


def find_source(path: Path, tests: Sequence[str]) -> FolderSource | ArchiveSource:
    """The text at `path`, with the held-out files `tests`. UserError if something is missing.

    `path` is the archive, the folder with the two text folders, or one folder above.
    """
    if path.is_dir():
        below = [folder for folder in path.glob("*/") if (folder / FOLDERS["train"]).is_dir()]
        if (path / FOLDERS["train"]).is_dir():
            return FolderSource(path, tests)
        if len(below) > 1:
            raise UserError(f"{path} holds several corpora: give one as SOURCE, e.g. {min(below)}")
        if not below and (path / ARCHIVE).is_file():
            return ArchiveSource(path / ARCHIVE, tests)
        return FolderSource(below[0] if below else path, tests)
    if path.is_file():
        return ArchiveSource(path, tests)
    raise UserError(
        f"{path} is not there: SOURCE is the unpacked benchmark's folder, or its .tar.gz{_or_nearest(path)}"
    )


def _or_nearest(path: Path) -> str:
    near = nearest_folder(path, lambda folder: (folder / FOLDERS["train"]).is_dir() or (folder / ARCHIVE).is_file())
    return f"; the nearest folder that can be SOURCE: {near}" if near else ""


def _bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=None)


def _sha256(path: Path, bar: tqdm) -> str:
    digest = sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _read_lines(file: BinaryIO, size: int, name: str) -> bytes:
    """`size` bytes and the rest of the line."""
    block = file.read(size)
    if not block or block.endswith(b"\n"):
        return block
    rest = file.readline(LINE_BYTES)
    if len(rest) == LINE_BYTES and not rest.endswith(b"\n"):
        raise UserError(f"{name}: a line of more than {LINE_BYTES >> 20} MiB: the text must hold one sentence a line")
    return block + rest
