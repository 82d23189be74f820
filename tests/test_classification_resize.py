"""The native resizing against Pillow's, bit for bit."""

import warnings
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

import optim.native
from classification.native import resize
from classification.native.resize import resized_square
from optim.native import NotCompiled


@pytest.fixture
def forgetful():
    resize.native_resize.cache_clear()
    yield
    resize.native_resize.cache_clear()


def noise(height, width):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(pixels, box, resized, corner, size):
    picture = Image.fromarray(pixels).crop(box).resize(resized, Image.Resampling.BILINEAR)
    left, top = corner
    return np.asarray(picture.crop((left, top, left + size, top + size)))


def random_request(random, longest):
    """Pixels, box, resized, corner and size."""
    height, width = random.randint(1, longest), random.randint(1, longest)
    left, top = random.choice([0, random.randrange(width)]), random.choice([0, random.randrange(height)])
    box = (left, top, random.choice([width, random.randint(left + 1, width)]), random.randint(top + 1, height))
    resized = [random.choice([random.randint(1, longest), high - low]) for low, high in zip(box, box[2:], strict=False)]
    size = random.randint(1, min(resized))
    corner = tuple(random.randint(0, side - size) for side in resized)
    return noise(height, width), box, tuple(resized), corner, size


def test_is_native_here():
    assert resize.native_resize() is not None, (
        "no compiler here, or an unknown Pillow, so that the tests below test nothing"
    )


@pytest.mark.parametrize("longest", [4, 20, 70, 300])
def test_equals_pillow_bit_for_bit(longest):
    random = Random(longest)
    for _ in range(150):
        request = random_request(random, longest)
        assert np.array_equal(resized_square(*request), by_pillow(*request)), (request[0].shape, request[1:])


@pytest.mark.parametrize("shape, resized", [((3000, 2), (5, 7)), ((2, 3000), (7, 5)), ((600, 601), (1, 1))])
def test_equals_pillow_far_from_square(shape, resized):
    request = noise(*shape), (0, 0, *shape[::-1]), resized, (0, 0), min(resized)
    assert np.array_equal(resized_square(*request), by_pillow(*request))


def test_extremes_and_slices():
    """A white image has the largest sums. The rows of a slice do not lie next to each other in memory."""
    white = np.full((90, 90, 3), 255, dtype=np.uint8)
    assert (resized_square(white, (0, 0, 90, 90), (37, 41), (0, 0), 37) == 255).all()
    pixels = noise(80, 90)[3:70, 5:60]
    request = (1, 2, 50, 60), (33, 44), (1, 12), 32
    assert np.array_equal(resized_square(pixels, *request), by_pillow(np.ascontiguousarray(pixels), *request))


@pytest.mark.parametrize(
    "box, resized, corner, size",
    [
        ((0, 0, 21, 10), (8, 8), (0, 0), 8),
        ((0, 0, 20, 11), (8, 8), (0, 0), 8),
        ((-1, 0, 20, 10), (8, 8), (0, 0), 8),
        ((5, 0, 5, 10), (8, 8), (0, 0), 8),
        ((0, 0, 20, 10), (8, 8), (1, 0), 8),
        ((0, 0, 20, 10), (9, 8), (1, 0), 9),
        ((0, 0, 20, 10), (9, 8), (-1, 0), 8),
        ((0, 0, 20, 10), (9, 8), (0, 0), 0),
    ],
)
def test_what_lies_outside_is_refused(box, resized, corner, size):
    with pytest.raises(ValueError, match="no square"):
        resized_square(noise(10, 20), box, resized, corner, size)


@pytest.mark.parametrize(
    "pixels, out",
    [
        (np.zeros((10, 20), np.uint8), None),
        (np.zeros((10, 20, 1), np.uint8), None),
        (np.zeros((10, 20, 3), np.float32), None),
        (noise(10, 20), torch.zeros(8, 8, 3)),
        (noise(10, 20), torch.zeros(4, 8, 3, dtype=torch.uint8)),
        (noise(10, 20), torch.zeros(3, 8, 8, dtype=torch.uint8).permute(1, 2, 0)),
    ],
)
def test_arrays_of_another_form_are_refused(pixels, out):
    with pytest.raises(ValueError, match="must be"):
        resized_square(pixels, (0, 0, 20, 10), (8, 8), (0, 0), 8, out)


def test_without_a_compiler_pillow_gives_the_same(forgetful, monkeypatch):
    random = Random(0)
    requests = [random_request(random, 60) for _ in range(30)]
    native = [resized_square(*request) for request in requests]

    def fail(source):
        raise NotCompiled("no C++ compiler found")

    resize.native_resize.cache_clear()
    monkeypatch.setattr(optim.native, "compile_library", fail)
    with pytest.warns(UserWarning, match="could not be compiled.*Pillow's slower.*no C"):
        first = resized_square(*requests[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(torch.equal(resized_square(*r), n) for r, n in zip(requests, native, strict=True))
    assert torch.equal(first, native[0])


def test_an_unknown_pillow_is_used_itself(forgetful, monkeypatch):
    """This Pillow filters columns first. All known ones filter rows first."""
    monkeypatch.setattr(resize, "ORDERS", (lambda *_: True,))
    request = noise(40, 50), (0, 0, 50, 40), (60, 60), (0, 0), 60
    with pytest.warns(UserWarning, match="unknown way"):
        assert np.array_equal(resized_square(*request), by_pillow(*request))
