"""Prepared ImageNet: one LMDB file per split with the images' own bytes, and a manifest.

    train.lmdb, val.lmdb    key: the image's index, 8 bytes, big-endian; value: label (int32, little-endian) + the file
    manifest.json           written last; training reads nothing without it

A million small files are slow to list, copy and open. Each file also holds `format`, `classes`, `inputs` (a digest of
the list of images), `images` (their number) and, for every 256 images, `digests:` + first index: the xxh3 checksums of
their values. These change in one transaction with the images, so a killed build continues where it was.
"""

import errno
import json
import shutil
import struct
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
from xxhash import xxh3_64_digest

from classification.image_files import DamagedImage
from classification.imagenet.lookup import DamagedFile, LmdbFile
from engine.errors import UserError
from engine.manifest import MANIFEST, read_manifest

FORMAT = 1
SPLITS = ("train", "val")
MANIFEST_FIELDS = {
    "format": int,
    "source": str,
    "inputs": dict,
    "splits": dict.fromkeys(SPLITS, {"images": int, "digest": str}),
    "classes": [str],
}
CHUNK = 256  # images in one transaction, about 28 MB of ImageNet
DIGEST_BYTES = 8
FIRST_MAP = 1 << 30  # bytes of address space; it doubles when full
# LMDB's errors about the content. After its other errors the file may be whole.
WRONG_CONTENT = (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)
BUILD_COMMAND = "bash scripts/prepare.sh imagenet SOURCE OUT"


class Record(NamedTuple):
    """A label and an image file's bytes."""

    label: int
    image: bytes | memoryview


def image_key(index: int) -> bytes:
    return struct.pack(">Q", index)


def digests_key(first: int) -> bytes:
    return b"digests:" + image_key(first)


class SplitWriter:
    """Appends images to one split, also to an unfinished file.

    Raises UserError if the file was begun from another list of images (`inputs`), is damaged or cannot be opened, and
    for a full disk.
    """

    def __init__(self, path: Path, inputs: str, classes: Sequence[str], map_size: int = FIRST_MAP) -> None:
        self.path, self._map_size = path, map_size
        while path.exists() and self._map_size < path.stat().st_size:
            self._map_size *= 2
        with self._open() as env:
            # Reading a missing page would kill the process.
            if path.stat().st_size < (env.info()["last_pgno"] + 1) * env.stat()["psize"]:
                raise _damaged(path, "its end is missing")
            with env.begin() as transaction:
                self.images = int(transaction.get(b"images", b"0"))
                found = {name: transaction.get(name) for name in (b"format", b"inputs")}
        if found == {b"format": None, b"inputs": None}:
            meta = {"format": str(FORMAT), "inputs": inputs, "classes": json.dumps(list(classes)), "images": "0"}
            self._write([(name.encode(), value.encode()) for name, value in meta.items()])
        elif found != {b"format": str(FORMAT).encode(), b"inputs": inputs.encode()}:
            raise UserError(f"{path} was begun from other images, or by another version: delete it, or build elsewhere")

    def append(self, records: Sequence[Record]) -> None:
        """Add CHUNK images. Only the last chunk may be smaller."""
        values = [struct.pack("<i", record.label) + record.image for record in records]
        pairs = [(image_key(self.images + offset), value) for offset, value in enumerate(values)]
        pairs.append((digests_key(self.images), b"".join(xxh3_64_digest(value) for value in values)))
        pairs.append((b"images", str(self.images + len(records)).encode()))
        self._write(pairs)
        self.images += len(records)

    def _write(self, pairs: list[tuple[bytes, bytes]]) -> None:
        """Write all of `pairs` or nothing."""
        while True:
            try:
                with self._open() as env, env.begin(write=True) as transaction:
                    for key, value in pairs:
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self._map_size *= 2
            except lmdb.Error as error:
                # LMDB reports a half-finished write as an input/output error.
                full = shutil.disk_usage(self.path.parent).free < sum(len(value) for _, value in pairs)
                raise UserError(
                    f"{self.path}: {'the disk is full' if full else error}: {self.images:,} images are safely written; "
                    f"{'free some space' if full else 'mend that'}, then run the same command to go on"
                ) from None

    def _open(self) -> lmdb.Environment:
        """The file, opened anew for each transaction.

        The same images must give the same bytes, but unused parts of LMDB's pages keep data written since the opening.
        """
        try:
            return lmdb.open(str(self.path), subdir=False, lock=False, map_size=self._map_size)
        except lmdb.Error as error:
            raise _not_opened(self.path, error, self._map_size) from None


