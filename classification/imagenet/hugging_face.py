"""Hugging Face's imagenet-1k, in SOURCE or in SOURCE/data, in both of its forms.

    tar.gz     train_images_0.tar.gz ... train_images_4.tar.gz and val_images.tar.gz; images named NAME_wnid.JPEG
    parquet    train-00000-of-00294.parquet ... and validation-00000-of-00014.parquet; columns `image` (bytes, path) and
               `label`, the class's place among the sorted wnids; `path` is the name in the tar.gz

Names and classes are as in its loading script, imagenet-1k.py, and classes.py. Both forms are read from front to back.
"""

import gzip
import os
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING

from tqdm import tqdm

from classification.image_files import is_image, scan
from classification.imagenet.items import Item, Read, Source
from classification.imagenet.labels import wnid_at_end
from classification.imagenet.lmdb import Record
from engine.errors import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

TRAIN_ARCHIVES, VAL_ARCHIVE = [f"train_images_{number}.tar.gz" for number in range(5)], "val_images.tar.gz"
ARCHIVE = re.compile(r"(train_images_\d|val_images)\.tar\.gz")
SHARD = re.compile(r"(train|validation)-(\d+)-of-(\d+)\.parquet")
NAMES = {"parquet": SHARD, "tar.gz": ARCHIVE}


def locate_hugging_face(root: Path) -> tuple[str, Path] | None:
    """The form and folder of its files in `root`, or None."""
    for folder in (root, root / "data"):
        names = [entry.name for entry in scan(folder)] if folder.is_dir() else []
        for kind, name in NAMES.items():
            if any(map(name.fullmatch, names)):
                return kind, folder
    return None


def hugging_face_files(folder: Path, kind: str) -> list[str]:
    """The files of the form `kind`, without the test set's."""
    return sorted(entry.path for entry in scan(folder) if NAMES[kind].fullmatch(entry.name))


def list_hugging_face(folder: Path, kind: str) -> Source:
    """Raises UserError if a file is missing or damaged."""
    return _list_parquet(folder) if kind == "parquet" else _list_archives(folder)


def _list_archives(folder: Path) -> Source:
    paths = [folder / name for name in (*TRAIN_ARCHIVES, VAL_ARCHIVE)]
    _require(paths)
    with ThreadPoolExecutor() as pool, tqdm(desc="listing archives", unit="image", disable=None) as bar:
        *train, val = pool.map(lambda path: _list_archive(path, bar), paths)
    train = [item for items in train for item in items]
    return _labelled("tar.gz", train, val, [wnid_at_end(item.name) for item in train], read_archives)


def _list_archive(path: Path, bar: tqdm) -> list[Item]:
    items = []
    for number, (name, _) in enumerate(_stream(str(path))):
        if wnid_at_end(name) is None:
            raise UserError(f"{path}: {name} does not end with its class, as in NAME_n01440764.JPEG")
        items.append(Item(str(path), -1, number, name=name))
        bar.update()
    return items


def read_archives(items: Sequence[Item]) -> Iterator[Record]:
    """The images of `items`, which must be in the archives' order."""
    for path, group in groupby(items, attrgetter("path")):
        wanted = {item.offset: item for item in group}
        for number, (name, file) in enumerate(_stream(path)):
            if item := wanted.get(number):
                if name != item.name:
                    raise UserError(f"{path} has changed since it was listed: run the same command again")
                yield Record(item.label, file.read())


