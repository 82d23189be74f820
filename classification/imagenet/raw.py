"""Every image's place and label in an ImageNet download, for each of its forms.

    folder             train/<class>/*, and val/ or validation/ with <class>/* or flat (labels.py); also in
                       ILSVRC/Data/CLS-LOC, as Kaggle's and image-net.org's archives of 2015 to 2017 unpack
    tar                ILSVRC2012_img_train.tar (holds a tar file per class) and ILSVRC2012_img_val.tar, never unpacked
    parquet, tar.gz    Hugging Face's imagenet-1k (hugging_face.py)

A label is the place of the class name (a WordNet id, n01440764 ...) in sorted order. Images are sorted, so folders and
tar files of the same images make the same LMDB.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from classification.image_files import IMG_EXTENSIONS, DamagedImage, is_image, list_files, list_folders, printable
from classification.imagenet.hugging_face import hugging_face_files, list_hugging_face, locate_hugging_face
from classification.imagenet.items import Item, Source
from classification.imagenet.labels import LabelFiles, label_by_name, stem, wnid_at_end
from classification.imagenet.lmdb import CHUNK, Record
from engine.errors import UserError
from engine.nearest_folder import nearest_folder

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
IMAGENET = {"train": 1_281_167, "val": 50_000, "classes": 1_000}
VAL_IMAGES_A_CLASS = 50  # "Validation: 50000 images, at 50 images per category": the development kits' readme
TREES = (".", "CLS-LOC", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC", "ILSVRC2015/Data/CLS-LOC")  # folders with train/
READERS = 16  # threads; they mostly wait for the disk


class Layout(NamedTuple):
    kind: str  # folder, tar, tar.gz or parquet
    place: Path  # the folder that holds train/, or the files

    @property
    def in_words(self) -> str:
        what = {"folder": "a folder tree", "tar": "the official tar files"}
        return f"{what.get(self.kind, f'imagenet-1k as {self.kind} files')} in {self.place}"

    def files(self) -> Iterator[str]:
        """Files that hold images, not the archive of an unpacked tree."""
        if self.kind == "folder":
            for split in ("train", "val", "validation"):
                if (self.place / split).is_dir():
                    yield from _list_images(self.place / split)
        elif self.kind == "tar":
            yield from (str(self.place / name) for name in (TRAIN_TAR, VAL_TAR) if (self.place / name).is_file())
        else:
            yield from hugging_face_files(self.place, self.kind)


def find_layout(root: Path) -> Layout:
    """Raises UserError if `root` holds ImageNet in no known place."""
    if found := _layout(root):
        return found
    near = nearest_folder(root.absolute(), _layout)
    advice = f"give {near}, the nearest folder that has them" if near else "give the folder that has them"
    if not root.is_dir():
        what = "is a file" if root.exists() else "is not there"
        raise UserError(f"{root.absolute()} {what}, and ImageNet's images are looked for in a folder: {advice}")
    raise UserError(
        f"{root.absolute()} holds neither a folder train/ (nor ILSVRC/Data/CLS-LOC/train/), nor {TRAIN_TAR}, nor "
        f"imagenet-1k's train-*.parquet or train_images_*.tar.gz (nor data/ with them): {advice}"
    )


def _layout(root: Path) -> Layout | None:
    if tree := _find_tree(root):
        return Layout("folder", tree)
    if (root / TRAIN_TAR).is_file():
        return Layout("tar", root)
    found = locate_hugging_face(root)
    return Layout(*found) if found else None


def find_source(root: Path, label_files: LabelFiles | None = None) -> Source:
    """Raises UserError if something is missing or does not fit."""
    label_files = LabelFiles(*(path and path.absolute() for path in label_files or ()))  # messages give full paths
    source = _find(root.absolute(), label_files)
    if (len(source.val), len(source.classes)) == (IMAGENET["val"], IMAGENET["classes"]):
        counts = Counter(item.label for item in source.val)
        if odd := [label for label in range(len(source.classes)) if counts[label] != VAL_IMAGES_A_CLASS]:
            raise UserError(
                f"{root}: {counts[odd[0]]} validation images of the class {source.classes[odd[0]]}, and ImageNet has "
                f"{VAL_IMAGES_A_CLASS} of each: the labels are not those of these images"
            )
    return source


def _find(root: Path, label_files: LabelFiles) -> Source:
    kind, place = find_layout(root)
    if kind == "folder":
        classes, train = _list_train_folder(place / "train")
        return Source("folder", classes, train, _list_val_folder(root, place, classes, label_files), read_files)
    if kind == "tar":
        if not (root / VAL_TAR).is_file():
            raise UserError(f"{root} holds {TRAIN_TAR} but not {VAL_TAR}: put it there")
        classes, train = _list_train_tar(root / TRAIN_TAR)
        val = sorted(_list_tar(root / VAL_TAR), key=_by_name)
        return Source("tar", classes, train, _label(val, classes, [root], label_files, root / VAL_TAR), read_files)
    return list_hugging_face(place, kind)


def _find_tree(root: Path) -> Path | None:
    """The folder that holds train/."""
    return next((root / place for place in TREES if (root / place / "train").is_dir()), None)


def read_files(items: Sequence[Item]) -> Iterator[Record]:
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(items), CHUNK):
            yield from pool.map(lambda item: Record(item.label, item.read()), items[first : first + CHUNK])


class FolderSplit:
    """`split[index]` is a Record, without a checksum. Worker processes share arrays; each would copy a list."""

    def __init__(self, items: Sequence[Item], classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._paths = np.array([os.fsencode(item.path) for item in items])
        self._labels = np.array([item.label for item in items])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Record:
        try:
            with open(self._paths[index], "rb", buffering=0) as file:
                return Record(int(self._labels[index]), file.readall())
        except OSError as error:
            raise DamagedImage(f"cannot be read ({error.strerror})") from None

    def name_of(self, index: int) -> str:
        """Its place and class in words."""
        return f"{printable(os.fsdecode(self._paths[index]))} (class {printable(self.classes[self._labels[index]])})"


def list_folder(root: Path) -> tuple[FolderSplit, FolderSplit]:
    """A folder tree at or below `root`, with the labels of an LMDB."""
    if not _find_tree(root):
        raise UserError(
            f"{root} holds neither an LMDB (train.lmdb, val.lmdb) nor a folder tree (train/<class>/*, val/<class>/*); "
            f"bash scripts/prepare.sh imagenet SOURCE {root} makes the LMDB (docs/data.md)"
        )
    found = find_source(root)
    return FolderSplit(found.train, found.classes), FolderSplit(found.val, found.classes)


def inputs_digest(items: Sequence[Item], root: Path) -> str:
    """sha256 of the images' labels and places relative to `root`. Equal ones make equal builds."""
    digest = sha256()
    for item in items:
        place = os.path.relpath(item.path, root)
        line = f"{item.label}\t{place}\t{item.offset}\t{item.size}\t{item.name}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))  # file names are bytes, in any encoding
    return digest.hexdigest()


