"""Image files of any kind: where they lie below a folder, and their pixels as RGB of 8 bits a channel."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from engine.errors import UserError


def list_files(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Every file below `folder`, to any depth, without the hidden ones. Links are followed.

    Raises UserError for a folder that cannot be read, because its images would be missing without a word, and for a
    link that leads back to one of the folders `above`, because that has no end.
    """
    here = os.path.realpath(folder)
    if here in above:
        raise UserError(f"{printable(folder)} leads back to {printable(here)}: remove the link on this way")
    for entry in scan(folder):
        if entry.is_dir():
            yield from list_files(entry.path, (*above, here))
        elif entry.is_file() or entry.is_symlink():  # a link to nothing is an error when it is read
            yield entry.path


def list_folders(folder: str | Path) -> list[str]:
    """The names of the folders in `folder`, sorted, without the hidden ones. UserError where it cannot be read."""
    return sorted(entry.name for entry in scan(folder) if entry.is_dir())


def scan(folder: str | Path) -> list[os.DirEntry[str]]:
    """What `folder` holds, without the hidden entries. UserError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{printable(folder)} cannot be read ({error.strerror})") from None


def is_image(path: str) -> bool:
    """Whether a file's name is that of an image, and not of a hidden file."""
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def printable(path: str | Path) -> str:
    r"""A path for messages: bytes of a file's name that are not UTF-8 are shown as \xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def to_rgb(picture: Image.Image) -> Image.Image:
    """`picture` as RGB of 8 bits a channel; transparency is dropped.

    Of 16 bits the upper 8 are kept. Pillow does so itself with colours; 16-bit grey it would clip, so that nearly all
    of it became white. Raises ValueError for pixels without a known white: 32-bit integers and floating point.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode[0] in "IF":
        raise ValueError(f"its pixels are of mode {picture.mode}, not of 8 or 16 bits a channel")
    return picture.convert("RGB")
