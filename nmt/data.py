"""Batches of prepared parallel text: limited by tokens, the same for any number of ranks.

Batches hold sentences of about one length, and are shuffled. An update takes the next `passes` batches, so it sees
several lengths, as published (fairseq's EpochBatchIterator gives each GPU one batch). The ranks divide them.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.manifest import MANIFEST
from engine.seed import derive
from nmt.codec import BOS, EOS, PAD, Codec
from nmt.prepare.command import prepare_grammar
from nmt.prepare.recipes import GRAMMAR
from nmt.prepared import command_of, finished

JITTER = 1.0  # tokens; on Multi30k at 4,096 tokens a batch: 3.9 % padding instead of 3.1 %
ROWS_MULTIPLE = 8  # a batch has a multiple of this many sentences if they fit, as in fairseq


class Batch(NamedTuple):
    """Sentences of one pass, int64, padded at the end with PAD."""

    source: Tensor  # [B, S]: ids, EOS
    target_in: Tensor  # [B, T]: BOS, ids
    target_out: Tensor  # [B, T]: ids, EOS
    tokens: int  # of the target, with EOS, without padding; 0 for a pass without work
    update_tokens: int = 0  # of the whole update on all ranks; 0 in evaluation

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`. The host does not wait for a GPU."""
        if device.type == "cpu":
            return self
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in self[:3]]
        return Batch(*tensors, *self[3:])


def again(folder: Path) -> str:
    return f"delete {folder / MANIFEST}, then prepare the data again"


class Side:
    """One language of a split. Sentence i, with its EOS, is flat[starts[i] : starts[i] + lengths[i]]."""

    def __init__(self, folder: Path, split: str, language: str, entry: dict[str, Any]) -> None:
        array, offsets = (folder / f"{split}.{language}.{kind}" for kind in ("bin", "offsets"))
        tokens, token_bytes = entry[language]["tokens"], entry[language]["token_bytes"]
        for path, size in ((array, tokens * token_bytes), (offsets, 8 * (entry["pairs"] + 1))):
            found = path.stat().st_size if path.exists() else 0
            if found != size:
                raise UserError(f"{path} has {found:,} bytes, not {size:,}: {again(folder)}")
        self.flat = np.asarray(np.memmap(array, f"<u{token_bytes}", "r"))  # indexing a memmap object is slower
        boundaries = np.fromfile(offsets, "<i8")
        self.starts, self.lengths = boundaries[:-1], np.diff(boundaries).astype(np.int32)

    def sentence(self, index: int) -> np.ndarray:
        """A sentence without its EOS."""
        start = self.starts[index]
        return self.flat[start : start + self.lengths[index] - 1]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Sentences with their EOS, padded: int64 [len(indices), longest]."""
        lengths = self.lengths[indices][:, None]
        columns = np.arange(lengths.max())
        ids = self.flat.take(self.starts[indices][:, None] + columns, mode="clip").astype(np.int64)
        ids[columns >= lengths] = PAD
        return ids


class Split:
    def __init__(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        entry, languages = manifest["splits"][name], (manifest["source"], manifest["target"])
        self.source, self.target = (Side(folder, name, language, entry) for language in languages)
        self.raw = folder / f"{name}.{manifest['target']}.txt"

    def __len__(self) -> int:
        return len(self.source.lengths)

    @cached_property
    def longest(self) -> np.ndarray:
        """The length of each pair's longer side, with EOS."""
        return np.maximum(self.source.lengths, self.target.lengths)

    @cached_property
    def references(self) -> list[str]:
        """The target's raw text, not of the training split."""
        lines = self.raw.read_bytes().decode().removesuffix("\n").split("\n")
        if len(lines) != len(self):
            raise UserError(f"{self.raw} has {len(lines):,} lines, not {len(self):,}: {again(self.raw.parent)}")
        return lines

    def batch(self, indices: np.ndarray) -> Batch:
        """These pairs, padded. Without pairs: one row whose loss is zero."""
        if not len(indices):
            one = torch.tensor([[EOS], [BOS], [PAD]])
            return Batch(*one[:, None], tokens=0)
        source, target_out = self.source.rows(indices), self.target.rows(indices)
        target_in = np.empty_like(target_out)
        target_in[:, 0] = BOS
        np.copyto(target_in[:, 1:], target_out[:, :-1])
        target_in[target_in == EOS] = PAD
        tensors = map(torch.from_numpy, (source, target_in, target_out))
        return Batch(*tensors, tokens=int(self.target.lengths[indices].sum()))


