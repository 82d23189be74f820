"""Training images held out for validation: nothing is chosen on the test images."""

import torch
from torch import Tensor

from engine.errors import UserError
from engine.seed import generator


def held_out(labels: Tensor, share: float) -> Tensor:
    """Which images are held out, bool [N]: of each class of `labels`, int64 [N], the nearest number to `share`.

    The draw is the same for every seed, so runs can be compared. UserError where a part is empty.
    """
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(of_class), generator=generator(0, "validation", label))
        held[of_class[order[: round(share * len(of_class))]]] = True
    if not held.any() or held.all():
        which = "no" if not held.any() else "every"
        raise UserError(f"data.validation={share} holds out {which} training image of {len(labels)}: choose another")
    return held
