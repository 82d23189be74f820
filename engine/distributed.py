"""Reads torchrun's environment, picks nccl or gloo, and connects the ranks."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import lcm

import torch
import torch.distributed as dist

from engine.errors import UserError

# How long a rank waits for another's host, which may be downloading or writing a large checkpoint. If a rank dies, its
# connections close, and the others learn it at once.
PATIENCE = timedelta(days=1)
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")  # where the ranks meet


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None  # gloo: several hosts agree without their devices

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add up `tensor` over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, value: int) -> int:
        box = torch.tensor(value)
        if work := self.begin_max(box):
            work.wait()
        return int(box)

    def begin_max(self, box: torch.Tensor) -> dist.Work | None:
        """Begin to put the largest value of any rank into `box`, on the CPU; None with one process."""
        if self.world_size == 1:
            return None
        return dist.all_reduce(box, dist.ReduceOp.MAX, group=self.hosts, async_op=True)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.hosts)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block first: it downloads or makes what the others then find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def copy_buffers(self, model: torch.nn.Module) -> None:
        """Give every rank rank 0's buffers for an evaluation: BatchNorm statistics differ."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def require_divisible(self, batch: int, passes: int) -> None:
        """Raise UserError where the ranks cannot divide an update's `passes` (of `batch` each) equally.

        Rank r takes passes r, r + world_size, ...
        """
        if passes % self.world_size:
            divided = divide(batch, passes, self.world_size)
            other = "batch={} passes={} is an update of the same size".format(*divided) if divided else "start fewer"
            raise UserError(f"passes={passes} cannot be divided among {self.world_size} ranks; {other}")

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def divide(batch: int, passes: int, ranks: int) -> tuple[int, int] | None:
    """(batch, passes) of an equal update, in the fewest passes that `ranks` can divide, or None."""
    more = lcm(passes, ranks)
    return None if batch * passes % more else (batch * passes // more, more)


def setup(device: str = "auto", deterministic: bool = False) -> World:
    """Join torchrun's process group, if any (WORLD_SIZE is set), and choose this rank's device.

    `device`: auto (cuda where there is one), cpu or cuda. Raises UserError where cuda is missing, or the environment
    makes no sense.
    """
    if deterministic:
        use_deterministic_algorithms()
    rank, world_size, local_rank = read_environment()
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
        try:
            _join("nccl" if device == "cuda" else "gloo")
        except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
            place = ":".join(os.environ[name] for name in ADDRESS)
            raise UserError(f"rank {rank} of {world_size} cannot join the others at {place}: {error}") from error
    place = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    hosts = dist.new_group(backend="gloo", timeout=PATIENCE) if world_size > 1 else None
    return World(rank, world_size, local_rank, place, hosts)


def _join(backend: str) -> None:
    """Join the process group of torchrun's environment.

    When a rank has died, torchrun restarts all on the same store (seen with torch 2.14). A rank that reads a dead one's
    address there waits in vain, so each attempt gets its own keys. Several machines count attempts separately: there
    the keys stay shared.
    """
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store, rank, world_size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend)


def read_environment() -> tuple[int, int, int]:
    """Rank, number of ranks, and rank on this machine, from torchrun's variables. UserError if they make no sense."""
    world_size = _number("WORLD_SIZE", 1, range(1, 1 << 31))
    if world_size == 1:
        return 0, 1, _number("LOCAL_RANK", 0, range(1 << 31))
    if missing := [name for name in ("RANK", *ADDRESS) if name not in os.environ]:
        raise UserError(
            f"the environment has WORLD_SIZE={world_size} and no {' nor '.join(missing)}: start with torchrun, which "
            "sets them all, or unset WORLD_SIZE"
        )
    _number("MASTER_PORT", 0, range(1, 1 << 16))
    rank, local_rank = (_number(name, 0, range(world_size)) for name in ("RANK", "LOCAL_RANK"))
    address = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:  # torch would try again for half an hour
        raise UserError(f"the environment has MASTER_ADDR={address!r}, which names no host: {error.strerror}") from None
    return rank, world_size, local_rank


def ranks_on_this_machine() -> int:
    """How many, as torchrun says; 1 without it. Raises UserError for what is no such number."""
    return _number("LOCAL_WORLD_SIZE", 1, range(1, 1 << 31))


def _number(name: str, default: int, valid: range) -> int:
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text[:12]) in valid):
        bounds = f"from {valid.start} to {valid.stop - 1}" if valid.stop < 1 << 31 else f"of {valid.start} or more"
        raise UserError(
            f"the environment has {name}={text!r}, where a whole number {bounds} belongs: unset it, or start with "
            "torchrun, which sets it"
        )
    return int(text)


def use_deterministic_algorithms() -> None:
    """Ask torch for algorithms that give the same bits each time; operations without one raise RuntimeError.

    Call it before a GPU computes anything: cuBLAS reads its variable at first use.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it chooses by measured speed
