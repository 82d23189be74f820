"""The data sets, read into memory by name.

    cifar10, cifar100   downloaded once; torchvision compares the MD5s
    folder              any tree of small images, train/<class>/* and test/<class>/*
    digits              scikit-learn's 8x8 digits as 32x32 RGB

`imagenet` is too large for that: see imagenet/data.py.
"""

import logging
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from classification import cifar
from classification.augment import Augmentation, ImageData, Images
from classification.config import IMAGENET_ALONE, DataConfig
from classification.held_out import held_out
from classification.image_files import (
    IMG_EXTENSIONS,
    DamagedImage,
    is_image,
    list_files,
    list_folders,
    open_rgb,
    printable,
)
from engine.errors import UserError
from engine.files import hold
from engine.machine import core_count

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

    from classification.imagenet.data import ImageNetData

log = logging.getLogger(__name__)

NATURAL_IMAGES = Augmentation(padding=4, flip=True)
DIGITS = Augmentation(padding=2, flip=False)  # at most half an original pixel; a mirrored digit is another


class Dataset(NamedTuple):
    """`mean` and `std` None: those of the training images."""

    train: Images
    test: Images
    classes: Sequence[str]
    augmentation: Augmentation
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None


def load_data(config: DataConfig, device: torch.device | str, seed: int) -> "ImageData | ImageNetData":
    """`seed` determines each epoch's order and augmentation. UserError for missing, corrupt or inconsistent data."""
    if config.name == "imagenet":
        from classification.imagenet.data import ImageNetData  # here, as the other sets do without its libraries

        given = {name: getattr(config, name) for name in ("mean", "std", "validation", *IMAGENET_ALONE)}
        chosen = {name: value for name, value in given.items() if value is not None}
        return ImageNetData(Path(config.root), device=device, seed=seed, **chosen)
    data = DATASETS[config.name](Path(config.root))
    train, valid = data.train, None
    if config.validation:
        held = held_out(train.labels, config.validation)
        train, valid = (Images(train.pixels[part], train.labels[part]) for part in (~held, held))
    return ImageData(
        train,
        data.test,
        data.classes,
        data.augmentation,
        valid=valid,
        device=device,
        seed=seed,
        mean=data.mean if config.mean is None else config.mean,
        std=data.std if config.std is None else config.std,
    )


def read_cifar10(root: Path) -> Dataset:
    """50,000 training and 10,000 test images of 32x32, normalised with the published constants."""
    return _read_cifar("cifar10", root, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


def read_cifar100(root: Path) -> Dataset:
    """Like CIFAR-10, normalised with the customary constants."""
    return _read_cifar("cifar100", root, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761))


def _read_cifar(name: str, root: Path, mean: Sequence[float], std: Sequence[float]) -> Dataset:
    """The files are pickles: torchvision opens none whose MD5 is not the original's."""
    cifar.provide(name, root)
    from torchvision.datasets import CIFAR10, CIFAR100  # here, as the import takes seconds

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    test = _unpacked_cifar(source, name, root)
    train = source(root, train=True)
    splits = (Images(torch.from_numpy(split.data), torch.tensor(split.targets)) for split in (train, test))
    return Dataset(*splits, test.classes, NATURAL_IMAGES, mean, std)


def _unpacked_cifar(source: "type[CIFAR10]", name: str, root: Path) -> "CIFAR10":
    """The test split, once all files are unpacked and whole."""
    try:
        return source(root, train=False)
    except (RuntimeError, OSError):  # missing, damaged or unreadable
        cifar.fetch(name, root)
    try:
        with hold(root, "unpacking", wait=True):
            return source(root, train=False, download=True)  # unpacks the archive, if nobody has meanwhile
    except (RuntimeError, OSError, tarfile.TarError) as error:
        raise cifar.not_complete(name, root, error) from error


def read_digits(root: Path) -> Dataset:
    """1,797 handwritten digits. Each fifth image of a class is a test image."""
    from sklearn.datasets import load_digits  # here, as the other sets do without scikit-learn

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey])
    pixels = torch.from_numpy(large)[..., None].expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(digits.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero()[4::5]] = True
    train, test = (Images(pixels[part], labels[part]) for part in (~is_test, is_test))
    return Dataset(train, test, [str(digit) for digit in range(10)], DIGITS)


def read_folder(root: Path) -> Dataset:
    """Images of one size under train/<class>/ and test/<class>/, to any depth, as 8-bit RGB.

    Hidden files are ignored; other files that are no images, with a warning.
    """
    train, test = (_list_images(root / split) for split in ("train", "test"))
    for one, other, name in ((train, test, "test"), (test, train, "train")):
        if missing := sorted(one.keys() - other.keys()):
            raise UserError(f"{root / name} lacks the class '{missing[0]}': train and test must have the same classes")
    images = _decode([path for files in (train, test) for name in sorted(files) for path in files[name]])
    classes = sorted(train)
    train_labels, test_labels = (
        torch.repeat_interleave(torch.tensor([len(files[name]) for name in classes])) for files in (train, test)
    )
    return Dataset(
        Images(images[: len(train_labels)], train_labels),
        Images(images[len(train_labels) :], test_labels),
        classes,
        NATURAL_IMAGES,
    )


def _list_images(split: Path) -> dict[str, list[str]]:
    """Each class's image files, sorted by path."""
    if not split.is_dir():
        raise UserError(f"{split} is not there: data.root must hold train/<class>/* and test/<class>/*")
    classes, others = {}, []
    for name in list_folders(split):
        found = sorted(list_files(split / name))
        classes[name] = [path for path in found if is_image(path)]
        others += [path for path in found if not is_image(path)]
        if not classes[name]:
            raise UserError(
                f"{split / name} holds no image: put some there (files ending in {' '.join(IMG_EXTENSIONS)})"
            )
    if not classes:
        raise UserError(f"{split} holds no folders: it must hold one for each class")
    if others:
        example = printable(min(others))
        log.warning("%s: %d files that are not images are ignored, such as %s", split, len(others), example)
    return classes


def _decode(paths: Sequence[str]) -> Tensor:
    """uint8 [N, H, W, 3]."""
    width, height = _open_rgb(paths[0]).size
    pixels = np.empty((len(paths), height, width, 3), dtype=np.uint8)

    def decode(part: range) -> int:
        for index in part:
            image = _open_rgb(paths[index])
            if image.size != (width, height):
                raise UserError(
                    f"{printable(paths[index])} is {image.width}x{image.height} but {printable(paths[0])} is "
                    f"{width}x{height}: all images must have one size"
                )
            pixels[index] = image
        return len(part)

    parts = [range(first, min(first + 256, len(paths))) for first in range(0, len(paths), 256)]
    # More threads would only wait for Python's lock.
    bar = tqdm(total=len(paths), desc="reading images", unit="image", disable=None)
    with bar, ThreadPoolExecutor(min(4, core_count())) as pool:
        for count in pool.map(decode, parts):
            bar.update(count)
    return torch.from_numpy(pixels)


def _open_rgb(path: str) -> Image.Image:
    try:
        return open_rgb(path)
    except DamagedImage as error:
        raise UserError(f"{printable(path)} {error}: replace or remove it") from error


DATASETS = {"cifar10": read_cifar10, "cifar100": read_cifar100, "folder": read_folder, "digits": read_digits}
