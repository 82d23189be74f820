"""Small random data sets in the real ones' formats, to time a training without its data."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from engine.errors import UserError
from nmt.codec import EOS, SPECIALS, WORD_START, Codec
from nmt.prepared import EVALUATED, SPLITS, write_json

SIZES = {  # of an epoch of the real set: images, or tokens
    "cifar10": 50_000,
    "cifar100": 50_000,
    "imagenet": 1_281_167,
    "prepared": 829_000_000,  # One Billion Words (docs/data.md)
}


def make_data(name: str, root: Path) -> list[str]:
    """Write a data set in place of `name`, of MAKERS, to `root`, once. Returns overrides that select it."""
    done = root / "done"
    if not done.exists():
        root.mkdir(parents=True, exist_ok=True)
        MAKERS[name](root)
        done.touch()
    name = "folder" if name in ("cifar10", "cifar100") else name
    return [f"data.name={name}", f"data.root={root / 'data'}"]


def _images(train: int, test: int, classes: int, size: tuple[int, int], suffix: str, test_name: str) -> Callable:

    def make(root: Path) -> None:
        random = np.random.default_rng(0)
        for split, count in (("train", train), (test_name, test)):
            for label in range(classes):
                folder = root / "data" / split / f"n{label:08}"
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    coarse = random.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
                    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.{suffix}")

    return make


def _text(root: Path) -> None:
    """200,000 words of a vocabulary of 793,470, by Zipf's law."""
    words = np.array([f"w{number}" for number in range(793_468)])
    vocabulary = ["<S>", "<UNK>", *words.tolist()]
    counts = range(2 * len(vocabulary), len(vocabulary), -1)
    lines = (f"{word} {count}\n" for word, count in zip(vocabulary, counts, strict=True))
    (root / "vocabulary.txt").write_text("".join(lines))
    random = np.random.default_rng(0)
    ranks = np.exp(random.uniform(0, np.log(len(words)), (10_000, 20))).astype(int) - 1
    text = "".join(" ".join(line) + "\n" for line in words[ranks].tolist())
    for folder, name, part in (
        ("training-monolingual.tokenized.shuffled", "news.en-00001-of-00100", text),
        ("heldout-monolingual.tokenized.shuffled", "news.en.heldout-00000-of-00050", text[:10_000].rpartition("\n")[0]),
    ):
        (root / "raw" / folder).mkdir(parents=True, exist_ok=True)
        (root / "raw" / folder / name).write_text(part)
    command = [sys.executable, "-m", "language_model.prepare", root / "raw", root / "data"]
    command += ["--vocabulary", root / "vocabulary.txt"]
    made = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if made.returncode:
        raise UserError(f"no synthetic text could be made: {made.stderr.strip().splitlines()[-1]}")


def _pairs(root: Path) -> None:
    """20,000 pairs, from a joint vocabulary of 40,000. A side has 2 to 101 pieces with its </s>, 28 on average."""
    folder, languages = root / "data", ("en", "de")
    folder.mkdir(exist_ok=True)
    pieces = [*SPECIALS, *(f"{WORD_START}w{number}" for number in range(40_000 - len(SPECIALS)))]
    codec = Codec(*languages, pieces, [])
    codec.save(folder)
    random, splits = np.random.default_rng(0), {}
    for split in SPLITS:
        pairs = 200 if split in EVALUATED else 20_000
        lengths = random.gamma(2.5, 11, pairs).clip(2, 99).astype(int)
        entry: dict = {"pairs": pairs, "sha256": {}}
        for language in languages:
            of_side = (lengths + random.integers(-1, 2, pairs)).clip(1) + 1  # with </s>
            ends = np.cumsum(of_side)
            ids = random.integers(len(SPECIALS), codec.size, ends[-1]).astype("<u2")
            ids[ends - 1] = EOS
            ids.tofile(folder / f"{split}.{language}.bin")
            np.concatenate([[0], ends]).astype("<i8").tofile(folder / f"{split}.{language}.offsets")
            if split in EVALUATED:
                (folder / f"{split}.{language}.txt").write_text("w1 w2\n" * pairs)
            entry[language] = {"tokens": int(ends[-1]), "token_bytes": 2}
        splits[split] = entry
    manifest = {"recipe": "wmt14_en_de", "source": "en", "target": "de", "codec": codec.digest, "splits": splits}
    write_json(folder / "manifest.json", manifest)


MAKERS: dict[str, Callable[[Path], None]] = {
    "cifar10": _images(128, 5, 10, (32, 32), "png", "test"),
    "cifar100": _images(13, 1, 100, (32, 32), "png", "test"),
    "imagenet": _images(1, 1, 1000, (500, 375), "JPEG", "val"),
    "prepared": _text,
    "wmt14_en_de": _pairs,
}
