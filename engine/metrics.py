"""Sums on the device, reduced over ranks and read only when needed."""

import math

import torch

from engine.distributed import World
from engine.errors import UserError

DIVERGED = "the run has diverged"  # scripts and benchmarks look for it


class Sums:
    """Named sums in float64 on a device: `add` never waits for it, `reduce` does."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self.names = names
        self.values = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, **amounts: torch.Tensor | float) -> None:
        """Add 0-d tensors or numbers. KeyError for an unknown name."""
        if unknown := amounts.keys() - set(self.names):
            raise KeyError(f"no sums of {', '.join(sorted(unknown))}")
        self.values += torch.stack([self._scalar(amounts.get(name, 0.0)) for name in self.names])

    def _scalar(self, amount: torch.Tensor | float) -> torch.Tensor:
        if isinstance(amount, torch.Tensor):
            return amount.detach().to(self.values)
        return self.values.new_full((), amount)  # filled on the device, without a copy

    def reduce(self, world: World) -> dict[str, float]:
        return dict(zip(self.names, world.sum(self.values.clone()).tolist(), strict=True))

    def zero(self) -> None:
        self.values.zero_()

    def gather(self, world: World) -> torch.Tensor:
        """Every rank's own sums, [world_size, names]."""
        rows = self.values.new_zeros(world.world_size, len(self.names))
        rows[world.rank] = self.values
        return world.sum(rows)

    def scatter(self, rows: torch.Tensor, world: World) -> None:
        """Take this rank's row; if the number of ranks has changed, rank 0 takes all."""
        if len(rows) == world.world_size:
            self.values.copy_(rows[world.rank])
        elif world.is_main:
            self.values.copy_(rows.sum(0))


def require_finite(value: float, update: int, name: str = "training loss") -> None:
    """Raise UserError where the metric `name` is NaN or infinite."""
    if not math.isfinite(value):
        raise _diverged(f"the {name} is {value}", update)


def require_finite_weights(model: torch.nn.Module, world: World, update: int) -> None:
    """Raise UserError on every rank where any rank's weight or buffer is NaN or infinite."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    flags = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]) if tensors else torch.ones(1)
    if world.max(int(not flags.all())):
        ruined = next((name for name, fine in zip(tensors, flags.tolist(), strict=True) if not fine), "another rank's")
        raise _diverged(f"{ruined} holds weights that are not finite", update)


def _diverged(what: str, update: int) -> UserError:
    return UserError(
        f"{what} at update {update}: {DIVERGED}; lower optimizer.lr, lengthen schedule.warmup_updates, or "
        "use a wider precision. Checkpoints saved before this are kept"
    )
