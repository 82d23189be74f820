"""The classes of validation images without class folders, from any label file in public use.

    file                                            a line                     of
    LOC_val_solution.csv                            NAME,wnid x y x y ...      Kaggle's object localization challenge
    val.txt                                         NAME index                 Caffe (data/ilsvrc12)
    val_list.txt                                    val/NAME index             PaddleClas (its guide to data sets)
    imagenet_2012_validation_synset_labels.txt      wnid                       TensorFlow (research/slim/datasets)
    ILSVRC2012_validation_ground_truth.txt          id                         development kit of 2012
    ILSVRC2014_clsloc_validation_ground_truth.txt   id                         kit of 2014
    ILSVRC2015_clsloc_validation_ground_truth.txt   id                         kits of 2015 to 2017
    none: the images are named NAME_wnid.JPEG                                  Hugging Face's imagenet-1k

A *wnid* (n01440764) is a class's name. An *index* is its place among the sorted wnids, from 0. An *id* is its place in
the development kit, from 1, by meta.mat (2012) or map_clsloc.txt (2014 to 2017; lines of wnid, id, name). All kits have
the same ids: 2015's readme says that its synsets are those of 2012 and 2013. A file of wnids or ids alone follows the
order of the images' names.

A file's content, not its name, decides how it is read. Nobody would notice a wrong label, so every file must cover
exactly these images, and all must agree.
"""

import os
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from classification.image_files import IMG_EXTENSIONS, printable
from engine.errors import UserError

LISTS = ("LOC_val_solution.csv", "val_list.txt", "val.txt", "imagenet_2012_validation_synset_labels.txt")
KAGGLE_LIST, KAGGLE_HEADER = LISTS[0], "ImageId,PredictionString"
KIT_2012 = "ILSVRC2012_devkit_t12.tar.gz"
META, MAP = "meta.mat", "map_clsloc.txt"
GROUND_TRUTH = re.compile(r"ILSVRC201\d_(clsloc_)?validation_ground_truth\.txt")
# Public scripts unpack the kits to all of these.
KIT_FOLDERS = ("data", "devkit/data", "ILSVRC*/data", "ILSVRC*/devkit/data", "ILSVRC*_devkit*/ILSVRC*/devkit/data")
KIT_ARCHIVES = ("ILSVRC201*_devkit*.tar.gz", "ILSVRC201*_devkit*.tgz")
FIRST_ID = "n02119789"  # has id 1 in every kit
# Prints the leaves of meta.mat, in a process of its own: scipy crashes on damaged files.
SHOW_META = """
import io, sys
from scipy.io import loadmat
for one in loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"].ravel():
    if int(one["num_children"]) == 0:
        print(one["WNID"], int(one["ILSVRC2012_ID"]))
"""
WNID_AT_END = re.compile(r"_(n\d{8})$")
OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")


class LabelFiles(NamedTuple):
    """Files that the user gives, instead of those found."""

    val_labels: Path | None = None  # any of the files above
    ids: Path | None = None  # map_clsloc.txt, or a file with the class of id k in line k


class _Found(NamedTuple):
    place: str  # its full path
    content: bytes
    kit: dict[str, bytes]  # its kit's files by full path


def stem(name: str) -> str:
    """A name without folder, ending, and the `_wnid` that Hugging Face appends."""
    base = name.rpartition("/")[2]
    head, dot, ending = base.rpartition(".")
    return WNID_AT_END.sub("", head if dot + ending.lower() in IMG_EXTENSIONS else base)


def wnid_at_end(name: str) -> str | None:
    """The class in a name like ILSVRC2012_val_00000001_n01751748.JPEG, or None."""
    found = WNID_AT_END.search(os.path.splitext(name)[0])
    return found and found[1]


def label_by_name(
    names: Sequence[str], classes: Sequence[str], places: Sequence[Path], given: LabelFiles, what: str
) -> list[int]:
    """The label of each image of `names`, which are sorted by `stem`. Messages call them `what`.

    `places` may hold label files. Raises UserError if none is found, or one does not fit.
    """
    if not names:
        raise UserError(f"{what} holds no image")
    if twice := next((name for name, following in pairwise(names) if stem(name) == stem(following)), None):
        raise UserError(f"{what} holds two images of the name {printable(stem(twice))}")
    found = [_Found(str(given.val_labels), _read(given.val_labels), {})] if given.val_labels else _find(places)
    answers = {one.place: _read_labels(one, names, classes, places, given) for one in found}
    if not given.val_labels and all(map(wnid_at_end, names)):
        place = f"{what}: the ends of the names"
        answers[place] = _places_of([wnid_at_end(name) for name in names], classes, place)
    if not answers:
        raise UserError(
            f"nothing tells the classes of the {len(names):,} images of {what}, which are in no class folders: put the "
            f"development kit at {places[0] / KIT_2012}, or Kaggle's file at {places[0] / KAGGLE_LIST}, or build "
            "the LMDB and give it the labels with --val-labels FILE (docs/data.md names every kind)"
        )
    (place, labels), *others = answers.items()
    for other, theirs in others:
        if theirs != labels:
            at = next(at for at, (one, two) in enumerate(zip(labels, theirs, strict=True)) if one != two)
            raise UserError(
                f"{place} and {other} contradict each other: {printable(names[at])} is {classes[labels[at]]} or "
                f"{classes[theirs[at]]}; remove the one that is wrong, or choose with --val-labels FILE"
            )
    return labels