def _by_name(item: Item) -> tuple[str, str]:
    return stem(item.name or item.path), item.path


def _list_train_folder(folder: Path) -> tuple[list[str], list[Item]]:
    """Class folders, or Hugging Face's images."""
    if list_folders(folder):
        return _list_classes(folder)
    paths = _list_images(folder)
    if not paths or not all(map(wnid_at_end, paths)):
        raise UserError(f"{folder} holds no folders: it must hold one for each class")
    classes = sorted(set(map(wnid_at_end, paths)))
    label = {wnid: at for at, wnid in enumerate(classes)}
    items = [Item(path, label[wnid_at_end(path)]) for path in paths]
    return classes, sorted(items, key=lambda item: (item.label, *_by_name(item)))


def _list_images(folder: Path) -> list[str]:
    return [path for path in list_files(folder) if is_image(path)]


def _list_classes(split: Path) -> tuple[list[str], list[Item]]:
    """Every image by class and name."""
    classes = list_folders(split)
    folders = [split / name for name in classes]
    with ThreadPoolExecutor(READERS) as pool:  # on a network disk, listing is mostly waiting
        bar = tqdm(pool.map(_list_images, folders), f"listing {split.name}", len(folders), unit="class", disable=None)
        found = list(bar)
    for folder, paths in zip(folders, found, strict=True):
        if not paths:
            raise UserError(f"{printable(folder)} holds no image (files ending in {' '.join(IMG_EXTENSIONS)})")
    items = ([Item(path, label) for path in paths] for label, paths in enumerate(found))
    return classes, [item for one in items for item in sorted(one, key=_by_name)]


