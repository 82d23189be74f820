"""One process or many: reads torchrun's environment, picks nccl or gloo, and counts things once over all ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm

import torch
import torch.distributed as dist

from engine.errors import UserError


@dataclass(frozen=True)
class World:
    """This process's place among all ranks. With one process every method is the identity."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        """The largest `value` of any rank, on every rank: how they agree to stop or to save."""
        if self.world_size == 1:
            return value
        box = torch.tensor(value, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box.item())

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do: it downloads or makes what they then find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def synchronize(self) -> None:
        """Wait until the device has done everything given to it, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def copy_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank rank 0's buffers (BatchNorm statistics differ by rank), so that all evaluate one model."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def require_divisible(self, batch: int, passes: int) -> None:
        """Raise UserError where the ranks cannot divide the `passes` (of `batch` each) of an update equally.

        Rank r takes the passes r, r + world_size, ...
        """
        if passes % self.world_size:
            divided = divide(batch, passes, self.world_size)
            other = "batch={} passes={} is an update of the same size".format(*divided) if divided else "start fewer"
            raise UserError(f"passes={passes} cannot be divided among {self.world_size} ranks; {other}")

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def divide(batch: int, passes: int, ranks: int) -> tuple[int, int] | None:
    """(batch, passes) of an update of the same size, in the fewest passes that `ranks` divide; None: there is none."""
    more = lcm(passes, ranks)
    return None if batch * passes % more else (batch * passes // more, more)


def setup(device: str = "auto") -> World:
    """Join the process group if torchrun started us (WORLD_SIZE is set), and choose this rank's device.

    `device`: auto (cuda where there is one), cpu or cuda. Raises UserError where cuda is asked for and missing.
    """
    rank, world_size, local_rank = (int(os.environ.get(name, d)) for name, d in _TORCHRUN)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(
                f"device=cuda: local rank {local_rank} needs a GPU of its own, and {found} are visible here"
            )
        torch.cuda.set_device(local_rank)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    place = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    return World(rank, world_size, local_rank, place)


_TORCHRUN = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
