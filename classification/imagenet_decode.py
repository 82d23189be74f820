"""From a JPEG's bytes to the square of pixels that a network sees; two decoders, one answer.

    exact    Pillow, step by step as torchvision's transforms on PIL images: equal to them bit for bit
    fast     libjpeg-turbo by way of simplejpeg, decoding no more of the file than the view needs, then torch's resize

Most of the time goes into undoing the file's entropy coding, which must be read from the top: `fast` stops below the
view, and decodes a large image at a fraction of its size where that still has twice the pixels that are shown. Both use
bilinear resizing with antialiasing. What `fast` cannot read, such as the CMYK files and the PNG that real ImageNet has
among its JPEGs, it leaves to `exact`.
"""

import io
import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from classification.imagenet_lmdb import DamagedImage

BASELINE, PROGRESSIVE, START_OF_SCAN = (0xC0, 0xC1), (0xC2,), 0xDA  # markers of a JPEG's sections
END_OF_IMAGE = b"\xff\xd9"
ROWS_BELOW = 2  # that smooth chroma upsampling looks at
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the random crop: its share of the area, its width to its height


class View(NamedTuple):
    """What is shown of an image: `box` of it, resized to `resized`, from whose `corner` on the square is cut."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in the original
    resized: tuple[int, int]  # width, height
    corner: tuple[int, int] = (0, 0)  # left, top in the resized


Choose = Callable[[int, int], View]  # from an image's width and height


def random_view(width: int, height: int, size: int, random: Random) -> View:
    """The view of torchvision's RandomResizedCrop(size); at most 40 draws from `random`."""
    for _ in range(10):
        area = width * height * (SCALE[0] + (SCALE[1] - SCALE[0]) * random.random())
        ratio = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * random.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.random() * (width - w + 1)), int(random.random() * (height - h + 1))
            break
    else:  # nothing fits into an image this long: its middle, as wide or as high as is allowed
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return View((left, top, left + w, top + h), (size, size))


def central_view(width: int, height: int, resize: int, size: int) -> View:
    """The view of torchvision's Resize(resize), of the shorter side, and CenterCrop(size)."""
    short, long = min(width, height), max(width, height)
    long = int(resize * long / short)
    w, h = (resize, long) if width <= height else (long, resize)
    return View((0, 0, width, height), (w, h), (round((w - size) / 2), round((h - size) / 2)))


def exact(image: bytes | memoryview, choose: Choose, size: int) -> Tensor:
    """uint8 [size, size, 3], as torchvision's transforms on PIL images make it. DamagedImage where it is no image."""
    picture = open_rgb(image)
    view = choose(*picture.size)
    if view.box != (0, 0, *picture.size):
        picture = picture.crop(view.box)
    if view.resized != picture.size:
        picture = picture.resize(view.resized, Image.Resampling.BILINEAR)
    left, top = view.corner
    return torch.from_numpy(np.array(picture)[top : top + size, left : left + size])


def fast(image: bytes | memoryview, choose: Choose, size: int) -> Tensor:
    """uint8 [size, size, 3], nearly as `exact`. DamagedImage where it is no image."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return exact(image, choose, size)
    view = choose(width, height)
    left, top, right, bottom = view.box
    part, rows = _cut(image, height, min(bottom + ROWS_BELOW, height))
    reduction = min((right - left) / view.resized[0], (bottom - top) / view.resized[1])
    least = (math.ceil(2 * rows / reduction), math.ceil(2 * width / reduction)) if reduction >= 4 else (0, 0)
    try:
        if colours in ("CMYK", "YCCK"):
            raise ValueError("of no colours that are converted here")
        # Where the file was cut, what is left of it counts as a recoverable error.
        pixels = simplejpeg.decode_jpeg(part, min_height=least[0], min_width=least[1], strict=rows == height)
    except ValueError:
        return exact(image, lambda *_: view, size)
    if pixels.shape[1] != width:
        scale = round(8 * pixels.shape[1] / width) / 8  # libjpeg scales by eighths, and rounds the size up
        left, top, right, bottom = (round(edge * scale) for edge in view.box)
    square = torch.from_numpy(np.ascontiguousarray(pixels[top:bottom, left:right]))
    if view.resized != (right - left, bottom - top):
        planes = square[None].permute(0, 3, 1, 2)  # in this order: torch then knows it for channels-last, and is faster
        planes = interpolate(planes, view.resized[::-1], mode="bilinear", antialias=True)
        square = planes.permute(0, 2, 3, 1)[0]
    left, top = view.corner
    return square[top : top + size, left : left + size]


def _cut(image: bytes | memoryview, height: int, rows: int) -> tuple[bytes | memoryview | bytearray, int]:
    """A JPEG of `height` rows declared to be `rows` high, so that decoding stops there; and the rows that it now has.

    Only a file whose rows lie in it from top to bottom can be cut: a progressive one is returned as it is. So is one
    without an end, for the decoder to complain.
    """
    position = 2
    whole = rows == height or bytes(image[-2:]) != END_OF_IMAGE
    while not whole and image[position] == 0xFF:
        marker, length = image[position + 1], int.from_bytes(image[position + 2 : position + 4], "big")
        if marker in BASELINE:  # the frame's header: length, precision, height, width, ...
            cut = bytearray(image)
            cut[position + 5 : position + 7] = rows.to_bytes(2, "big")
            return cut, rows
        if marker in PROGRESSIVE or marker == START_OF_SCAN:
            break
        position += 2 + length
    return image, height


def open_rgb(image: bytes | memoryview) -> Image.Image:
    """Decode any kind of file that Pillow reads, to RGB; DamagedImage where it cannot be."""
    try:
        with Image.open(io.BytesIO(image)) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError:
        raise DamagedImage("is no image") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise DamagedImage(f"cannot be decoded ({error})") from None


DECODERS = {"exact": exact, "fast": fast}
