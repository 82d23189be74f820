"""A small set of labelled images, a writer for each layout in which people have ImageNet, and a killed build."""

import io
import os
import signal
import struct
import tarfile
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from imagenet_images import CLASSES, contents, encoded, picture
from PIL import Image
from scipy.io import savemat

from classification.imagenet import lmdb as imagenet_lmdb
from classification.imagenet.prepare import build

IDS = {1: CLASSES[2], 2: CLASSES[0], 3: CLASSES[1]}  # the development kits' numbers are not in sorted order either
ID_OF = {name: number for number, name in IDS.items()}


class Toy(NamedTuple):
    """Names, classes and contents."""

    train: list[tuple[str, str, bytes]]
    val: list[tuple[str, str, bytes]]


class Download(NamedTuple):
    """What a user has: the folder to name, the options for it, and the text files with the labels."""

    source: Path
    options: dict[str, Path] = {}
    texts: list[Path] = []


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel from [height, width, 1 or 3]. Pillow cannot write a coloured one."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def oddities() -> dict[str, bytes]:
    """The odd files among real ImageNet's JPEGs, and worse ones."""
    rgb = picture(1, 60, 50)
    deep = np.random.default_rng(0).integers(0, 65536, (40, 50, 3), dtype=np.uint16)
    return {
        "png": encoded(rgb, "PNG"),
        "cmyk": encoded(picture(2, 60, 50, "CMYK")),
        "progressive": encoded(rgb, progressive=True),
        "grey": encoded(picture(3, 60, 50, "L")),
        "16-bit grey": png_of_16_bits(deep[..., :1]),
        "16-bit colours": png_of_16_bits(deep),
        "bad exif": encoded(rgb, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff"),
        "trailing bytes": encoded(rgb) + b"\0\xff" * 40,
        "palette gif": encoded(rgb.convert("P"), "GIF"),
        "one pixel": encoded(Image.new("RGB", (1, 1))),
    }


def make_toy() -> Toy:
    train = [
        (f"{wnid}_{number}.JPEG", wnid, content)
        for label, wnid in enumerate(CLASSES)
        for number, content in enumerate(contents(5, seed=label) + list(oddities().values())[label::3], start=10)
    ]
    images = list(oddities().values()) + contents(4, seed=9)
    order = [CLASSES[at] for at in (2, 0, 0, 1, 2, 1, 0, 2, 1, 1, 0, 2, 0, 1)]
    pairs = enumerate(zip(order, images, strict=True), start=1)
    val = [(f"ILSVRC2012_val_{number:08}.JPEG", wnid, image) for number, (wnid, image) in pairs]
    return Toy(train, val)


def _write(path: Path, content: bytes | str, bom: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else b"\xef\xbb\xbf" * bom + content.encode())
    return path


def _class_folders(images: list[tuple[str, str, bytes]], folder: Path) -> None:
    for name, wnid, content in images:
        _write(folder / wnid / name, content)


def _flat(images: list[tuple[str, str, bytes]], folder: Path) -> None:
    for name, _, content in images:
        _write(folder / name, content)


def _tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _packed(folder: Path) -> list[tuple[str, bytes]]:
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()]


def _tars(toy: Toy, root: Path) -> None:
    inner = []
    for wnid in reversed(CLASSES):
        _tar(root / "inner.tar", [(name, content) for name, of, content in reversed(toy.train) if of == wnid])
        inner.append((f"{wnid}.tar", (root / "inner.tar").read_bytes()))
    (root / "inner.tar").unlink()
    _tar(root / "ILSVRC2012_img_train.tar", inner)
    _tar(root / "ILSVRC2012_img_val.tar", [(name, content) for name, _, content in toy.val])


def _kit(toy: Toy, data: Path, year: int, bom: bool) -> Path:
    """Write the relevant files of a development kit to its folder `data`. Returns the text file with the labels."""
    truth = "".join(f"{ID_OF[wnid]}\n" for _, wnid, _ in toy.val)
    if year > 2012:
        _write(data / "map_clsloc.txt", "".join(f"{wnid} {at} a_name\n" for at, wnid in IDS.items()), bom)
        return _write(data / f"ILSVRC{min(year, 2015)}_clsloc_validation_ground_truth.txt", truth, bom)
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("num_children", "f8")]
    inner_nodes = [(4, "n00001740", 2)]
    synsets = np.array([(at, wnid, 0) for at, wnid in IDS.items()] + inner_nodes, dtype=fields)
    text = _write(data / "ILSVRC2012_validation_ground_truth.txt", truth, bom)
    savemat(data / "meta.mat", {"synsets": synsets[:, None]})
    return text


