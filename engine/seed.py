"""Randomness from the place in the run (seed, epoch, step or sample index), never from earlier draws.

So a resumed run repeats the uninterrupted one, with any number of workers and ranks.
"""

import random
from hashlib import blake2b

import numpy as np
import torch


def derive(seed: int, *path: int | str) -> int:
    """A 63-bit integer from `seed` and `path`, the same on every platform."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *path))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator, seeded for this place in the run."""
    return torch.Generator().manual_seed(derive(seed, *path))


def seed_step(seed: int, *path: int | str) -> None:
    """Seed Python, NumPy and torch (all devices) for one step."""
    value = derive(seed, *path)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
