"""Apollo's sums over parameters that are sharded (FSDP2, tensor parallelism: torch's DTensor).

Each rank steps over its shard. All-reduces of one small array join the sums for the whole list, so any number of ranks
takes the same step.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# A group of ranks for each sharded dimension of the mesh, none if a tensor is whole.
ProcessGroups = tuple[Any, ...]


def any_sharded(tensors: list[Tensor]) -> bool:
    """Whether a DTensor is among `tensors`. DTensor is not imported here: its import is slow."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def local_shard(x: Tensor, like: Tensor | None = None) -> Tensor:
    """This rank's part of x, in x's memory."""
    if not any_sharded([x]):
        return x
    if like is not None and x.placements != like.placements:
        x = x.redistribute(placements=like.placements)
    return x.to_local()


def process_groups(param: Tensor) -> ProcessGroups:
    if not any_sharded([param]):
        return ()
    mesh = param.device_mesh
    return tuple(mesh.get_group(i) for i, placement in enumerate(param.placements) if not placement.is_replicate())


def join_sums(sums: Tensor, shards: list[ProcessGroups], largest: bool = False) -> None:
    """Replaces the rows of `sums` [n, k], one for each tensor, by their sums (or maxima) over the ranks."""
    op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
    for groups in dict.fromkeys(shards):
        if not groups:
            continue
        rows = [i for i, other in enumerate(shards) if other == groups]
        everything = len(rows) == len(shards)
        joined = sums.clone(memory_format=torch.contiguous_format) if everything else sums[rows]
        for group in groups:
            dist.all_reduce(joined, op, group)
        if everything:
            sums.copy_(joined)
        else:
            sums[rows] = joined


def join(x: Tensor, groups: ProcessGroups, largest: bool = False) -> Tensor:
    """The sum (or maximum) of a 0-d tensor over the ranks, in place."""
    if groups:
        join_sums(x.view(1, 1), [groups], largest)
    return x
