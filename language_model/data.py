"""Batches of token ids: contiguous rows of a shard for training, rows of whole sentences for testing.

Training follows the published batching. Shards and their sentences are shuffled in every epoch. A shard's tokens fill
batch x passes contiguous rows, and an update takes the next sequence_length columns. Pass k has the rows from k x batch
on; the ranks divide the passes. The network's state goes on in each row, and starts from zero at a new shard. What does
not fill a last update is dropped.

A test text is cut into rows of whole sentences, about equally long, whose state starts from zero. A row's first <S> is
predicted from the </S> before it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.seed import generator
from language_model.config import DataConfig
from language_model.prepared import Arrays, Corpus, Shard, open_corpus
from language_model.toy_text import pydoc_corpus

TEST_STEPS = 64  # columns of a test batch


class TrainBatch(NamedTuple):
    """Tokens of a pass and the tokens after them, both int64 [sequence_length, batch]."""

    tokens: Tensor
    targets: Tensor
    starts_shard: bool  # the state must start from zero
    on_host: Tensor  # the targets on the host, to be counted there


class ScoredBatch(NamedTuple):
    """As a TrainBatch. `counted`, bool [steps, rows], is False where a row has ended."""

    tokens: Tensor
    targets: Tensor
    counted: Tensor


def load_corpus(config: DataConfig) -> Corpus:
    return open_corpus(Path(config.root)) if config.name == "prepared" else pydoc_corpus()


def hold_out(corpus: Corpus, share: float) -> Corpus:
    """`corpus` with about `share` of each shard's sentences moved from `train` to `valid`.

    The draw is the same for every seed, so runs can be compared. UserError if a part is empty.
    """
    train, valid = [], []
    for index, shard in enumerate(corpus.train):
        order = torch.randperm(shard.sentences, generator=generator(0, "validation", index)).numpy()
        lengths, count = np.diff(shard.read()[1].astype(np.int64)), round(share * shard.sentences)
        for part, sentences in ((valid, np.sort(order[:count])), (train, np.sort(order[count:]))):
            if len(sentences):
                read = partial(_read_part, shard, sentences)
                part.append(Shard(int(lengths[sentences].sum()), len(sentences), read))
    if not train or not valid:
        which = "every" if valid else "no"
        raise UserError(f"data.validation={share} holds out {which} training sentence: choose another")
    return replace(corpus, train=train, valid=valid)


def _read_part(shard: Shard, sentences: np.ndarray) -> Arrays:
    tokens, offsets = shard.read()
    ends = np.cumsum(np.diff(offsets.astype(np.int64))[sentences])
    part = sentences_in_order((tokens, offsets), sentences, 0, int(ends[-1]))
    return part.astype(tokens.dtype), np.concatenate([[0], ends])


class TextData:
    """Batches of `corpus` on `device`. UserError if no shard fills an update, or the test text is empty."""

    def __init__(
        self,
        corpus: Corpus,
        batch: int,
        sequence_length: int,
        *,
        passes: int = 1,
        device: torch.device | str,
        seed: int,
    ) -> None:
        self.corpus, self.device, self.seed = corpus, device, seed
        self.batch, self.passes, self.sequence_length = batch, passes, sequence_length
        self.updates_per_epoch = sum(self._updates(shard.tokens) for shard in corpus.train)
        if not self.updates_per_epoch:
            largest = max((shard.tokens for shard in corpus.train), default=0)
            rows = f"batch={batch}" if passes == 1 else f"batch={batch} x passes={passes}"
            raise UserError(
                f"{rows} rows of sequence_length={sequence_length} tokens need a shard of "
                f"{batch * passes * sequence_length + 1:,} tokens, and the largest has {largest:,}: lower one of them"
            )
        self.test_tokens = sum(shard.tokens for shard in corpus.test)
        if not self.test_tokens:
            raise UserError("the test files hold no sentence: prepare the data with others (--test)")

    def _updates(self, tokens: int) -> int:
        """Updates in a shard, whose last token is only a target."""
        return max(0, tokens - 1) // (self.batch * self.passes * self.sequence_length)

    def train_batches(
        self, epoch: int, rank: int = 0, world_size: int = 1, *, start_update: int = 0
    ) -> Iterator[list[tuple[int, TrainBatch]]]:
        """The epoch's updates from `start_update` on: this rank's passes as (index in the update, batch)."""
        own = range(rank, self.passes, world_size)
        shards = self.corpus.train
        skip = start_update
        for index in torch.randperm(len(shards), generator=generator(self.seed, "shards", epoch)).tolist():
            updates = self._updates(shards[index].tokens)
            if skip >= updates:
                skip -= updates
                continue
            columns = self._columns(epoch, index, updates * self.sequence_length, own)
            for update in range(skip, updates):
                first, last = update * self.sequence_length, (update + 1) * self.sequence_length
                now, following = slice(first, last), slice(first + 1, last + 1)
                yield [
                    (number, TrainBatch(of_pass[now], of_pass[following], update == 0, on_host[following]))
                    for number, (of_pass, on_host) in zip(own, columns, strict=True)
                ]
            skip = 0

    def _columns(self, epoch: int, index: int, length: int, own: range) -> list[tuple[Tensor, Tensor]]:
        """Each pass of `own` in shard `index`: [length + 1, batch], on the device and the host (one tensor on CPUs)."""
        shard = self.corpus.train[index]
        order = torch.randperm(shard.sentences, generator=generator(self.seed, "sentences", epoch, index)).numpy()
        arrays, area = shard.read(), self.batch * length
        found = []
        for number in own:
            stream = sentences_in_order(arrays, order, number * area, (number + 1) * area + 1)
            columns = np.empty((length + 1, self.batch), np.int64)
            columns[:-1], columns[-1] = stream[:-1].reshape(self.batch, length).T, stream[length::length]
            on_host = torch.from_numpy(columns)
            pinned = on_host.pin_memory() if torch.device(self.device).type == "cuda" else on_host
            found.append((pinned.to(self.device, non_blocking=True), on_host))
        return found


def sentences_in_order(shard: Arrays, order: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` of the shard's sentences in `order`; int64 [stop - start]."""
    tokens, offsets = shard
    starts = offsets.astype(np.int64)
    lengths = np.diff(starts)[order]
    ends = np.cumsum(lengths)
    first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left") + 1
    begin = ends[first] - lengths[first]
    lengths, before = lengths[first:last], ends[first:last] - lengths[first:last] - begin
    places = np.repeat(starts[order[first:last]] - before, lengths)
    places += np.arange(len(places))
    return tokens[places[start - begin : stop - begin]].astype(np.int64)


