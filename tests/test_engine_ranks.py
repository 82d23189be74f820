"""What several ranks do together: two processes with gloo stand in for two GPUs."""

import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from training_runs import PATIENCE_S, SERVER, places

from engine.distributed import World, setup
from engine.interrupt import AGREE_EVERY, Agreement, StopRequest, Wish
from engine.precision import Precision

RANKS = 2


def on_ranks(task: Callable[[World], Any], **environment: str) -> list[Any]:
    """What `task`, a function of a module, returns on each rank."""
    started = []
    for place in places(RANKS):
        ours, theirs = SERVER.Pipe()
        started.append((SERVER.Process(target=_rank, args=(task, place | environment, theirs)), ours))
        started[-1][0].start()
        theirs.close()
    try:
        return [ours.recv() for _, ours in started]  # EOFError where a rank has failed
    finally:
        for process, _ in started:
            process.join(PATIENCE_S)


def _rank(task: Callable[[World], Any], place: dict[str, str], results: Any) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    world = setup("cpu")
    results.send(task(world))
    world.barrier()
    world.close()


def _highest(world: World) -> int:
    return world.max(world.rank)


def test_ranks_that_another_program_than_torchrun_has_started_meet():
    """One that names the machines, as torchrun does, and does not count attempts."""
    assert on_ranks(_highest, GROUP_WORLD_SIZE="1") == [RANKS - 1] * RANKS


def _wait_for_rank_0(world: World) -> list[str]:
    _set_pg_timeout(timedelta(seconds=2))  # of the group whose collectives exchange gradients
    with world.main_first():
        if world.is_main:
            time.sleep(5)
    return ["done"]


def test_a_rank_waits_longer_for_rank_0_than_collectives_may_take():
    """Here a collective may take two seconds, and rank 0 needs five for what it does first."""
    assert on_ranks(_wait_for_rank_0) == [["done"]] * RANKS


def _agreed(world: World) -> list[tuple[int, Wish]]:
    """The updates after which something is agreed on, by rank 0's saves and then a signal to rank 1."""
    stop = StopRequest()
    agreement, found = Agreement(world, stop), []
    for update in range(1, 100):
        if update == 42 and not world.is_main:
            stop.signal = 15
        is_due = 3 <= update < 20 if world.is_main else update == 31
        found.append((update, agreement.after(update, is_due)))
        if found[-1][1] == Wish.STOP:
            break
    return [pair for pair in found if pair[1] != Wish.GO_ON]


def test_the_ranks_agree_at_the_same_updates():
    """Only rank 0's wish to save counts, and it counts once; a signal counts on any rank, ten updates later at most."""
    first, second = on_ranks(_agreed)
    assert first == second
    assert first[:-1] == [(2 * AGREE_EVERY, Wish.SAVE), (4 * AGREE_EVERY, Wish.SAVE)]
    assert first[-1][1] == Wish.STOP and 42 < first[-1][0] <= 42 + 2 * AGREE_EVERY


def _data_parallel(world: World) -> dict[str, Any]:
    """One update of two passes, with a BatchNorm whose inputs differ by rank."""
    warnings.simplefilter("error")  # torch has renamed the argument that says whether buffers are sent
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    network = Precision("fp32", world.device).data_parallel(model, world.device)
    inputs = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1 + world.rank))
    for _ in range(2):  # DDP arranges its buckets after the first update
        model.zero_grad()
        with network.no_sync():
            network(inputs[0]).square().sum().backward()
        (network(inputs[1]) * inputs[1].sum()).sum().backward()
    return {
        "storages": len({parameter.grad.untyped_storage().data_ptr() for parameter in model.parameters()}),
        "gradient": torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).tolist(),
        "mean": model[1].running_mean.tolist(),
    }


def test_gradients_lie_in_the_buckets_and_buffers_stay_with_their_rank():
    first, second = on_ranks(_data_parallel)
    assert first["storages"] == second["storages"] == 1
    assert first["gradient"] == second["gradient"]
    assert first["mean"] != second["mean"], "the ranks have exchanged BatchNorm's statistics, which nobody uses"
