"""Small trees of JPEGs in ImageNet's layout. The images are smooth noise, so that resizing changes them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n01484850")


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(seed)
    channels = len(mode) if mode != "L" else 1
    coarse = random.integers(0, 256, (max(2, height // 16), max(2, width // 16), channels), dtype=np.uint8)
    bands = [Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)]
    noisy = [
        np.clip(np.asarray(band) + random.normal(0, 6, (height, width)), 0, 255).astype(np.uint8) for band in bands
    ]
    return Image.merge(mode, [Image.fromarray(band) for band in noisy])


def encoded(image: Image.Image, kind: str = "JPEG", **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | settings)
    return file.getvalue()


def contents(count: int, seed: int = 0) -> list[bytes]:
    random = np.random.default_rng(seed)
    made = []
    for index in range(count):
        width, height = (int(n) for n in random.integers(40, 130, 2))
        settings = [{}, {"subsampling": 0}, {"progressive": True}][index % 3]
        made.append(encoded(picture(seed * 1000 + index, width, height), **settings))
    return made


def make_tree(root: Path, train: int = 8, val: int = 4) -> Path:
    """Make train/<class>/* and val/<class>/* with `train` and `val` images a class. Returns `root`."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index, content in enumerate(contents(count, seed=label + (10 if split == "val" else 0))):
                (folder / f"{name}_{index}.JPEG").write_bytes(content)
    return root
