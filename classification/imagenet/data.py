"""ImageNet in training: worker processes read and decode, the device mirrors and normalises.

Reads the LMDB that `prepare.py` makes, or a folder tree. How image k looks in epoch e depends on (seed, e, k) alone.
Workers hand over uint8, a quarter of the bytes of float32.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from overrides import override
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from classification.augment import Batch, Normalise, parts_in_order, whole_updates
from classification.held_out import held_out
from classification.image_files import DamagedImage
from classification.imagenet.decode import DECODERS, central_view, random_view
from classification.imagenet.lmdb import SPLITS, LmdbSplit, open_splits
from classification.imagenet.raw import FolderSplit, list_folder
from classification.native.resize import native_resize
from engine.allocator import keep_freed_memory, populate
from engine.distributed import ranks_on_this_machine
from engine.errors import UserError
from engine.machine import core_count
from engine.manifest import MANIFEST
from engine.seed import derive, generator

log = logging.getLogger(__name__)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN, VAL, HELD_OUT = range(3)  # HELD_OUT: training images, seen as validation images are

Split = LmdbSplit | FolderSplit


class Request(NamedTuple):
    """A batch for a worker to make."""

    split: int  # TRAIN, VAL or HELD_OUT
    epoch: int
    indices: Sequence[int]


class RawBatch(NamedTuple):
    """What a worker hands over."""

    pixels: Tensor  # uint8 [b, size, size, 3]
    labels: Tensor  # int64 [b]
    mirror: Tensor  # bool [b]: still to be mirrored
    split: int
    damaged: list[str]  # a line for each image not used


class ImageNetData:
    """ImageNet with the interface of `augment.ImageData`.

    `size`: side of the square that the network sees. `resize`: shorter side of validation images before they are cut
    (default: 256 / 224 of `size`). `decoder`: exact or fast (decode.py). `on_damaged`: with "skip" the next image takes
    the place of a damaged training image; a damaged validation image is always an error. `workers`: processes (default:
    this rank's share of the cores, up to 16). `validation`: the share of training images held out, not by class, as
    nothing lists their labels.
    """

    def __init__(
        self,
        root: Path,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        size: int = 224,
        resize: int | None = None,
        decoder: str = "fast",
        on_damaged: str = "error",
        workers: int | None = None,
        validation: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        splits = _open(root)
        self.num_classes = len(splits[TRAIN].classes)
        images, self.test_size = (len(split) for split in splits)
        held = held_out(torch.zeros(images, dtype=torch.int64), validation) if validation else torch.zeros(images) > 0
        self._kept, self._held_out = (part.nonzero()[:, 0] for part in (~held, held))
        self.train_size, self.valid_size = len(self._kept), len(self._held_out)
        resize = round(size * 256 / 224) if resize is None else resize
        if resize < size:
            raise UserError(f"data.resize={resize} is smaller than data.size={size}: nothing could be cut out of it")
        self._normalise = Normalise(MEAN if mean is None else mean, STD if std is None else std, size, device)
        self.seed, self.device, self.on_damaged = seed, torch.device(device), on_damaged

        native_resize()  # compiled once, before the workers start
        if workers is None:
            workers = max(1, min(16, core_count() // ranks_on_this_machine()))
        self._requests = _Requests()
        self._loader = DataLoader(
            _Batches((*splits, splits[TRAIN]), seed, size, resize, decoder),
            batch_size=None,  # the data set makes whole batches
            sampler=self._requests,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # DataLoader draws a number an epoch
        )
        self._damaged: set[str] = set()
        self._untaken = 0
        self._iteration: object | None = None

    def updates_per_epoch(self, batch: int, passes: int = 1) -> int:
        """As `ImageData.updates_per_epoch`."""
        return whole_updates(self.train_size, batch, passes)

    def train_batches(
        self,
        epoch: int,
        batch: int,
        passes: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start_update: int = 0,
        channels_last: bool = True,
    ) -> Iterator[list[tuple[int, Batch]]]:
        """As `ImageData.train_batches`. One iteration at a time, of any split."""
        order = self._kept[torch.randperm(self.train_size, generator=generator(self.seed, "order", epoch))]
        updates = range(start_update, self.updates_per_epoch(batch, passes))
        own = range(rank, passes, world_size)
        firsts = ((update * passes + index) * batch for update in updates for index in own)
        requests = (Request(TRAIN, epoch, order[first : first + batch].tolist()) for first in firsts)
        batches = self._load(requests, channels_last)
        return ([(index, next(batches)) for index in own] for _ in updates)

    def test_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, channels_last: bool = True
    ) -> Iterator[Batch]:
        """As `ImageData.test_batches`: ImageNet's validation images."""
        return self._in_order(VAL, range(self.test_size), batch_size, rank, world_size, channels_last)

    def valid_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, channels_last: bool = True
    ) -> Iterator[Batch]:
        return self._in_order(HELD_OUT, self._held_out.tolist(), batch_size, rank, world_size, channels_last)

    def _in_order(
        self, split: int, indices: Sequence[int], batch_size: int, rank: int, world_size: int, channels_last: bool
    ) -> Iterator[Batch]:
        parts = parts_in_order(len(indices), batch_size, rank, world_size)
        return self._load((Request(split, 0, indices[part]) for part in parts), channels_last)

    def take_damaged(self) -> int:
        """Training images replaced on this rank since the last call."""
        taken, self._untaken = self._untaken, 0
        return taken

    def _load(self, requests: Iterator[Request], channels_last: bool) -> Iterator[Batch]:
        self._requests.pending = requests
        mine = self._iteration = object()  # the workers are shared: the latest iteration has them
        for raw in self._loader:
            if self._iteration is not mine:
                raise RuntimeError("another iteration over this data was begun: finish one before the next")
            for line in raw.damaged:
                self._report(line, raw.split)
            yield self._finish(raw, channels_last)

    def _report(self, line: str, split: int) -> None:
        if split != TRAIN:
            raise UserError(f"{line}: accuracy is over all validation images; restore the image, and build again")
        if self.on_damaged != "skip":
            raise UserError(f"{line}: restore the image and build again, or go on without it: data.on_damaged=skip")
        if line not in self._damaged:
            log.warning("%s: skipped, the next image takes its place", line)
        self._damaged.add(line)
        self._untaken += 1

    def _finish(self, raw: RawBatch, channels_last: bool) -> Batch:
        pixels, labels, mirror = (part.to(self.device, non_blocking=True) for part in raw[:3])
        pixels = torch.where(mirror[:, None, None, None], pixels.flip(2), pixels)
        return self._normalise(pixels, channels_last), labels


