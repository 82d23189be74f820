"""From a JPEG's bytes to the square of pixels that a network sees. There are two decoders.

    exact    the pixels of torchvision's transforms on PIL images, bit for bit
    fast     decodes a large image at a fraction of its size, with at least twice the pixels that are shown; accepts
             every file that libjpeg-turbo decodes without an error

Both decode by libjpeg-turbo (simplejpeg), with Pillow's pixels, and resize by native/resize.py. Entropy decoding takes
most of the time, so both stop below the view. Pillow reads other files, such as ImageNet's CMYK files and PNG.
"""

import io
import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from torch import Tensor

from classification.image_files import open_rgb
from classification.native.resize import resized_square

BASELINE, PROGRESSIVE, START_OF_SCAN = (0xC0, 0xC1), (0xC2,), 0xDA  # markers of a JPEG's sections
END_OF_IMAGE = b"\xff\xd9"
# Horizontal and vertical samples of each colour: grey, and chroma at full or half resolution.
SAMPLINGS = {b"\x11", b"\x11\x11\x11", b"\x21\x11\x11", b"\x12\x11\x11", b"\x22\x11\x11"}
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # of Pillow; nothing here reads EXIF
ROWS_BELOW = 2  # smooth chroma upsampling reads them too
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the random crop: share of the image's area, width / height


class View(NamedTuple):
    """`box` of an image is resized to `resized`. There the square starts at `corner`."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in the original
    resized: tuple[int, int]  # width, height
    corner: tuple[int, int] = (0, 0)  # left, top in the resized part


Choose = Callable[[int, int], View]  # from an image's width and height


def random_view(width: int, height: int, size: int, random: Random) -> View:
    """The view of torchvision's RandomResizedCrop(size)."""
    for _ in range(10):
        area = width * height * (SCALE[0] + (SCALE[1] - SCALE[0]) * random.random())
        ratio = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * random.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.random() * (width - w + 1)), int(random.random() * (height - h + 1))
            break
    else:  # no crop fits so long an image: take its middle
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return View((left, top, left + w, top + h), (size, size))


def central_view(width: int, height: int, resize: int, size: int) -> View:
    """The view of torchvision's Resize(resize), of the shorter side, and CenterCrop(size)."""
    short, long = min(width, height), max(width, height)
    long = int(resize * long / short)
    w, h = (resize, long) if width <= height else (long, resize)
    return View((0, 0, width, height), (w, h), (round((w - size) / 2), round((h - size) / 2)))


def exact(image: bytes | memoryview, choose: Choose, size: int, out: Tensor | None = None) -> Tensor:
    """uint8 [size, size, 3]. Raises DamagedImage for data that are no image.

    Damage below the view is not noticed in a file with its end mark.
    """
    frame = _frame(image)
    if frame and _sampling(image, frame) in SAMPLINGS and _is_pillows_decoder():
        height, width = (int.from_bytes(image[frame + at : frame + at + 2], "big") for at in (5, 7))
        view = choose(width, height)
        part, rows = _cut(image, frame, height, view.box[3])
        with suppress(ValueError):
            return resized_square(simplejpeg.decode_jpeg(part, strict=rows == height), *view, size, out)
        choose = lambda *_: view  # noqa: E731 - the view must not be drawn twice
    picture = open_rgb(image)
    return resized_square(np.asarray(picture), *choose(*picture.size), size, out)


def fast(image: bytes | memoryview, choose: Choose, size: int, out: Tensor | None = None) -> Tensor:
    """Nearly equal to `exact`. Raises DamagedImage for data that are no image."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return exact(image, choose, size, out)
    view = choose(width, height)
    left, top, right, bottom = view.box
    part, rows = _cut(image, _frame(image), height, bottom)
    reduction = min((right - left) / view.resized[0], (bottom - top) / view.resized[1])
    least = (math.ceil(2 * rows / reduction), math.ceil(2 * width / reduction)) if reduction >= 4 else (0, 0)
    try:
        if colours in ("CMYK", "YCCK"):
            raise ValueError("of no colours that are converted here")
        pixels = simplejpeg.decode_jpeg(part, min_height=least[0], min_width=least[1], strict=rows == height)
    except ValueError:
        return exact(image, lambda *_: view, size, out)
    if pixels.shape[1] != width:
        scale = round(8 * pixels.shape[1] / width) / 8  # libjpeg scales by eighths and rounds the size up
        left, top, right, bottom = (round(edge * scale) for edge in view.box)
    return resized_square(pixels, (left, top, right, bottom), view.resized, view.corner, size, out)


def _frame(image: bytes | memoryview) -> int:
    """Where a JPEG's baseline or progressive frame begins; 0 if it or the end mark is missing."""
    position = 2
    if bytes(image[-2:]) != END_OF_IMAGE:
        return 0
    while position + 10 < len(image) and image[position] == 0xFF and image[position + 1] != START_OF_SCAN:
        if image[position + 1] in BASELINE + PROGRESSIVE:
            height, width = image[position + 5 : position + 7], image[position + 7 : position + 9]
            return position if any(height) and any(width) else 0  # for height 0 a later marker gives it
        position += 2 + int.from_bytes(image[position + 2 : position + 4], "big")
    return 0


def _sampling(image: bytes | memoryview, frame: int) -> bytes:
    # Bytes: marker 2, length 2, precision 1, height 2, width 2, colours 1; per colour name, sampling, quantisation 1.
    return bytes(image[frame + 11 : frame + 10 + 3 * image[frame + 9] : 3])


def _cut(image: bytes | memoryview, frame: int, height: int, bottom: int) -> tuple[bytes | memoryview | bytearray, int]:
    """The JPEG with a header that ends it just below `bottom`, and its number of rows then.

    Only baseline files are cut, whose rows come from top to bottom. The data left are a recoverable error.
    """
    rows = min(bottom + ROWS_BELOW, height)
    if rows == height or not frame or image[frame + 1] not in BASELINE:
        return image, height
    cut = bytearray(image)
    cut[frame + 5 : frame + 7] = rows.to_bytes(2, "big")
    return cut, rows


@cache
def _is_pillows_decoder() -> bool:
    """Some builds of Pillow do not use libjpeg-turbo."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (35, 51, 3), dtype=np.uint8))
    for settings in ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}):
        file = io.BytesIO()
        noise.save(file, "JPEG", **settings)
        if not np.array_equal(simplejpeg.decode_jpeg(file.getvalue()), np.asarray(open_rgb(file.getvalue()))):
            return False
    return True


DECODERS = {"exact": exact, "fast": fast}