def _list_val_folder(root: Path, tree: Path, classes: list[str], label_files: LabelFiles) -> list[Item]:
    folders = [tree / name for name in ("val", "validation") if (tree / name).is_dir()]
    if len(folders) != 1:
        which = "is both there: remove one" if folders else "is not there: put the validation images into one of them"
        raise UserError(f"{tree / 'val'} or {tree / 'validation'} {which} (class folders, or all in one)")
    (val,) = folders
    if list_folders(val):
        names, items = _list_classes(val)
        if unknown := sorted(set(names) - set(classes)):
            raise UserError(f"{printable(val)} has the class '{printable(unknown[0])}', which {tree / 'train'} has not")
        label = {name: at for at, name in enumerate(classes)}
        return sorted((item._replace(label=label[names[item.label]]) for item in items), key=_by_name)
    items = sorted((Item(path, -1) for path in _list_images(val)), key=_by_name)
    return _label(items, classes, _label_places(root, tree, val), label_files, val)


def _label_places(root: Path, tree: Path, val: Path) -> list[Path]:
    """Folders that may hold label files. Kaggle's lies beside ILSVRC/, three folders above CLS-LOC."""
    above = tree.resolve()
    return [*(reversed(above.parents[:3]) if above.name == "CLS-LOC" else ()), root, tree, val]


def _label(
    items: list[Item], classes: list[str], places: list[Path], label_files: LabelFiles, where: Path
) -> list[Item]:
    labels = label_by_name([item.name or item.path for item in items], classes, places, label_files, str(where))
    return [item._replace(label=label) for item, label in zip(items, labels, strict=True)]


def _list_train_tar(path: Path) -> tuple[list[str], list[Item]]:
    """Its images are in tar files inside, each named after its class."""
    with _open_tar(path) as archive:
        inner = {member.name: member for member in archive if member.isfile() and member.name.endswith(".tar")}
        _require_end(archive, inner=False)
        names = sorted(inner, key=lambda name: Path(name).stem)
        items = []
        for label, name in enumerate(tqdm(names, f"listing {path.name}", unit="class", disable=None)):
            start, file = inner[name].offset_data, archive.extractfile(inner[name])
            images = _list_tar(path, file, start, label)
            if not images:
                raise UserError(f"{path}: {name} holds no image; download it again")
            items += sorted(images, key=_by_name)
    classes = [Path(name).stem for name in names]
    if not classes:
        raise UserError(f"{path} holds no tar files, one a class: it is not the official file")
    if len(set(classes)) != len(classes):
        raise UserError(f"{path} holds two tar files of one class: it is not the official file")
    return classes, items


def _list_tar(path: Path, file: IO[bytes] | None = None, start: int = 0, label: int = -1) -> list[Item]:
    """The images of a tar file, or of one inside it at byte `start`."""
    with _open_tar(path, file) as archive:
        items = [
            Item(str(path), label, start + member.offset_data, member.size, member.name)
            for member in archive
            if member.isfile() and is_image(member.name)
        ]
        _require_end(archive, inner=file is not None)
        return items


def _require_end(archive: tarfile.TarFile, inner: bool) -> None:
    """Raise ReadError if the listing stopped early. tarfile stops silently at a bad header.

    An `inner` file may lack the end mark, as the outer file gives its length.
    """
    archive.fileobj.seek(archive.offset)
    mark = archive.fileobj.read(tarfile.BLOCKSIZE)
    if any(mark) or not (mark or inner):
        raise tarfile.ReadError(f"no image and no end at byte {archive.offset:,}")


@contextmanager
def _open_tar(path: Path, file: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:", fileobj=file) as archive:
            yield archive
    except tarfile.TarError as error:
        raise UserError(f"{path} is truncated, or not a plain tar file ({error}): download it again") from None
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path} cannot be read ({reason}): mend that, then run the same command again") from None
