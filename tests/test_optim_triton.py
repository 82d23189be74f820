"""The Triton kernels on the CPU, in Triton's interpreter: the same programs, run by numpy, without a GPU.

The interpreter has to be chosen before Triton is imported, so the cases run in a process of their own, which gives the
golden errors of every case as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 12
SCRIPT = """
import json
import math

import torch
from golden_trajectories import APOLLO, errors, follow, load
from torch import nn

import optim.apollo
from optim import Apollo, fused_cuda

# Chunks of a few blocks, so that the small golden tensors take several, the last one not full.
fused_cuda.CHUNK, fused_cuda.BLOCK, fused_cuda.JOIN = 32, 16, 1
optim.apollo._implementation = lambda *_: fused_cuda._fused_cuda_apollo

results = {}
for name in APOLLO:
    golden = load(name)
    trajectory = follow(golden, lambda params: Apollo(params, **golden.settings), torch.float32, steps=STEPS)
    results[name] = float(errors(golden, trajectory).max())


def train(dtype=torch.float32, fused=True, scale=None, lr=0.1, found=(), **settings):
    chosen = fused_cuda._fused_cuda_apollo if fused else optim.apollo._single_tensor_apollo
    optim.apollo._implementation = lambda *_: chosen
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=draw).to(dtype)) for n in (50, 5, 0)]
    optimizer = Apollo(params, lr=lr, warmup=2, init_lr=0.01, **settings)
    for step in range(4):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw).to(dtype) * (scale or 1)
        if fused and scale:
            optimizer.grad_scale = torch.tensor(float(scale))
        if fused:
            optimizer.found_inf = torch.tensor(float(step in found))
        if fused or step not in found:
            if not fused and scale:
                for param in params:
                    param.grad /= scale
            optimizer.step()
    state = optimizer.state[params[0]]
    return torch.cat([x.detach().double().view(-1) for x in (*params, state["direction"], state["step"])])


def differ(dtype=torch.float32, **settings):
    expected = train(dtype, fused=False, **settings)
    return float((train(dtype, **settings) - expected).abs().max() / expected.abs().max())


results["bfloat16"] = differ(torch.bfloat16, weight_decay=0.01)
results["float16 stable"] = differ(torch.float16, weight_decay=0.01, weight_decay_type="stable")
results["scaled"] = differ(scale=1024.0, weight_decay=0.01, rebound="belief")
results["skipped"] = differ(found=(0, 3), rebound="belief")
results["skipped stable"] = differ(found=(2,), weight_decay=0.01, weight_decay_type="stable", maximize=True)
results["tensor lr"] = differ(lr=torch.tensor(0.1), capturable=True)
results["repeated"] = float((train(weight_decay=0.01) - train(weight_decay=0.01)).abs().max())
print(json.dumps(results))
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def results() -> dict[str, float]:
    pytest.importorskip("triton")
    tests = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_golden(results):
    golden = {name: error for name, error in results.items() if name.startswith("apollo")}
    assert len(golden) == 7 and max(golden.values()) < 1e-4, golden


@pytest.mark.parametrize("case", ["scaled", "skipped", "skipped stable", "tensor lr"])
def test_agrees_with_the_single_tensor_step(results, case):
    assert results[case] < 1e-5


@pytest.mark.parametrize(("case", "bound"), [("bfloat16", 2**-5), ("float16 stable", 2**-8)])
def test_half_precision(results, case, bound):
    """A few roundings of difference in four steps, each a half unit of 8 or 11 bits."""
    assert results[case] <= bound


def test_repeats_itself(results):
    assert results["repeated"] == 0