def _kit_archive(toy: Toy, path: Path, inside: str, year: int, bom: bool) -> None:
    folder = path.parent / "kit"
    _kit(toy, folder / inside, year, bom)
    _tar(path, _packed(folder), "w:gz")
    for file in sorted(folder.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    folder.rmdir()


def _trees(toy: Toy, root: Path, val: str = "val") -> None:
    _class_folders(toy.train, root / "train")
    _flat(toy.val, root / val)


def class_folders(toy: Toy, root: Path, bom: bool) -> Download:
    _class_folders(toy.train, root / "train")
    _class_folders(toy.val, root / "validation")
    return Download(root)


def tars_and_kit_2012(toy: Toy, root: Path, bom: bool) -> Download:
    _tars(toy, root)
    _kit_archive(toy, root / "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12/data", 2012, bom)
    return Download(root)


def tars_and_kit_2017(toy: Toy, root: Path, bom: bool) -> Download:
    _tars(toy, root)
    _kit_archive(toy, root / "ILSVRC2017_devkit.tar.gz", "ILSVRC/devkit/data", 2017, bom)
    return Download(root)


def kit_2012_unpacked(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root)
    return Download(root, texts=[_kit(toy, root / "ILSVRC2012_devkit_t12" / "data", 2012, bom)])


def kit_2012_loose(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root)
    return Download(root, texts=[_kit(toy, root, 2012, bom)])


def kit_2014_packed(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root)
    _kit_archive(toy, root / "ILSVRC2014_devkit.tgz", "ILSVRC2014_devkit/data", 2014, bom)
    return Download(root)


def kit_2015_in_place(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root / "ILSVRC2015" / "Data" / "CLS-LOC")
    return Download(root, texts=[_kit(toy, root / "ILSVRC2015" / "devkit" / "data", 2015, bom)])


def kit_2017_unpacked(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root)
    return Download(root, texts=[_kit(toy, root / "ILSVRC2017_devkit" / "ILSVRC" / "devkit" / "data", 2017, bom)])


def _kaggle(toy: Toy, root: Path, bom: bool) -> Path:
    _trees(toy, root / "ILSVRC" / "Data" / "CLS-LOC")
    numbered = "".join(f"{name[:-5]} {number}\n" for number, (name, *_) in enumerate(toy.val, 1))
    _write(root / "ILSVRC" / "ImageSets" / "CLS-LOC" / "val.txt", numbered)
    lines = [
        f"{name[:-5]},{wnid} 1 2 30 40 " + f"{wnid} 5 6 7 8 " * (at % 2) for at, (name, wnid, _) in enumerate(toy.val)
    ]
    text = "ImageId,PredictionString\n" + "".join(f"{line}\n" for line in reversed(lines))  # the real file has no order
    return _write(root / "LOC_val_solution.csv", text, bom)


def kaggle(toy: Toy, root: Path, bom: bool) -> Download:
    return Download(root, texts=[_kaggle(toy, root, bom)])


def kaggle_from_ilsvrc(toy: Toy, root: Path, bom: bool) -> Download:
    text = _kaggle(toy, root, bom)
    return Download(root / "ILSVRC", texts=[text])


def kaggle_from_cls_loc(toy: Toy, root: Path, bom: bool) -> Download:
    text = _kaggle(toy, root, bom)
    return Download(root / "ILSVRC" / "Data" / "CLS-LOC", texts=[text])


def caffe(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root)
    text = "".join(f"{name} {CLASSES.index(wnid)}\n" for name, wnid, _ in toy.val)
    return Download(root, texts=[_write(root / "val.txt", text, bom)])


def paddle(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root)
    text = "".join(f"val/{name} {CLASSES.index(wnid)}\n" for name, wnid, _ in toy.val)
    return Download(root, texts=[_write(root / "val_list.txt", text, bom)])


def paddle_with_wnids(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root)
    text = "".join(f"val/{name} {wnid}\r\n" for name, wnid, _ in toy.val)
    return Download(root, texts=[_write(root / "val_list.txt", text, bom)])


def tensorflow(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root, "validation")
    text = "".join(f"{wnid}\n" for _, wnid, _ in toy.val)
    return Download(root, texts=[_write(root / "imagenet_2012_validation_synset_labels.txt", text, bom)])


def ground_truth_and_ids_by_option(toy: Toy, root: Path, bom: bool) -> Download:
    _trees(toy, root / "images")
    truth = _write(root / "truth.txt", "".join(f"{ID_OF[wnid]}\n" for _, wnid, _ in toy.val), bom)
    ids = _write(root / "ids.txt", "\n".join(IDS.values()), bom)
    return Download(root / "images", {"val_labels": truth, "ids": ids}, [truth])


def caffe_by_option(toy: Toy, root: Path, bom: bool) -> Download:
    _tars(toy, root / "tars")
    text = _write(root / "labels", "".join(f"{name} {CLASSES.index(wnid)}\n" for name, wnid, _ in toy.val), bom)
    return Download(root / "tars", {"val_labels": text}, [text])


def hugging_face_unpacked(toy: Toy, root: Path, bom: bool) -> Download:
    for split, images in (("train", toy.train), ("val", toy.val)):
        _flat([(_hugging_face_name(name, wnid), wnid, content) for name, wnid, content in images], root / split)
    return Download(root)


def hugging_face_archives(toy: Toy, root: Path, bom: bool) -> Download:
    shuffled = np.random.default_rng(1).permutation(len(toy.train))
    train = [(_hugging_face_name(*toy.train[at][:2]), toy.train[at][2]) for at in shuffled]
    for number in range(5):
        _tar(root / "data" / f"train_images_{number}.tar.gz", train[number::5], "w:gz")
    val = [(_hugging_face_name(name, wnid), content) for name, wnid, content in toy.val]
    _tar(root / "data" / "val_images.tar.gz", val, "w:gz")
    return Download(root)


def hugging_face_parquet(toy: Toy, root: Path, bom: bool) -> Download:
    import pyarrow
    from pyarrow import parquet

    shuffled = np.random.default_rng(2).permutation(len(toy.train))
    for split, images, files in (("train", [toy.train[at] for at in shuffled], 4), ("validation", toy.val, 2)):
        for number in range(files):
            rows = [
                {
                    "image": {"bytes": content, "path": _hugging_face_name(name, wnid)},
                    "label": CLASSES.index(wnid),
                }
                for name, wnid, content in images[number::files]
            ]
            path = root / "data" / f"{split}-{number:05}-of-{files:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return Download(root)


def _hugging_face_name(name: str, wnid: str) -> str:
    return f"{name[:-5]}_{wnid}.JPEG"


def build_until(moment: int, source: Path, out: Path) -> int:
    """Build in a process that kills itself at step number `moment`. Returns its exit status.

    The steps are: each value put into a transaction, and the moments before and after each transaction and each move of
    a file to its place.
    """
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = iter(range(moment))

    def step() -> None:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    class Counted(list):
        def __iter__(self):
            for one in list.__iter__(self):
                step()
                yield one

    def counted(function):
        def call(*arguments):
            step()
            function(*(Counted(one) if isinstance(one, list) else one for one in arguments))
            step()

        return call

    try:
        imagenet_lmdb.SplitWriter._write = counted(imagenet_lmdb.SplitWriter._write)
        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        build(source, out)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


Writer = Callable[[Toy, Path, bool], Download]
IN_ORDER: list[Writer] = [  # these make the very same LMDB
    class_folders,
    tars_and_kit_2012,
    tars_and_kit_2017,
    kit_2012_unpacked,
    kit_2012_loose,
    kit_2014_packed,
    kit_2015_in_place,
    kit_2017_unpacked,
    kaggle,
    kaggle_from_ilsvrc,
    kaggle_from_cls_loc,
    caffe,
    paddle,
    paddle_with_wnids,
    tensorflow,
    ground_truth_and_ids_by_option,
    caffe_by_option,
    hugging_face_unpacked,
]
STREAMED: list[Writer] = [hugging_face_archives, hugging_face_parquet]  # these hold the same images in another order
