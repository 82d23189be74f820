"""The program of each rank of tests/test_optim_distributed.py: `python optim_ranks.py FOLDER RANK WORLD_SIZE`.

Every task trains the same small model on the same gradients.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from optim import Apollo, create_optimizer

STEPS = 6
ALL_TASKS = [
    "fsdp single",
    "fsdp single belief stable",
    "fsdp foreach",
    "fsdp foreach belief stable",
    "fsdp foreach decoupled",
    "fsdp fused",
    "fsdp fused belief stable",
    "fsdp fused decoupled",
    "zero single",
    "zero fused decoupled",
]
# torch 2.6's FSDP2 fails on the CPU: 'Stream' object has no attribute 'record_event'.
FSDP_WORKS = not torch.__version__.startswith("2.6.")
TASKS = [task for task in ALL_TASKS if FSDP_WORKS or not task.startswith("fsdp")]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Linear(3, 1, bias=False))


def loss(network: nn.Module, step: int) -> torch.Tensor:
    """The same on every rank, so that the average of the ranks' gradients is the gradient of one rank."""
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 5, generator=draw), torch.randn(8, 1, generator=draw)
    return (network(x) - y).square().mean()


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(STEPS)) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(network, step).backward()
        optimizer.step()


def settings(task: str) -> dict:
    words = task.split()
    decay = next((word for word in words if word in ("L2", "decoupled", "stable")), "L2")
    path = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[words[1]]
    rebound = "belief" if "belief" in words else "constant"
    return {"lr": 0.1, "warmup": 2, "weight_decay": 0.01, "weight_decay_type": decay, "rebound": rebound, **path}


def fsdp(task: str) -> dict[str, torch.Tensor]:
    """FSDP2 over all ranks. After half of the steps the state is saved and loaded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = model()
    fully_shard(network, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = Apollo(network.parameters(), **settings(task))
    train(network, optimizer, range(3))
    resumed = Apollo(network.parameters(), **settings(task))
    resumed.load_state_dict(optimizer.state_dict())
    train(network, resumed, range(3, STEPS))
    state = resumed.state[next(network.parameters())]
    assert type(state["direction"]) is type(next(network.parameters())), "the state is not sharded"
    return {name: param.full_tensor() for name, param in network.named_parameters()}


def zero(task: str) -> dict[str, torch.Tensor]:
    """ZeroRedundancyOptimizer: each rank has the state of some parameters. It is saved and loaded half-way."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    network = nn.parallel.DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(network.parameters(), Apollo, **settings(task))
    train(network, optimizer, range(3))
    optimizer.consolidate_state_dict(to=0)
    states = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(states)
    resumed = ZeroRedundancyOptimizer(network.parameters(), Apollo, **settings(task))
    resumed.load_state_dict(states[0])
    train(network, resumed, range(3, STEPS))
    held = sum(x.numel() for state in resumed.optim.state.values() for x in state.values())
    assert held < sum(2 * p.numel() for p in network.parameters()), "every rank has all of the state"
    return {name.removeprefix("module."): param.detach() for name, param in network.named_parameters()}


def alone(task: str) -> dict[str, torch.Tensor]:
    network = model()
    train(network, create_optimizer("apollo", network.parameters(), **settings(task)))
    return {name: param.detach() for name, param in network.named_parameters()}


if __name__ == "__main__":
    folder, rank, world_size = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {task: {"fsdp": fsdp, "zero": zero}[task.split()[0]](task) for task in TASKS}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()
