"""Two ranks with a sharded model or sharded state take the same steps as one process."""

import os
import subprocess
import sys
from pathlib import Path

import optim_ranks
import pytest
import torch


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    repository = Path(__file__).parent.parent
    command = [sys.executable, str(Path(optim_ranks.__file__)), str(folder)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0, output
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("task", optim_ranks.ALL_TASKS)
def test_two_ranks_take_the_step_of_one(results, task):
    if task not in optim_ranks.TASKS:
        pytest.skip("torch 2.6's own FSDP2 fails on the CPU")
    alone = optim_ranks.alone(task)
    assert results[task].keys() == alone.keys()
    for name, param in alone.items():
        torch.testing.assert_close(results[task][name], param, rtol=1e-5, atol=1e-6)