def _find(places: Sequence[Path]) -> list[_Found]:
    """Every label file in `places` and in kits there, packed or not."""
    paths = [folder / name for folder in dict.fromkeys(places) for name in LISTS]
    lists = [_Found(str(path), _read(path), {}) for path in paths if path.is_file()]
    kits = list(_kits(places))
    truths = {place: _Found(place, kit[place], kit) for kit in kits for place in kit if GROUND_TRUTH.search(place)}
    return lists + list(truths.values())


def _kits(places: Sequence[Path]) -> Iterator[dict[str, bytes]]:
    """The files of each kit in `places`: path and content."""
    for place in places:
        unpacked = [folder for pattern in KIT_FOLDERS for folder in sorted(place.glob(pattern))]
        for folder in dict.fromkeys([place, *unpacked]):
            try:
                files = [folder / name for name in sorted(os.listdir(folder)) if _is_of_kit(name)]
            except OSError:
                continue  # no folder, or not readable
            yield {str(path): _read(path) for path in files}
        for path in sorted(path for pattern in KIT_ARCHIVES for path in place.glob(pattern)):
            yield _unpacked(path)


def _unpacked(path: Path) -> dict[str, bytes]:
    try:
        with tarfile.open(path, "r:gz") as archive:
            members = [one for one in archive if one.isfile() and _is_of_kit(os.path.basename(one.name))]
            return {f"{path}/{one.name}": archive.extractfile(one).read() for one in members}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from None


def _is_of_kit(name: str) -> bool:
    return name in (META, MAP) or bool(GROUND_TRUTH.fullmatch(name))


def _read_labels(
    found: _Found, names: Sequence[str], classes: Sequence[str], places: Sequence[Path], given: LabelFiles
) -> list[int]:
    place = found.place
    lines = _lines(place, found.content)
    if not lines:
        raise UserError(f"{place} is empty")
    if any(re.search(r"[,\s]", line) for line in lines):
        values = _by_name(place, lines, names)
        if all(value.isdecimal() for value in values):
            return _indices(place, [int(value) for value in values], len(classes))
        return _places_of(values, classes, place)
    _require_order(place, len(lines), names)
    if not all(line.isdecimal() for line in lines):
        return _places_of(lines, classes, place)
    class_of = _class_of_id(found, places, given)
    if unknown := sorted({int(line) for line in lines} - class_of.keys()):
        raise UserError(f"{place} holds the id {unknown[0]}, which stands for no class")
    return _places_of([class_of[int(line)] for line in lines], classes, place)


def _by_name(place: str, lines: Sequence[str], names: Sequence[str]) -> list[str]:
    """What a file of names and labels says about each of `names`."""
    said = {}
    for number, line in enumerate(lines, start=1):
        if number == 1 and line.startswith(KAGGLE_HEADER):
            continue
        name, label = _name_and_label(place, number, line)
        if name in said:
            raise UserError(f"{place} names {printable(name)} twice")
        said[name] = label
    if missing := [name for name in names if stem(name) not in said]:
        raise UserError(f"{place} does not name {printable(missing[0])} ({len(missing):,} images are not in it)")
    if more := sorted(said.keys() - set(map(stem, names))):
        raise UserError(f"{place} names {printable(more[0])} ({len(more):,} of its images are not there)")
    # ILSVRC's own ImageSets/CLS-LOC/val.txt numbers the images.
    if len(said) > 1 and list(said.values()) == [str(number) for number in range(1, len(said) + 1)]:
        raise UserError(f"{place} numbers the images from 1 to {len(said):,}: these are no labels")
    return [said[stem(name)] for name in names]