class LmdbSplit:
    """One split, for reading: `split[index]` is a Record, or raises DamagedImage if its checksum differs.

    No lock is taken: the disk may be read-only. No damage ends the process (lookup.py).
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        """Raises UserError if the file is not whole."""
        self.path, self.classes = path, tuple(classes)
        self._file, self._digests = _open_split(path)

    def __len__(self) -> int:
        return len(self._digests)

    def __getitem__(self, index: int) -> Record:
        try:
            value = self._file.get(image_key(index))
        except DamagedFile as error:
            raise DamagedImage(f"cannot be found ({error})") from None
        if value is None:
            raise DamagedImage("is missing")
        if xxh3_64_digest(value) != self._digests[index].tobytes():
            raise DamagedImage("differs from its checksum")
        return Record(_label(value), value[4:])

    def name_of(self, index: int) -> str:
        """Its place and class in words, even if the page is damaged."""
        try:
            value = self._file.get(image_key(index))
        except DamagedFile:
            value = None
        label = _label(value) if value else -1
        known = self.classes[label] if 0 <= label < len(self.classes) else "unknown"
        return f"{self.path}, key {index} (class {known})"

    def content_digest(self) -> str:
        """sha256 over all checksums in order."""
        return sha256(self._digests.tobytes()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:  # a spawned process opens the file itself
        return LmdbSplit, (self.path, self.classes)


def _open_split(path: Path) -> tuple[LmdbFile, np.ndarray]:
    """A split's file and checksums, uint8 [images, DIGEST_BYTES]."""
    if not path.is_file():
        raise UserError(f"{path} is not there: make it with `{BUILD_COMMAND}`")
    try:
        file = LmdbFile(path)
        images = int(bytes((file.get(b"images") or b"0")[:20]))
        if images * DIGEST_BYTES > file.size:
            raise DamagedFile(f"it says that it holds {images:,} images")
        digests = np.empty((images, DIGEST_BYTES), np.uint8)
        for first in range(0, images, CHUNK):
            found, part = file.get(digests_key(first)), digests[first : first + CHUNK]
            if found is None or len(found) != part.size:
                raise DamagedFile("its checksums are not whole")
            part.reshape(-1)[:] = np.frombuffer(found, np.uint8)
    except ValueError as error:  # DamagedFile is one
        raise _damaged(path, error) from None
    except OSError as error:
        raise _not_opened(path, error, path.stat().st_size) from None
    return file, digests


def _label(value: memoryview) -> int:
    return int.from_bytes(value[:4], "little", signed=True)


def _damaged(path: Path, how: object) -> UserError:
    return UserError(f"{path} is truncated or damaged ({how}): delete it, and {MANIFEST} beside it, then build again")


def _not_opened(path: Path, error: lmdb.Error | OSError, map_size: int) -> UserError:
    """Only wrong content leads to the advice to delete the file."""
    if isinstance(error, WRONG_CONTENT):
        return _damaged(path, error)
    reason = error.strerror or error if isinstance(error, OSError) else str(error).removeprefix(f"{path}: ")
    if isinstance(error, lmdb.MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return UserError(
            f"{path}: {reason}: it takes {map_size / 2**30:.1f} GiB of address space (not of memory), and this process "
            "may not have them: raise the limit (ulimit -v unlimited), then run the same command again"
        )
    return UserError(f"{path} cannot be opened ({reason}): mend that, then run the same command again")


def finished(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, or None. UserError if a field is missing or wrong."""
    return read_manifest(folder, MANIFEST_FIELDS, BUILD_COMMAND.replace("OUT", str(folder)), FORMAT)


def open_splits(folder: Path) -> tuple[LmdbSplit, LmdbSplit]:
    """Both splits of a build. Raises UserError if it is unfinished or not whole."""
    manifest = finished(folder)
    if manifest is None:
        if not any((folder / f"{name}.lmdb").exists() for name in SPLITS):
            raise UserError(f"{folder} holds no train.lmdb and val.lmdb: make them with `{BUILD_COMMAND}`")
        raise UserError(
            f"{folder} holds an unfinished build ({MANIFEST} is missing): run `{BUILD_COMMAND}` to finish it"
        )
    train, val = (LmdbSplit(folder / f"{name}.lmdb", manifest["classes"]) for name in SPLITS)
    for split, facts in ((train, manifest["splits"]["train"]), (val, manifest["splits"]["val"])):
        if len(split) != facts["images"]:
            raise UserError(
                f"{split.path} holds {len(split):,} images and {MANIFEST} says {facts['images']:,}: they belong to "
                "different builds; build again"
            )
    return train, val