class ParallelData:
    """UserError if the data is not whole."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.root, self.manifest = root, manifest
        self.codec = Codec.load(root)
        if self.codec.digest != manifest["codec"]:
            raise UserError(f"{root}: codec.json is not the one that the data was made with: {again(root)}")
        self.train, self.valid, self.test = (Split(root, name, manifest) for name in ("train", "valid", "test"))


def load_data(name: str, root: str | Path) -> ParallelData:
    """The data of the recipe `name`. "grammar" is prepared here if it is missing.

    UserError if the data is missing, damaged or of another recipe.
    """
    root = Path(root)
    manifest = finished(root, name)
    if manifest is None and name == GRAMMAR.name:
        prepare_grammar(root, wait=True)
        manifest = finished(root, name)
    if manifest is None:
        raise UserError(f"{root} holds no prepared data: {command_of(name, root)}")
    if manifest["recipe"] != name:
        raise UserError(
            f"{root} holds data of the recipe '{manifest['recipe']}', not '{name}': set data.name or data.root"
        )
    return ParallelData(root, manifest)


def train_batches(
    split: Split,
    max_tokens: int,
    passes: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    start_update: int = 0,
) -> Iterator[list[tuple[int, Batch]]]:
    """The epoch's updates from `start_update` on, each as this rank's passes: [(index in the update, batch)].

    In a batch, sentences x longest side <= `max_tokens`. Passes beyond the last batch hold no sentence. UserError if a
    pair is longer than `max_tokens`.
    """
    order = _by_length(split, _random(seed, "pairs", epoch).uniform(-JITTER, JITTER, len(split)))
    cuts = _cuts(split.longest[order], max_tokens)
    shuffled = _random(seed, "batches", epoch).permutation(len(cuts) - 1)
    tokens = np.add.reduceat(split.target.lengths[order], cuts[:-1], dtype=np.int64)[shuffled]
    for first in range(start_update * passes, len(shuffled), passes):
        update, total = [], int(tokens[first : first + passes].sum())
        for index in range(rank, passes, world_size):
            number = shuffled[first + index] if first + index < len(shuffled) else None
            rows = order[:0] if number is None else order[cuts[number] : cuts[number + 1]]
            update.append((index, split.batch(rows)._replace(update_tokens=total)))
        yield update


def updates_per_epoch(split: Split, max_tokens: int, passes: int) -> int:
    batches = len(_cuts(np.sort(split.longest), max_tokens)) - 1
    return -(-batches // passes)


def eval_batches(
    split: Split, max_tokens: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches and their pairs' indices, the longest first. Over all ranks each pair comes once."""
    order = _by_length(split, 0.0)
    cuts = _cuts(split.longest[order], max(max_tokens, int(split.longest.max())), multiple=1)
    for index in range(len(cuts) - 2 - rank, -1, -world_size):
        rows = order[cuts[index] : cuts[index + 1]]
        yield split.batch(rows), rows


def _by_length(split: Split, noise: np.ndarray | float) -> np.ndarray:
    """All pairs, sorted by their longer side, then by the difference of the sides plus `noise`.

    The difference rises at one length and falls at the next, so neighbours differ little.
    """
    source, target = split.source.lengths, split.target.lengths
    difference = np.where(split.longest % 2, source - target, target - source)
    return np.lexsort((difference + noise, split.longest))


def _cuts(longest: np.ndarray, budget: int, multiple: int = ROWS_MULTIPLE) -> np.ndarray:
    """Where to cut pairs of ascending length, and the end: pairs x longest <= budget in each part."""
    if longest[-1] > budget:
        raise UserError(
            f"a pair of {longest[-1]:,} tokens does not fit batch={budget:,}: raise it to that many at least"
        )
    cuts, total = [0], len(longest)
    while (begin := cuts[-1]) < total:
        # The largest n with n * longest[begin + n - 1] <= budget.
        most = min(total - begin, budget // int(longest[begin]))
        costs = np.arange(1, most + 1) * longest[begin : begin + most]
        count = int(np.searchsorted(costs, budget, side="right"))
        if count > multiple and begin + count < total:
            count -= count % multiple
        cuts.append(begin + count)
    return np.array(cuts)


def _random(seed: int, *path: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(derive(seed, *path)))