def read_text(shards: Sequence[Shard]) -> tuple[np.ndarray, np.ndarray]:
    """All tokens end to end, and the sentences' lengths."""
    arrays = [shard.read() for shard in shards]
    return np.concatenate([tokens for tokens, _ in arrays]), np.concatenate([np.diff(ends) for _, ends in arrays])


def scored_batches(
    tokens: np.ndarray,
    lengths: np.ndarray,
    rows: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    steps: int = TEST_STEPS,
    device: torch.device | str,
) -> Iterator[ScoredBatch]:
    """Every token of a text, with sentences of these `lengths`, as a target once.

    A rank takes every world_size-th of the `rows` rows. A batch has up to `steps` columns.
    """
    ends = np.cumsum(lengths)
    cuts = np.unique(ends[np.searchsorted(ends, np.linspace(0, ends[-1], rows + 1)[1:])])
    bounds = list(zip([0, *cuts[:-1]], cuts, strict=True))[rank::world_size]
    if not bounds:  # more ranks than rows
        return
    longest = max(stop - start for start, stop in bounds)
    columns = torch.zeros(longest + 1, len(bounds), dtype=torch.int64)
    counted = torch.zeros(longest, len(bounds), dtype=torch.bool)
    for row, (start, stop) in enumerate(bounds):
        columns[0, row] = int(tokens[start - 1])  # the </S> before the row; for the first, the text's last
        columns[1 : stop - start + 1, row] = torch.from_numpy(tokens[start:stop].astype(np.int64))
        counted[: stop - start, row] = True
    columns, counted = columns.to(device), counted.to(device)
    for first in range(0, longest, steps):
        last = min(first + steps, longest)
        yield ScoredBatch(columns[first:last], columns[first + 1 : last + 1], counted[first:last])
