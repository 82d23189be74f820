"""What a raw ImageNet download holds: every image's place and label, from a folder tree or from the official tar files.

    folder    train/<class>/*, and val/<class>/* or a flat val/*
    tar       ILSVRC2012_img_train.tar (one tar file a class inside) and ILSVRC2012_img_val.tar, never unpacked

An image in a tar file lies there in one piece, so both come down to the same: a path, an offset and a size. The labels
are the places of the class names (WordNet ids, n01440764 ...) in sorted order, as everywhere. Nothing in the names of
the validation images tells their class; for a flat val, it is read from one of

    ILSVRC2012_validation_ground_truth.txt    the official file: an id, 1 to 1000, for each image in the order of names;
                                              which class an id stands for is in meta.mat of the same development kit
    LOC_val_solution.csv                      Kaggle's file: lines of an image's name and its class

looked for beside the images, in ILSVRC2012_devkit_t12/ and in ILSVRC2012_devkit_t12.tar.gz.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from classification.imagenet.lmdb import DamagedImage, Record
from engine.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH, META, KAGGLE_LABELS = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"


class Item(NamedTuple):
    """Where one image is: `size` bytes at `offset` of `path`, or (size -1) the whole file."""

    path: str
    label: int
    offset: int = 0
    size: int = -1
    name: str = ""  # in a tar file: the image's name there

    def read(self) -> bytes:
        """The image's bytes, untouched. Raises UserError where they cannot be read."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if self.size < 0:
                    return file.readall()
                content = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}: mend that, then run the same command to go on") from None
        if len(content) != self.size:
            raise UserError(f"{self.path} is truncated: {self.name} ends beyond its end; download it again")
        return content


class Source(NamedTuple):
    """A download: the class names in the order of the labels, and both splits' images in the order of the build."""

    kind: str  # folder or tar
    classes: list[str]
    train: list[Item]
    val: list[Item]


class LabelFiles(NamedTuple):
    """Where the labels of a flat val come from, if not from the places that this module's docstring lists."""

    root: Path
    val_labels: Path | None = None  # the ground truth, or Kaggle's file
    ids: Path | None = None  # a text file with the class of each official id: line k is id k


def find_source(root: Path, label_files: LabelFiles | None = None) -> Source:
    """List the images below `root`. UserError, in one line, where something is missing or does not fit together."""
    label_files = label_files or LabelFiles(root)
    if (root / "train").is_dir():
        classes, train = _list_classes(root / "train")
        val = _list_val_folder(root, classes, label_files)
        return Source("folder", classes, train, val)
    if (root / TRAIN_TAR).is_file():
        if not (root / VAL_TAR).is_file():
            raise UserError(f"{root} holds {TRAIN_TAR} but not {VAL_TAR}: put it there")
        classes, train = _list_train_tar(root / TRAIN_TAR)
        val = _list_tar(root / VAL_TAR)
        return Source("tar", classes, train, _label_by_name(val, classes, label_files))
    raise UserError(f"{root} holds neither a folder train/ nor {TRAIN_TAR}: give the folder that has one of them")


class FolderSplit:
    """One split of a folder tree, for reading as it is: `split[index]` is a Record. No checksums here.

    Paths and labels are arrays, which worker processes share; a list of a million strings each would copy.
    """

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
        """An image's place and class in words, for messages."""
        return f"{os.fsdecode(self._paths[index])} (class {self.classes[self._labels[index]]})"


def list_folder(root: Path) -> tuple[FolderSplit, FolderSplit]:
    """The images of train/<class>/* and val/<class>/* below `root`, for training without an LMDB."""
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        raise UserError(
            f"{root} holds neither an LMDB (train.lmdb, val.lmdb) nor a folder tree (train/<class>/*, val/<class>/*); "
            "see docs/data.md for how to get either"
        )
    found = find_source(root)
    return FolderSplit(found.train, found.classes), FolderSplit(found.val, found.classes)


def inputs_digest(items: Sequence[Item], root: Path) -> str:
    """sha256 of the list of images: labels and places, relative to `root`; equal lists make equal builds."""
    digest = sha256()
    for item in items:
        place = os.path.relpath(item.path, root)
        digest.update(f"{item.label}\t{place}\t{item.offset}\t{item.size}\t{item.name}\n".encode())
    return digest.hexdigest()


def _list_classes(split: Path) -> tuple[list[str], list[Item]]:
    """Every image of `split`/<class>/, to any depth, by class and then by path."""
    classes = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{split} holds no folders: it must hold one for each class")
    folders = [split / name for name in classes]
    with ThreadPoolExecutor(16) as pool:  # on a network disk most of the time is waiting
        listing = pool.map(_list_images, folders)
        found = list(tqdm(listing, f"listing {split.name}", len(folders), unit="class", disable=None))
    for folder, paths in zip(folders, found, strict=True):
        if not paths:
            raise UserError(f"{folder} holds no image (files ending in {' '.join(IMG_EXTENSIONS)})")
    return classes, [Item(path, label) for label, paths in enumerate(found) for path in paths]


def _list_images(folder: Path) -> list[str]:
    found = (os.path.join(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path for path in found if _is_image(path))


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _list_val_folder(root: Path, classes: list[str], label_files: LabelFiles) -> list[Item]:
    val = root / "val"
    if not val.is_dir():
        raise UserError(f"{val} is not there: put the validation images there (val/<class>/* or val/*)")
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in os.scandir(val)):
        names, items = _list_classes(val)
        if unknown := sorted(set(names) - set(classes)):
            raise UserError(f"{val} has the class '{unknown[0]}', which {root / 'train'} has not")
        return [item._replace(label=classes.index(names[item.label])) for item in items]
    items = [Item(path, label=-1) for path in _list_images(val)]
    return _label_by_name(items, classes, label_files)