def _stream(path: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Each image's name and content, to the file's end, where gzip compares the checksum."""
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            while member := archive.next():
                if member.isfile() and is_image(member.name):
                    yield member.name, archive.extractfile(member)
                archive.members.clear()  # tarfile would keep all in memory
            while padding := file.read(1 << 20):
                if padding.strip(b"\0"):
                    raise tarfile.ReadError("something that is no image's header")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): download it again") from None


def _list_parquet(folder: Path) -> Source:
    _pyarrow(folder)
    train, val = (_list_shards(folder, split) for split in ("train", "validation"))
    wnids = [wnid_at_end(item.name) or _wnid_at_start(item.name) for item in train]
    for item, wnid in zip(train, wnids, strict=True):
        if wnid is None:
            raise UserError(
                f"{item.path}: row {item.offset} names its image '{item.name}', without a class as in "
                f"NAME_n01440764.JPEG: nothing tells what its label {item.label} stands for"
            )
    return _labelled("parquet", train, val, wnids, read_parquet)


def _wnid_at_start(name: str) -> str | None:
    """The class in a name like n01440764_10026.JPEG, or None."""
    found = re.match(r"(n\d{8})_", name)
    return found and found[1]


def _list_shards(folder: Path, split: str) -> list[Item]:
    shards = [SHARD.fullmatch(entry.name) for entry in scan(folder)]
    counts = sorted({shard[3] for shard in shards if shard and shard[1] == split})
    if not counts:
        raise UserError(f"{folder} holds no {split}-*.parquet: download them too")
    if len(counts) > 1:
        raise UserError(f"{folder} holds two sets of {split}-*.parquet, of {counts[0]} and of {counts[1]} files")
    paths = [folder / f"{split}-{number:0{len(counts[0])}}-of-{counts[0]}.parquet" for number in range(int(counts[0]))]
    _require(paths)
    items = []
    for path in tqdm(paths, f"listing {split}", unit="file", disable=None):
        with _opened(str(path)) as file:
            columns = set(file.schema_arrow.names)
            leaves = {file.schema.column(at).path for at in range(len(file.schema))}
            if "label" not in columns or not {"image.bytes", "image.path"} <= leaves:
                raise UserError(f"{path} has no columns label and image (bytes, path): it is not imagenet-1k's")
            table = file.read(columns=["image.path", "label"]).to_pydict()
        for number, (image, label) in enumerate(zip(table["image"], table["label"], strict=True)):
            name = os.path.basename((image or {}).get("path") or "")
            items.append(Item(str(path), -1 if label is None else int(label), number, name=name))
    return items


def read_parquet(items: Sequence[Item]) -> Iterator[Record]:
    """The images of `items`, which must be in the rows' order."""
    for path, group in groupby(items, attrgetter("path")):
        wanted = list(group)
        with _opened(path) as file:
            first = 0
            for number in range(file.num_row_groups):
                end = first + file.metadata.row_group(number).num_rows
                here = [item for item in wanted if first <= item.offset < end]
                column = file.read_row_group(number, columns=["image.bytes"])["image"] if here else ()
                for item in here:
                    content = column[item.offset - first].as_py()["bytes"]
                    if content is None:
                        raise UserError(f"{path}: row {item.offset} holds no image, only its path")
                    yield Record(item.label, content)
                first = end


@contextmanager
def _opened(path: str) -> Iterator["ParquetFile"]:
    pyarrow = _pyarrow(Path(path).parent)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}): download it again") from None


def _pyarrow(folder: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        install = f"{sys.executable} -m pip install pyarrow"
        raise UserError(f"reading the parquet files in {folder} needs pyarrow: {install}") from None
    return pyarrow


def _require(paths: Sequence[Path]) -> None:
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(f"{missing[0]} is missing ({len(missing)} of {len(paths)} files are): download it too")


def _labelled(kind: str, train: list[Item], val: list[Item], wnids: list[str], read: Read) -> Source:
    """`wnids` are the training images' classes. Labels and names must agree."""
    classes = sorted(set(wnids))
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    labelled = []
    for item, wnid in zip(train + val, wnids + [wnid_at_end(item.name) for item in val], strict=True):
        label = item.label if wnid is None else label_of.get(wnid)
        if label is None:
            raise UserError(f"{item.path}: {item.name} is of a class that the training images have not")
        if kind == "parquet" and not 0 <= label == item.label < len(classes):
            raise UserError(
                f"{item.path}: row {item.offset}, {item.name or 'without a name'}, has the label {item.label}, and its "
                f"class is number {label} of {len(classes):,} in sorted order"
            )
        labelled.append(item._replace(label=label))
    return Source(kind, classes, labelled[: len(train)], labelled[len(train) :], read)
