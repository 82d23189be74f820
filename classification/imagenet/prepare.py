"""ImageNet from the download to what training reads, and a check of it.

    python -m classification.prepare_imagenet build SOURCE OUT      make OUT/train.lmdb, OUT/val.lmdb, OUT/manifest.json
    python -m classification.prepare_imagenet verify OUT            compare all of it with its checksums

SOURCE is a folder tree or the official tar files, which are not unpacked (classification/imagenet/raw.py says which
files); any other set of images in folders by class will do. A build that was interrupted, by whatever, goes on where it
was when the same command is run again. docs/data.md says how to get ImageNet, and how long this takes.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from classification.imagenet.decode import open_rgb
from classification.imagenet.lmdb import (
    CHUNK,
    MANIFEST,
    SPLITS,
    DamagedImage,
    LmdbSplit,
    Record,
    SplitWriter,
    open_splits,
    read_manifest,
    write_manifest,
)
from classification.imagenet.raw import Item, LabelFiles, find_source, inputs_digest
from engine.errors import UserError
from engine.files import hold

IMAGENET = {"train": 1_281_167, "val": 50_000, "classes": 1_000}
READERS = 16  # threads: most of their time is waiting for the disk


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if options.command == "build":
        build(options.source, options.out, LabelFiles(options.source, options.val_labels, options.ids))
        return 0
    bad = verify(options.out, options.decode)
    for line in bad:
        print(line)
    print(f"{options.out}: {f'{len(bad)} damaged' if bad else 'whole'}")
    return 1 if bad else 0


def build(source: Path, out: Path, label_files: LabelFiles | None = None) -> None:
    """Write both splits of `source` to `out`, or finish what an earlier build left there.

    Raises UserError where something is missing, where `out` is in use or holds other images, and on a full disk.
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
        finished = read_manifest(out)
        if finished and finished["inputs"] != inputs:
            raise UserError(f"{out} already holds other images: choose another folder, or delete it")
        if finished:
            logging.info("%s is complete: nothing to do", out)
            return
        splits = {}
        for name in SPLITS:
            items = getattr(found, name)
            _build_split(items, out / f"{name}.lmdb", inputs[name], found.classes)
            split = LmdbSplit(out / f"{name}.lmdb", found.classes)
            splits[name] = {
                "images": len(split),
                "bytes": split.path.stat().st_size,
                "digest": split.content_digest(),
            }
            split.close()
        write_manifest(out, {"source": found.kind, "inputs": inputs, "splits": splits, "classes": found.classes})
    logging.info("%s is complete", out)


def _build_split(items: Sequence[Item], path: Path, inputs: str, classes: Sequence[str]) -> None:
    """Append what `path` lacks of `items`, reading the next chunk while one is written."""
    writer = SplitWriter(path, inputs, classes)
    left = items[writer.images :]
    try:
        with (
            ThreadPoolExecutor(READERS) as pool,
            tqdm(total=len(items), initial=writer.images, desc=path.name, unit="image", disable=None) as bar,
        ):
            images = (left[first : first + CHUNK] for first in range(0, len(left), CHUNK))
            ahead = _read(pool, next(images, []))
            while chunk := list(ahead):
                ahead = _read(pool, next(images, []))
                writer.append(chunk)
                bar.update(len(chunk))
    finally:
        writer.close()


def _read(pool: ThreadPoolExecutor, items: Sequence[Item]) -> Iterator[Record]:
    """Records of `items`, in their order; reading starts at once."""
    return pool.map(lambda item: Record(item.label, item.read()), items)


def verify(out: Path, decode: bool = False) -> list[str]:
    """What is wrong with the build in `out`: a line for each damaged image, or none; with `decode`, decode them all.

    Raises UserError where there is no finished build, or its files are truncated or do not belong together.
    """
    manifest = read_manifest(out)
    bad = []
    for name, split in zip(SPLITS, open_splits(out), strict=True):
        if split.content_digest() != manifest["splits"][name]["digest"]:
            bad.append(f"{split.path}: the checksums are not those that {MANIFEST} was written for")
        split.close()
        with ProcessPoolExecutor() as pool:
            results = pool.map(partial(_check, split, decode), range(len(split)), chunksize=CHUNK)
            bar = tqdm(results, split.path.name, len(split), unit="image", disable=None)
            bad += [problem for problem in bar if problem]
    return bad


def _check(split: LmdbSplit, decode: bool, index: int) -> str | None:
    """A line that says what is wrong with an image, or None."""
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
    parser = argparse.ArgumentParser(
        prog="python -m classification.prepare_imagenet", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="make the LMDB files from a folder tree or the official tar files")
    command.add_argument("source", type=Path, help="folder with train/ and val/, or with the official tar files")
    command.add_argument("out", type=Path, help="folder to write to")
    command.add_argument("--val-labels", type=Path, metavar="FILE", help="labels of a val without class folders")
    command.add_argument("--ids", type=Path, metavar="FILE", help="the class of each official id, one a line")
    command = commands.add_parser("verify", help="compare a finished build with its checksums")
    command.add_argument("out", type=Path, help="folder that was built")
    command.add_argument("--decode", action="store_true", help="also decode every image")
    return parser.parse_args(arguments)
