"""The Triton kernels without a GPU: run by numpy, in Triton's interpreter, and compiled for GPUs that are not there.

The interpreter must be chosen before Triton is imported, so the cases run in their own process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 12
OLD_INTERPRETER = "only 0-dimensional arrays can be converted to Python scalars"
SCRIPT = """
import json
import math

import torch
from golden_trajectories import APOLLO, errors, follow, load
from torch import nn

import optim.dispatch
from optim import Apollo
from optim.fused import cuda as fused_cuda

# Chunks of a few blocks, so that the small golden tensors take several, the last one not full.
fused_cuda.CHUNK, fused_cuda.BLOCK, fused_cuda.JOIN = 32, 16, 1
optim.dispatch._implementation = lambda *_: fused_cuda._fused_cuda_apollo

results = {}
for name in APOLLO:
    golden = load(name)
    trajectory = follow(golden, lambda params: Apollo(params, **golden.settings), torch.float32, steps=STEPS)
    results[name] = float(errors(golden, trajectory).max())


def train(dtype=torch.float32, fused=True, scale=None, lr=0.1, found=(), between=lambda params: None, **settings):
    chosen = fused_cuda._fused_cuda_apollo if fused else optim.dispatch._single_tensor_apollo
    optim.dispatch._implementation = lambda *_: chosen
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
        with torch.no_grad():
            between(params)
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
results["weights written"] = differ(weight_decay=0.01, between=lambda params: params[0].mul_(0.5))


def forget(_):
    fused_cuda._carried._left.clear()


def spoil(_):
    for _, sums in fused_cuda._carried._left.values():
        sums.zero_()


for name, settings in {
    "L2": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "weight_decay_type": "decoupled", "found": (1,)},
    "bfloat16": {"weight_decay": 0.1, "dtype": torch.bfloat16},
}.items():
    going_on = train(**settings)
    results[f"anew {name}"] = float((train(between=forget, **settings) - going_on).abs().max())
    results[f"spoilt {name}"] = float((train(between=spoil, **settings) - going_on).abs().max())
results["repeated"] = float((train(weight_decay=0.01) - train(weight_decay=0.01)).abs().max())
print(json.dumps(results))
""".replace("STEPS", str(STEPS))


@pytest.fixture(scope="module")
def results() -> dict[str, float]:
    pytest.importorskip("triton")
    tests = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=500)
    if OLD_INTERPRETER in done.stderr:
        pytest.skip("the interpreter of Triton 3.2 (torch 2.6) needs numpy < 2.4")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_golden(results):
    golden = {name: error for name, error in results.items() if name.startswith("apollo")}
    assert len(golden) == 7 and max(golden.values()) < 1e-4, golden


@pytest.mark.parametrize("case", ["scaled", "skipped", "skipped stable", "tensor lr", "weights written"])
def test_agrees_with_the_single_tensor_step(results, case):
    assert results[case] < 1e-5


@pytest.mark.parametrize(("case", "bound"), [("bfloat16", 2**-5), ("float16 stable", 2**-8)])
def test_half_precision(results, case, bound):
    """Four steps may differ by a few roundings, each half a unit of 8 or 11 bits."""
    assert results[case] <= bound


def test_repeats_itself(results):
    assert results["repeated"] == 0


@pytest.mark.parametrize("case", ["L2", "decoupled", "bfloat16"])
def test_sums_carried_and_taken_anew_are_the_same_bits(results, case):
    assert results[f"anew {case}"] == 0
    assert results[f"spoilt {case}"] > 0, "no sums were carried"


# Types of the kernels' arguments by name; what is not here is a float.
TYPES = {"table": "*i64", "chunks": "*i64", "partials": "*fp64", "sums": "*fp64", "scalars": "*fp32", "warmup": "i32"}


def compiled(kernel, capability: int, types: dict[str, str | None], constants: dict) -> dict:
    """A kernel compiled by Triton for an NVIDIA GPU of this compute capability: its "ptx", its "cubin", ..."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**TYPES, **types}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    constants |= {name: None for name in kernel.arg_names if types.get(name, "") is None}
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ["plain", "L2", "decoupled", "stable", "belief"])
def test_compiles_for_gpus(monkeypatch, tmp_path, capability, dtype, case):
    """Triton's compiler and NVIDIA's assembler take every kernel. float32 is read and written 16 bytes at a time."""
    pytest.importorskip("triton", minversion="3.4")  # before, its compiler was called otherwise
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton.language as tl

    from optim.fused import cuda as fused_cuda
    from optim.fused import triton_kernels

    stable, belief = case == "stable", case == "belief"
    scaled = stable or belief  # the cases with a gradient scaler, a learning rate on the device, and shards
    pointer = "*fp32" if scaled else None
    types = {"grad_scale": pointer, "found_inf": pointer, "lr": pointer or "fp32"}
    constants = {name: getattr(fused_cuda, name) for name in ("CHUNK", "BLOCK", "JOIN")}
    constants |= {"P": getattr(tl, dtype), "L2": case in ("L2", "belief"), "STORED": case in ("decoupled", "stable")}
    constants |= {"STABLE": stable, "BELIEF": belief, "CARRIED": not scaled, "CARRY": not scaled, "ALIGNED": True}
    constants |= {"GRAD_ALIGNED": True}
    constants |= {"SCALED": scaled, "FOUND_INF": scaled, "LR_TENSOR": scaled, "SHARDED": scaled}
    for name in ("sum_chunks", "join_chunks", "make_scalars", "update_chunks", "make_stable_decay", "direct_chunks"):
        asm = compiled(getattr(triton_kernels, name), capability, types, constants)
        assert len(asm["cubin"]) > 1000
        if dtype == "float32" and name in ("sum_chunks", "update_chunks"):
            read = 4 if name == "update_chunks" else 2  # tensors, at least
            assert asm["ptx"].count("ld.global.v4") >= read
            assert name == "sum_chunks" or asm["ptx"].count("st.global.v4") >= 2


def test_gradients_that_are_not_aligned_leave_the_others_their_wide_loads(monkeypatch, tmp_path):
    pytest.importorskip("triton", minversion="3.4")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton.language as tl

    from optim.fused import triton_kernels

    constants = {"P": tl.float32, "CHUNK": 16384, "BLOCK": 1024, "ALIGNED": True}
    constants |= dict.fromkeys(("L2", "STORED", "STABLE", "BELIEF", "CARRIED", "CARRY", "SCALED", "FOUND_INF"), False)
    pointers = {"grad_scale": None, "found_inf": None}
    for kernel, tensors in (("sum_chunks", 3), ("update_chunks", 4)):  # read: g, B, d, and in the update p
        wide = [
            compiled(getattr(triton_kernels, kernel), 90, pointers, constants | {"GRAD_ALIGNED": aligned})["ptx"].count(
                "ld.global.v4"
            )
            for aligned in (True, False)
        ]
        assert wide[0] >= tensors and wide[1] == wide[0] * (tensors - 1) // tensors
