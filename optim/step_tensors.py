"""The tensors of one step as parallel lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from .sharded import ProcessGroups, any_sharded, local_shard, process_groups


@dataclass
class StepTensors:
    """Entry i of every list belongs to parameter i. State and gradients have its shape.

    State has `checks.state_dtype`. `sigmas` are 0-d of this dtype. `steps` are 0-d float32, on the CPU or on the
    parameter's device.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor | None]  # m, None where it is d * D; in a step all are None or none is
    hessians: list[Tensor]  # B
    directions: list[Tensor]  # d
    sigmas: list[Tensor | None]  # the bound of D in the last step, only for rebound "belief"
    steps: list[Tensor]  # t
    numels: list[int] = field(default_factory=list)  # elements of the parameter, over all ranks
    shards: list[ProcessGroups] = field(default_factory=list)  # the ranks that share a parameter, () for a whole one

    kept: dict[str, Any] = field(default_factory=dict)  # what a step keeps while only gradients change

    def part(self, indices: Sequence[int]) -> "StepTensors":
        return StepTensors(*[[column[i] for i in indices] for column in (*self.tensors, self.numels, self.shards)])

    @property
    def tensors(self) -> tuple[list, ...]:
        return self.params, self.grads, self.exp_avgs, self.hessians, self.directions, self.sigmas, self.steps

    @property
    def stores_average(self) -> bool:
        return self.exp_avgs[0] is not None

    @property
    def states(self) -> list[list[Tensor]]:
        return [self.hessians, self.directions, *([self.exp_avgs] if self.stores_average else [])]

    def local(self) -> "StepTensors":
        """This rank's part of each tensor, with numels and shards."""
        numels = list(map(Tensor.numel, self.params))
        if not any_sharded(self.params):
            # torch.compile of torch 2.6 does not know `replace`.
            return StepTensors(*self.tensors, numels, [()] * len(numels))
        return replace(
            self,
            params=[local_shard(x) for x in self.params],
            grads=[local_shard(grad, like=param) for grad, param in zip(self.grads, self.params, strict=True)],
            exp_avgs=[None if x is None else local_shard(x) for x in self.exp_avgs],
            hessians=[local_shard(x) for x in self.hessians],
            directions=[local_shard(x) for x in self.directions],
            numels=numels,
            shards=[process_groups(x) for x in self.params],
        )
