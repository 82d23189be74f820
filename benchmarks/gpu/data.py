"""Images to train on: noise, and scikit-learn's digits, packed or its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from classification.augment import Images
from classification.data import DATASETS, DIGITS, NATURAL_IMAGES, Dataset, read_digits

PACKED = "digits.npz"


def pack_digits(folder: Path) -> None:
    """Write one small file, as scikit-learn and scipy are large."""
    digits = read_digits(folder)
    parts = {"train": digits.train, "test": digits.test}
    arrays = {f"{split}_{name}": x.numpy() for split, part in parts.items() for name, x in part._asdict().items()}
    np.savez_compressed(folder / PACKED, **arrays)


def packed_digits(folder: Path) -> Dataset:
    """`read_digits` from what `pack_digits` wrote."""
    with np.load(folder / PACKED, allow_pickle=False) as file:
        parts = {key: torch.from_numpy(file[key]) for key in file.files}
    train, test = (Images(parts[f"{split}_pixels"], parts[f"{split}_labels"]) for split in ("train", "test"))
    return Dataset(train, test, [str(digit) for digit in range(10)], DIGITS)


def noise(train: int, test: int) -> Dataset:
    draw = torch.Generator().manual_seed(0)

    def images(count: int) -> Images:
        pixels: Tensor = torch.randint(0, 256, (count, 32, 32, 3), generator=draw, dtype=torch.uint8)
        return Images(pixels, torch.arange(count) % 10)

    return Dataset(images(train), images(test), [str(number) for number in range(10)], NATURAL_IMAGES)


@contextmanager
def images_in_memory(packages: Path, train: int, test: int) -> Iterator[None]:
    """Inside, `data.name=folder` is noise (to write 50,000 files takes a minute), and `digits` is packed."""
    readers = {"folder": lambda root: noise(train, test)}
    if (packages / PACKED).exists():
        readers["digits"] = lambda root: packed_digits(packages)
    with patch.dict(DATASETS, readers):
        yield
