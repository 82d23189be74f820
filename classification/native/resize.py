"""A square of a resized part of an image, with the bytes of Pillow's bilinear resampling.

Pillow resizes the whole picture, so resize.cpp is faster. Where it cannot be compiled, or gives other bytes, Pillow
does the work.
"""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from optim.native import load_library

SOURCE = Path(__file__).with_name("resize.cpp")

Box = tuple[int, int, int, int]  # left, top, right, bottom
Pair = tuple[int, int]  # a width and a height, or left and top
ColumnsFirst = Callable[[int, int, int, int], bool]  # of width and height, before and after

# Whether Pillow filters columns before rows, which changes the rounding: from 13.0 on, in 12, and before.
ORDERS: tuple[ColumnsFirst, ...] = (
    lambda width, height, new_width, new_height: height > new_height and height - new_height > 2 * (width - new_width),
    lambda width, height, new_width, new_height: height > new_height and height > 100 * width,
    lambda *_: False,
)
# Width and height, before and after, on both sides of the limits where the orders differ.
PROBES = (
    (40, 40, 60, 20), (40, 60, 30, 38), (40, 60, 30, 40), (60, 40, 30, 38), (20, 20, 40, 30), (3, 301, 5, 40),
    (3, 300, 5, 40), (50, 70, 23, 23), (97, 61, 32, 32), (31, 29, 7, 53),
)  # fmt: skip


def resized_square(
    pixels: np.ndarray, box: Box, resized: Pair, corner: Pair, size: int, out: Tensor | None = None
) -> Tensor:
    """uint8 [size, size, 3]: `box` of `pixels` (uint8 [height, width, 3]), resized to `resized`, cut from `corner` on.

    `out` is contiguous and of that shape. ValueError for another form, or where box or square reach too far.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be uint8 [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    left, top, right, bottom = box
    inside = 0 <= left < right <= pixels.shape[1] and 0 <= top < bottom <= pixels.shape[0]
    if not (inside and size > 0 and all(0 <= at <= side - size for at, side in zip(corner, resized, strict=True))):
        raise ValueError(f"{box} of {pixels.shape} as {resized}: there is no square of {size} at {corner}")
    square = torch.empty(size, size, 3, dtype=torch.uint8) if out is None else out
    fits = square.shape == (size, size, 3) and square.dtype == torch.uint8 and square.device.type == "cpu"
    if not (fits and square.is_contiguous()):
        raise ValueError(f"out must be contiguous, uint8 {[size, size, 3]}, not {square.dtype} {list(square.shape)}")
    if native := native_resize():
        function, order = native
        _by_native(function, order, pixels, box, resized, corner, square)
    else:
        square.copy_(_by_pillow(pixels, box, resized, corner, size))
    return square


def _by_pillow(pixels: np.ndarray, box: Box, resized: Pair, corner: Pair, size: int) -> Tensor:
    picture = Image.fromarray(pixels).crop(box).resize(resized, Image.Resampling.BILINEAR)
    left, top = corner
    return torch.from_numpy(np.array(picture)[top : top + size, left : left + size])


def _by_native(
    function: Callable[..., int],
    order: ColumnsFirst,
    pixels: np.ndarray,
    box: Box,
    resized: Pair,
    corner: Pair,
    square: Tensor,
) -> None:
    pixels = np.ascontiguousarray(pixels, dtype=np.uint8)
    stride = pixels.strides[0]
    left, top, right, bottom = box
    sizes = (right - left, bottom - top, *resized)
    begin = pixels.__array_interface__["data"][0] + top * stride + left * 3  # pixels.ctypes is slower
    if function(begin, stride, *sizes, *corner, len(square), order(*sizes), square.data_ptr()):
        raise MemoryError(f"to resize {sizes[0]} x {sizes[1]} pixels to {resized[0]} x {resized[1]}")


@cache
def native_resize() -> tuple[Callable[..., int], ColumnsFirst] | None:
    """The compiled function and this Pillow's order, or None after one warning."""
    signature = ctypes.c_int, [ctypes.c_void_p, *[ctypes.c_int64] * 9, ctypes.c_void_p]
    library = load_library(SOURCE, {"resize_square": signature}, "Pillow's slower resizing is used")
    if library is None:
        return None
    function = library.resize_square
    for order in ORDERS:
        if all(_is_pillows(function, order, probe) for probe in PROBES):
            return function, order
    warnings.warn("this version of Pillow resizes in an unknown way, and is used itself: it is slower", stacklevel=3)
    return None


def _is_pillows(function: Callable[..., int], order: ColumnsFirst, probe: tuple[int, int, int, int]) -> bool:
    width, height, *resized = probe
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square = torch.empty(min(resized), min(resized), 3, dtype=torch.uint8)
    request = pixels, (0, 0, width, height), (resized[0], resized[1]), (0, 0)
    _by_native(function, order, *request, square)
    return torch.equal(square, _by_pillow(*request, len(square)))