def _list_train_tar(path: Path) -> tuple[list[str], list[Item]]:
    """The images of the tar files in a tar file, each named after its class."""
    with _open_tar(path) as archive:
        inner = {member.name: member for member in archive if member.isfile() and member.name.endswith(".tar")}
        names = sorted(inner)
        items = []
        for label, name in enumerate(tqdm(names, f"listing {path.name}", unit="class", disable=None)):
            start, file = inner[name].offset_data, archive.extractfile(inner[name])
            images = _list_tar(path, file, start, label)
            if not images:
                raise UserError(f"{path}: {name} holds no image; download it again")
            items += images
    if not names:
        raise UserError(f"{path} holds no tar files, one a class: it is not the official file")
    return [Path(name).stem for name in names], items


def _list_tar(path: Path, file: IO[bytes] | None = None, start: int = 0, label: int = -1) -> list[Item]:
    """The images of a tar file, or of one that lies inside it at `start`, by name."""
    with _open_tar(path, file) as archive:
        return sorted(
            (
                Item(str(path), label, start + member.offset_data, member.size, member.name)
                for member in archive
                if member.isfile() and _is_image(member.name)
            ),
            key=lambda item: item.name,
        )


@contextmanager
def _open_tar(path: Path, file: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:", fileobj=file) as archive:
            yield archive
    except tarfile.TarError as error:
        raise UserError(f"{path} is truncated, or not a plain tar file ({error}): download it again") from None


def _label_by_name(items: list[Item], classes: list[str], label_files: LabelFiles) -> list[Item]:
    """Give each of `items`, in the order of names, the class that the labels file says."""
    items = sorted(items, key=_name)
    labels = _read_val_labels(items, label_files)
    place = {name: label for label, name in enumerate(classes)}
    if unknown := sorted(set(labels) - place.keys()):
        raise UserError(f"the validation labels name the class '{unknown[0]}', which the training images have not")
    return [item._replace(label=place[name]) for item, name in zip(items, labels, strict=True)]


def _name(item: Item) -> str:
    return os.path.basename(item.name or item.path)


def _read_val_labels(items: list[Item], label_files: LabelFiles) -> list[str]:
    """The class name of each of `items`."""
    root, val_labels, ids = label_files
    if val_labels:
        lines = _read(val_labels).split("\n")
    else:
        found = _kit_file(root, GROUND_TRUTH) or _kit_file(root, KAGGLE_LABELS)
        if found is None:
            raise UserError(
                f"nothing below {root} tells the classes of the validation images, which are not in folders: put "
                f"{DEVKIT}.tar.gz (or {KAGGLE_LABELS}) beside them, or give --val-labels FILE"
            )
        lines = found.decode().split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    if not all(line.isdecimal() for line in lines):
        named = dict(re.split(r"[,\s]+", line)[:2] for line in lines if re.search(r"[,\s]", line))
        by_stem = {os.path.splitext(name)[0]: label for name, label in named.items()}
        if missing := [_name(item) for item in items if os.path.splitext(_name(item))[0] not in by_stem]:
            raise UserError(f"the validation labels do not name {missing[0]} ({len(missing)} images are not in them)")
        return [by_stem[os.path.splitext(_name(item))[0]] for item in items]
    if len(lines) != len(items):
        raise UserError(
            f"there are {len(lines)} validation labels for {len(items)} images: they do not belong together"
        )
    class_of = _read_ids(root, ids)
    if unknown := sorted({int(line) for line in lines} - class_of.keys()):
        raise UserError(f"the validation labels hold the id {unknown[0]}, which stands for no class")
    return [class_of[int(line)] for line in lines]


def _read_ids(root: Path, ids: Path | None) -> dict[int, str]:
    """The class name of each official id. They are not in sorted order: id 1 is n02119789."""
    if ids:
        return dict(enumerate(_read(ids).split(), start=1))
    meta = _kit_file(root, META)
    if meta is None:
        raise UserError(
            f"{GROUND_TRUTH} holds ids, and {META} of {DEVKIT}.tar.gz, which says what they stand for, is not below "
            f"{root}: put it there, or give --ids FILE, a text file with the class of each id, one a line"
        )
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"reading {META} needs scipy: pip install scipy (or give --ids FILE)") from None
    try:
        synsets = loadmat(BytesIO(meta), squeeze_me=True)["synsets"]
        return {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets.ravel() if int(one["num_children"]) == 0}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{META} below {root} is not the development kit's ({error!r}): download it again") from None


def _kit_file(root: Path, name: str) -> bytes | None:
    """The content of a file of the development kit: loose, unpacked or packed; None where it is nowhere."""
    for place in (root / name, root / DEVKIT / "data" / name):
        if place.is_file():
            return place.read_bytes()
    packed = root / f"{DEVKIT}.tar.gz"
    if not packed.is_file():
        return None
    try:
        with tarfile.open(packed, "r:gz") as archive:
            return archive.extractfile(f"{DEVKIT}/data/{name}").read()
    except KeyError:
        return None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{packed} is damaged ({error}): download it again") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