def _name_and_label(place: str, number: int, line: str) -> tuple[str, str]:
    """Stem and label. After a comma, Kaggle's lines give a class and four numbers for each object."""
    name, comma, objects = line.partition(",")
    fields = objects.split()
    if not comma:
        name, *fields = line.rsplit(None, 1)
    if not fields or not name.strip():
        raise UserError(f"{place}, line {number}: '{line[:80]}' is no name with a label")
    if len(set(fields[::5])) > 1:
        raise UserError(f"{place}, line {number}: an image of two classes, {fields[0]} and others")
    return stem(name.strip()), fields[0]


def _indices(place: str, indices: list[int], count: int) -> list[int]:
    """`indices`. Raises UserError unless they cover every class."""
    if wrong := sorted(set(indices) ^ set(range(count))):
        how = "is there" if wrong[0] in indices else "is missing"
        raise UserError(
            f"{place} is no list of labels from 0 to {count - 1}, the places of the {count:,} classes in sorted order: "
            f"{wrong[0]} {how}"
        )
    return indices


def _places_of(wnids: Sequence[str | None], classes: Sequence[str], place: str) -> list[int]:
    label = {name: at for at, name in enumerate(classes)}
    if unknown := sorted(set(wnids) - label.keys()):
        raise UserError(f"{place} names the class '{unknown[0]}', which the training images have not")
    return [label[wnid] for wnid in wnids]


def _require_order(place: str, count: int, names: Sequence[str]) -> None:
    """Raise UserError if it is uncertain which label belongs to which image."""
    if count != len(names):
        raise UserError(f"{place} has {count:,} labels for {len(names):,} images: they do not belong together")
    if list(names) != sorted(names, key=_natural):
        raise UserError(
            f"{place} goes by the order of the images, and their names have two: use a file with names and labels"
        )
    official = [OFFICIAL_NAME.fullmatch(stem(name)) for name in names]
    if any(official) and [one and int(one[1]) for one in official] != list(range(1, count + 1)):
        raise UserError(
            f"{place} goes by the order of the images, and they are not numbered from 1 to {count:,}: some are missing"
        )


def _natural(name: str) -> list[str]:
    """A sort key that puts 2.JPEG before 10.JPEG."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", stem(name))]


def _class_of_id(found: _Found, places: Sequence[Path], given: LabelFiles) -> dict[int, str]:
    """The class of each id, by --ids, else by the file's kit, else by any kit, as all are equal."""
    if given.ids:
        return _checked(str(given.ids), _read_ids(str(given.ids), _read(given.ids)))
    beside = _kits([given.val_labels.parent]) if given.val_labels else ()
    for kit in (found.kit, *beside, *_kits(places)):
        for name, read in ((MAP, _read_ids), (META, _read_meta)):
            if place := next((place for place in kit if os.path.basename(place) == name), None):
                return _checked(place, read(place, kit[place]))
    raise UserError(
        f"{found.place} holds ids, and neither {MAP} nor {META}, which say what they stand for, is there: put the "
        f"whole kit at {places[0] / KIT_2012}, or build an LMDB with --ids FILE (line k: the class of id k)"
    )


def _read_ids(place: str, content: bytes) -> dict[int, str]:
    """The class of each id, from lines of `wnid id name` or `wnid`."""
    lines = [line.split() for line in _lines(place, content)]
    if all(len(fields) == 1 for fields in lines):
        return {number: fields[0] for number, fields in enumerate(lines, start=1)}
    bad = next((fields for fields in lines if len(fields) < 2 or not fields[1].isdecimal()), None)
    if bad:
        raise UserError(f"{place}: '{' '.join(bad)}' is neither a class alone nor a class with its id")
    ids = {int(fields[1]): fields[0] for fields in lines}
    if len(ids) != len(lines):
        raise UserError(f"{place} gives the same id to two classes")
    return ids


def _read_meta(place: str, content: bytes) -> dict[int, str]:
    done = subprocess.run([sys.executable, "-c", SHOW_META], input=content, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        if said and said[-1].startswith("ModuleNotFoundError"):
            raise UserError(f"reading {place} needs scipy: {sys.executable} -m pip install scipy (or give --ids FILE)")
        how = said[-1] if said else f"scipy ended with status {done.returncode}"
        raise UserError(f"{place} is damaged, or not the development kit's ({how}): download it again")
    return _read_ids(place, done.stdout)


def _checked(place: str, ids: dict[int, str]) -> dict[int, str]:
    if len(set(ids.values())) != len(ids):
        raise UserError(f"{place} gives two ids to the same class")
    if FIRST_ID in ids.values() and ids.get(1) != FIRST_ID:
        raise UserError(f"{place} is in another order than the development kits' ids: id 1 is {FIRST_ID}")
    return ids


def _lines(place: str, content: bytes) -> list[str]:
    """Nonempty lines, without a byte order mark."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{place} is not UTF-8 text") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