class _Requests(Sampler[Request]):
    """The present iteration's requests, for the DataLoader that serves all."""

    def __init__(self) -> None:
        self.pending: Iterator[Request] = iter(())

    @override
    def __iter__(self) -> Iterator[Request]:
        return self.pending


class _Batches(Dataset[RawBatch]):
    def __init__(self, splits: Sequence[Split], seed: int, size: int, resize: int, decoder: str) -> None:
        self.splits, self.seed, self.size, self.resize, self.decoder = splits, seed, size, resize, decoder

    @override
    def __getitem__(self, request: Request) -> RawBatch:
        count = len(request.indices)
        pixels = _empty_batch(count, self.size)
        labels, mirror = torch.full((count,), -1), torch.zeros(count, dtype=torch.bool)
        split, damaged = self.splits[request.split], []
        for place, index in enumerate(request.indices):
            # All batches must have one size, so the next image replaces a damaged one.
            candidates = range(index, index + (len(split) if request.split == TRAIN else 1))
            for candidate in candidates:
                try:
                    labels[place], mirror[place] = self._view(request, candidate % len(split), pixels[place])
                    break
                except DamagedImage as error:
                    damaged.append(f"{split.name_of(candidate % len(split))} {error}")
        return RawBatch(pixels, labels, mirror, request.split, damaged)

    def _view(self, request: Request, index: int, out: Tensor) -> tuple[int, bool]:
        """Write an image to `out`; returns its label and whether to mirror it."""
        record = self.splits[request.split][index]
        mirror = False
        if request.split == TRAIN:
            random = Random(derive(self.seed, "augmentation", request.epoch, index))
            mirror = random.random() < 0.5
            choose = partial(random_view, size=self.size, random=random)
        else:
            choose = partial(central_view, resize=self.resize, size=self.size)
        DECODERS[self.decoder](record.image, choose, self.size, out)
        return record.label, mirror


def _empty_batch(count: int, size: int) -> Tensor:
    """uint8 [count, size, size, 3]; a worker's lies in shared memory, which saves a copy."""
    if get_worker_info() is None:
        return torch.empty(count, size, size, 3, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(count * size * size * 3)  # as torch's default_collate does
    populate(storage.data_ptr(), storage.nbytes())
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (count, size, size, 3))


def _open(root: Path) -> tuple[Split, Split]:
    if (root / MANIFEST).exists() or any((root / f"{name}.lmdb").exists() for name in SPLITS):
        return open_splits(root)
    return list_folder(root)


def _start_worker(worker: int) -> None:
    # Signals to the whole job are for the training process: it saves, then ends its workers.
    os.setpgrp()
    keep_freed_memory()  # of decoded images
