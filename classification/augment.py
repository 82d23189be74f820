"""Training batches of images: the whole set is one uint8 tensor on the device, and is augmented there.

Each training image is stored with its black border, so padding, cropping and mirroring are one gather. The result
equals that of torchvision's transforms, bit for bit. How sample i looks in epoch e depends on (seed, e, i) alone.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import UserError
from engine.seed import generator

Batch = tuple[Tensor, Tensor]  # images float32 [b, 3, H, W], normalised; labels int64 [b]


class Images(NamedTuple):
    """One split as read: pixels uint8 [N, H, W, 3] and labels int64 [N], on the CPU."""

    pixels: Tensor
    labels: Tensor


class Augmentation(NamedTuple):
    """A black border of `padding` pixels, a random crop, and a random mirror."""

    padding: int
    flip: bool


class Draws(NamedTuple):
    """The random choices of an epoch. All but `order` are indexed by sample."""

    order: Tensor  # int64 [N], the samples in training order
    top: Tensor  # int64 [N], the crop's first row in the padded image
    left: Tensor  # int64 [N], the crop's first column there
    mirror: Tensor  # bool [N]


class ImageData:
    """Images on one device. `mean` and `std` are per channel, of pixels in 0..1; None: the training images' own."""

    def __init__(
        self,
        train: Images,
        test: Images,
        classes: Sequence[str],
        augmentation: Augmentation,
        *,
        valid: Images | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.num_classes = len(self.classes)
        self.train_size, self.test_size = len(train.labels), len(test.labels)
        self.valid_size = len(valid.labels) if valid else 0
        self.image_size = height, width = tuple(train.pixels.shape[1:3])
        self.augmentation, self.seed, self.device = augmentation, seed, torch.device(device)
        if mean is None or std is None:
            own_mean, own_std = pixel_statistics(train.pixels)
            mean, std = own_mean if mean is None else mean, own_std if std is None else std
        self._normalise = Normalise(mean, std, width, device)
        self.mean, self.std = tuple(mean), tuple(std)

        padding = augmentation.padding
        padded = torch.zeros(
            self.train_size, height + 2 * padding, width + 2 * padding, 3, dtype=torch.uint8, device=device
        )
        padded[:, padding : padding + height, padding : padding + width] = train.pixels.to(device)
        self._padded_width, self._padded_area = padded.shape[2], padded.shape[1] * padded.shape[2]
        self._train_pixels = padded.view(-1, 3)
        self._train_labels = train.labels.to(device)
        self._test = Images(test.pixels.to(device), test.labels.to(device))
        self._valid = Images(valid.pixels.to(device), valid.labels.to(device)) if valid else None
        self._rows = self._padded_width * torch.arange(height, device=device)[:, None]
        self._columns = torch.arange(width, device=device)

    def updates_per_epoch(self, batch: int, passes: int = 1) -> int:
        """Whole updates in the training set; the rest is left out, as in the published runs."""
        return whole_updates(self.train_size, batch, passes)

    def draws(self, epoch: int) -> Draws:
        random = generator(self.seed, "augmentation", epoch)
        positions = 2 * self.augmentation.padding + 1
        order = torch.randperm(self.train_size, generator=random)
        top, left = torch.randint(positions, (2, self.train_size), generator=random)
        mirror = torch.rand(self.train_size, generator=random) < 0.5
        return Draws(order, top, left, mirror & self.augmentation.flip)

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
        """The epoch's updates from `start_update` on: for each, this rank's passes, as (index in the update, batch).

        Pass k of update u is order[first : first + batch] with first = (u * passes + k) * batch; a rank takes passes
        rank, rank + world_size, ... UserError if an update exceeds the set.
        """
        order, top, left, mirror = self.draws(epoch)
        # A crop's rows are read from pixel `start` in steps of `step`: from the right if mirrored.
        start = order * self._padded_area + (top * self._padded_width + left + mirror * (self.image_size[1] - 1))[order]
        step = (1 - 2 * mirror.long())[order]
        order, start, step = torch.stack((order, start, step)).to(self.device)
        labels = self._train_labels[order]

        def of_pass(number: int) -> Batch:
            part = slice(number * batch, (number + 1) * batch)
            index = start[part, None, None] + self._rows + step[part, None, None] * self._columns
            pixels = self._train_pixels.index_select(0, index.view(-1))
            return self._normalise(pixels.view(batch, *self.image_size, 3), channels_last), labels[part]

        updates = range(start_update, self.updates_per_epoch(batch, passes))
        own = range(rank, passes, world_size)
        return ([(index, of_pass(update * passes + index)) for index in own] for update in updates)

    def test_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, channels_last: bool = True
    ) -> Iterator[Batch]:
        """This rank's part of the test set in order."""
        return self._in_order(self._test, batch_size, rank, world_size, channels_last)

    def valid_batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, channels_last: bool = True
    ) -> Iterator[Batch]:
        return self._in_order(self._valid, batch_size, rank, world_size, channels_last)

    def _in_order(
        self, images: Images, batch_size: int, rank: int, world_size: int, channels_last: bool
    ) -> Iterator[Batch]:
        for part in parts_in_order(len(images.labels), batch_size, rank, world_size):
            yield self._normalise(images.pixels[part], channels_last), images.labels[part]

    def take_damaged(self) -> int:
        """None, as damaged images never come this far."""
        return 0


def whole_updates(images: int, batch: int, passes: int) -> int:
    """UserError where there is not even one."""
    if batch * passes > images:
        update = f"batch={batch}" if passes == 1 else f"batch={batch} passes={passes}"
        raise UserError(f"{update}: an update is larger than the training set, {images} images")
    return images // (batch * passes)


def parts_in_order(images: int, batch_size: int, rank: int, world_size: int) -> Iterator[slice]:
    """The batches of a rank's part of the images."""
    start, stop = (images * r // world_size for r in (rank, rank + 1))
    return (slice(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size))


class Normalise:
    """uint8 [b, H, `width`, 3] to float32 [b, 3, H, `width`]: (pixels / 255 - mean) / std, per channel.

    Raises UserError unless `mean` and `std` are three values each, possible for pixels in 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], width: int, device: torch.device | str) -> None:
        if len(mean) != 3 or len(std) != 3 or not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
            raise UserError(
                "data.mean and data.std need three values each, for pixels in 0..1: mean 0 to 1, std above 0 and up to "
                f"1; not {list(mean)} and {list(std)}"
            )
        # CUDA divides by a plain number inexactly.
        self._white = torch.tensor(255.0, device=device)
        self._row_mean = torch.tensor(mean, device=device).repeat(width)
        self._row_std = torch.tensor(std, device=device).repeat(width)

    def __call__(self, pixels: Tensor, channels_last: bool) -> Tensor:
        rows = pixels.flatten(2).to(torch.float32).div_(self._white).sub_(self._row_mean).div_(self._row_std)
        images = rows.view(pixels.shape).permute(0, 3, 1, 2)
        return images if channels_last else images.contiguous()


def pixel_statistics(pixels: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 [N, H, W, 3] in 0..1, exact by histograms."""
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for chunk in pixels.split(1024):
        for channel in range(3):
            counts[channel] += torch.bincount(chunk[..., channel].flatten(), minlength=256)
    share = counts.double() / counts[0].sum()
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ level
    variance = (share * (level - mean[:, None]).square()).sum(1)
    return mean.tolist(), variance.sqrt().tolist()
