"""Turns an ImageNet download into the files that training reads, and checks both.

    python -m classification.prepare_imagenet build SOURCE OUT          make OUT/train.lmdb, val.lmdb and manifest.json
    python -m classification.prepare_imagenet verify OUT                compare all of it with its checksums
    python -m classification.prepare_imagenet verify SOURCE --archives  compare the official tar files with theirs

SOURCE holds a form of ImageNet that raw.py lists, or any other images in one folder per class. After an interruption
the same command continues. docs/data.md says how to get ImageNet and how long this takes.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache, partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from classification.image_files import DamagedImage, open_rgb
from classification.imagenet.items import Source
from classification.imagenet.labels import KIT_2012, LabelFiles
from classification.imagenet.lmdb import (
    CHUNK,
    FORMAT,
    SPLITS,
    LmdbSplit,
    Record,
    SplitWriter,
    finished,
    open_splits,
)
from classification.imagenet.raw import IMAGENET, TRAIN_TAR, VAL_TAR, find_source, inputs_digest
from engine.download import matches
from engine.errors import UserError
from engine.files import hold, write_atomically
from engine.manifest import MANIFEST

MD5 = {  # as in torchvision/datasets/imagenet.py
    TRAIN_TAR: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_TAR: "29b22e2961454d5413ddabcf34fc5622",
    KIT_2012: "fa75699e90414af021442c21a62c3abf",
}


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes may be invalid text
    if options.command == "build":
        build(options.source, options.out, LabelFiles(options.val_labels, options.ids))
        return 0
    bad = verify_archives(options.out) if options.archives else verify(options.out, options.decode)
    for line in bad:
        print(line)
    print(f"{options.out}: {f'{len(bad)} damaged' if bad else 'whole'}")
    return 1 if bad else 0


def build(source: Path, out: Path, label_files: LabelFiles | None = None) -> None:
    """Write both splits to `out`, or finish an earlier build there.

    Raises UserError if something is missing, `out` is in use or holds other images, or the disk is full.
    """
    found = find_source(source, label_files)
    counts = {"train": len(found.train), "val": len(found.val), "classes": len(found.classes)}
    logging.info("%s: %s", source, _in_words(counts))
    if counts != IMAGENET:
        logging.info("note: ImageNet's 2012 set has %s; this one is built all the same", _in_words(IMAGENET))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}): choose another folder") from None
    with hold(out, "building"):
        inputs = {name: inputs_digest(getattr(found, name), source) for name in SPLITS}
        manifest = finished(out)
        if manifest and manifest["inputs"] != inputs:
            raise UserError(f"{out} already holds other images: choose another folder, or delete it")
        if manifest:
            logging.info("%s is complete: nothing to do", out)
            return
        splits = {}
        for name in SPLITS:
            _build_split(found, name, out / f"{name}.lmdb", inputs[name])
            split = LmdbSplit(out / f"{name}.lmdb", found.classes)
            size, digest = split.path.stat().st_size, split.content_digest()
            splits[name] = {"images": len(split), "bytes": size, "digest": digest}
        manifest = {"source": found.kind, "inputs": inputs, "splits": splits, "classes": found.classes}
        write_atomically(out / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1) + "\n")
    logging.info("%s is complete", out)


def _build_split(source: Source, name: str, path: Path, inputs: str) -> None:
    items = getattr(source, name)
    writer = SplitWriter(path, inputs, source.classes)
    with tqdm(total=len(items), initial=writer.images, desc=path.name, unit="image", disable=None) as bar:
        for chunk in _chunks(source.read(items[writer.images :])):
            writer.append(chunk)
            bar.update(len(chunk))
    if writer.images != len(items):
        raise UserError(f"{path} got {writer.images:,} of {len(items):,} images: the source has changed meanwhile")


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    """The next CHUNK records are read while these are written."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(lambda: list(islice(records, CHUNK)))
        while chunk := ahead.result():
            ahead = pool.submit(lambda: list(islice(records, CHUNK)))
            yield chunk


def verify(out: Path, decode: bool = False) -> list[str]:
    """One line per damaged image. With `decode`, decode every image too.

    Raises UserError if the build is unfinished, truncated, or mixed with another.
    """
    manifest = finished(out)
    bad = []
    for name, split in zip(SPLITS, open_splits(out), strict=True):
        if split.content_digest() != manifest["splits"][name]["digest"]:
            bad.append(f"{split.path}: the checksums are not those that {MANIFEST} was written for")
        with ProcessPoolExecutor() as pool:
            check = partial(_check, split.path, split.classes, decode)
            results = pool.map(check, range(len(split)), chunksize=CHUNK)
            bar = tqdm(results, split.path.name, len(split), unit="image", disable=None)
            bad += [problem for problem in bar if problem]
    return bad


def verify_archives(source: Path) -> list[str]:
    """One line per official file that differs from its MD5. Raises UserError if `source` holds none."""
    paths = [source / name for name in MD5 if (source / name).is_file()]
    if not paths:
        raise UserError(f"{source} holds none of {', '.join(MD5)}: give the folder that has them")
    bad = []
    for path in paths:
        try:
            is_published = matches(path, f"md5:{MD5[path.name]}")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from None
        if is_published:
            logging.info("%s is the published file", path)
        else:
            bad.append(f"{path}: its MD5 is not the published file's, {MD5[path.name]}: download it again")
    return bad


_opened = cache(LmdbSplit)  # once a process, as this reads all checksums


def _check(path: Path, classes: tuple[str, ...], decode: bool, index: int) -> str | None:
    """What is wrong with an image, or None."""
    split = _opened(path, classes)
    try:
        record = split[index]
        if not 0 <= record.label < len(split.classes):
            raise DamagedImage(f"has label {record.label} in a set of {len(split.classes)} classes")
        if decode:
            open_rgb(record.image)
    except DamagedImage as error:
        return f"{split.name_of(index)} {error}"
    return None


def _in_words(counts: dict[str, int]) -> str:
    return f"{counts['train']:,} training and {counts['val']:,} validation images in {counts['classes']:,} classes"


def _parse(arguments: list[str]) -> argparse.Namespace:
    program = "python -m classification.prepare_imagenet"
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="make the LMDB files from a download, whichever way it is laid out")
    command.add_argument("source", type=Path, help="folder that holds the download")
    command.add_argument("out", type=Path, help="folder to write to")
    of_val = "labels of a val without class folders, if they are not where they are looked for; of any kind"
    command.add_argument("--val-labels", type=Path, metavar="FILE", help=of_val)
    of_id = "map_clsloc.txt, or the class of each official id, one a line"
    command.add_argument("--ids", type=Path, metavar="FILE", help=of_id)
    command = commands.add_parser("verify", help="compare a finished build with its checksums")
    command.add_argument("out", type=Path, metavar="FOLDER", help="the build; with --archives, the download")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--decode", action="store_true", help="also decode every image")
    how.add_argument("--archives", action="store_true", help="compare the official tar files of a download instead")
    return parser.parse_args(arguments)
