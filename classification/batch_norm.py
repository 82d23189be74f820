"""BatchNorm as several GPUs have it: statistics of each pass of an update, running ones from the first pass alone.

In the published runs the evaluated model has the running statistics of rank 0, which takes the first pass. A large GPU
can take several passes as one, normalised in groups. Weights that are evaluated but not trained on (an optimizer's eval
mode, an average) need statistics of their own.
"""

from itertools import islice
from typing import TYPE_CHECKING

import torch
from overrides import override
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from engine.seed import seed_step

if TYPE_CHECKING:
    from classification.train import ImageRun

BATCHES = 50  # as in schedule_free's example with BatchNorm


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """In training, `group` of the images [N, C, H, W] at a time. ValueError where N is no multiple of it."""

    def __init__(self, group: int, channels: int, eps: float, momentum: float | None) -> None:
        super().__init__(channels, eps, momentum)
        self.group = group

    @override(check_signature=False)  # torch names the argument `input`
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) == self.group:
            return super().forward(x)
        if len(x) % self.group:
            raise ValueError(f"{len(x)} images cannot be divided into groups of {self.group}")
        # Not one operation over [groups, group, ...]: so each part is read where it lies.
        first, *others = x.split(self.group)
        normalised = [
            nn.functional.batch_norm(part, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for part in others
        ]
        return torch.cat([super().forward(first), *normalised])


def normalise_in_groups(model: nn.Module, group: int) -> None:
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm) is nn.BatchNorm2d:
                grouped = GroupedBatchNorm2d(group, norm.num_features, norm.eps, norm.momentum)
                grouped.load_state_dict(norm.state_dict())
                setattr(parent, name, grouped.to(norm.weight))


def track_statistics(model: nn.Module, tracked: bool) -> None:
    """Set whether training passes change BatchNorm's running statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = tracked


def renew_statistics(run: "ImageRun") -> None:
    """Renew the model's running statistics over the epoch's first passes, the same on every rank."""
    config, progress = run.config, run.progress
    updates = run.data.train_batches(progress.epoch, config.batch, config.passes, channels_last=config.channels_last)
    images = (images for passes in updates for _, (images, _) in passes)
    track_statistics(run.model, True)
    seed_step(config.seed, "statistics", progress.epoch)
    with run.precision.autocast():
        update_bn(islice(images, config.bn_update_batches or BATCHES), run.model)
    run.data.take_damaged()  # they are counted where they are trained on
