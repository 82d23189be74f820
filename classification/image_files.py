"""Image files: the paths below a folder, and the pixels as 8-bit RGB."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from engine.errors import UserError

# Those of torchvision/datasets/folder.py, whose import takes seconds.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class DamagedImage(Exception):
    """An image that differs from what was stored, or that is no image."""


def list_files(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Every file below `folder` except hidden ones. UserError for a link back to a folder `above` it."""
    here = os.path.realpath(folder)
    if here in above:
        raise UserError(f"{printable(folder)} leads back to {printable(here)}: remove the link on this way")
    for entry in scan(folder):
        if entry.is_dir():
            yield from list_files(entry.path, (*above, here))
        elif entry.is_file() or entry.is_symlink():
            yield entry.path


def list_folders(folder: str | Path) -> list[str]:
    """Sorted names. Raises UserError if `folder` cannot be read."""
    return sorted(entry.name for entry in scan(folder) if entry.is_dir())


def scan(folder: str | Path) -> list[os.DirEntry[str]]:
    """All entries but hidden ones. Raises UserError if `folder` cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{printable(folder)} cannot be read ({error.strerror})") from None


def is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def printable(path: str | Path) -> str:
    r"""A path for messages, with \xe9 for a byte that is not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_rgb(image: str | bytes | memoryview) -> Image.Image:
    """A file, by its path or content, as 8-bit RGB. Raises DamagedImage."""
    try:
        with Image.open(image if isinstance(image, str) else io.BytesIO(image)) as picture:
            return to_rgb(picture)
    except UnidentifiedImageError:
        raise DamagedImage("is no image that Pillow can read") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others
        how = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DamagedImage(f"cannot be decoded ({how})") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB, without transparency.

    Keeps the upper 8 of 16 bits, where Pillow clips grey to white. Raises ValueError for pixels of 32 bits, whose white
    value is unknown.
    """
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode[0] in "IF":
        raise ValueError(f"its pixels are of mode {picture.mode}, not of 8 or 16 bits a channel")
    return picture.convert("RGB")
