"""The fused CPU step: conversions, threads, carried sums, zeros, and machines without a compiler."""

import copy
import ctypes
import math
import warnings

import pytest
import torch
from optim_cases import PATHS, variants
from optim_steps import clones, random_parameters, step_together
from torch import nn

from optim import Apollo
from optim.apollo_reference import LiteralApollo
from optim.fused import cpu as fused_cpu
from optim.native import compile_library

LARGER = ((fused_cpu.LARGE + 5,), (30, 50), (2, fused_cpu.LARGE))  # two of them carry sums from step to step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_converts_as_torch_does(dtype):
    """One step from zero, p = -lr * g, reads every finite half-precision number and writes multiples of it."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    grad = every[every.isfinite()]
    for lr in (1.0, 1.1, 0.3, 0.01, 3.0):
        param = nn.Parameter(torch.zeros_like(grad))
        param.grad = grad.clone()
        Apollo([param], lr=lr, warmup=0, fused=True).step()
        assert torch.equal(param, (0 - torch.tensor(lr) * grad.float()).to(dtype))


def test_fused_takes_any_number_of_threads():
    shapes = ((300_001,), (65_537,), (7,), (512, 300))
    finals = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            params = random_parameters(shapes)
            step_together((Apollo(params, lr=0.1, weight_decay=1e-3, fused=True), params), steps=4)
            finals.append(params)
    finally:
        torch.set_num_threads(threads)
    for x, y, z in zip(*finals, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@variants
def test_fused_on_large_tensors(variant):
    """Tensors of many chunks and waves take another path through the kernel."""
    shapes = ((300_001,), (5,), (65_536,), (65_537,), (0,), ())
    literal, params = random_parameters(shapes, torch.float64), random_parameters(shapes, torch.float64)
    optimizers = LiteralApollo(literal, **variant), Apollo(params, **variant, fused=True)
    step_together((optimizers[0], literal), (optimizers[1], params), steps=3)
    for x, y in zip(literal, params, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_memory_format_may_change_between_steps():
    params = [nn.Parameter(torch.randn(2, 3, 4, 5))]
    others = clones(params)
    optimizers = Apollo(params, lr=0.1, fused=True), Apollo(others, lr=0.1, foreach=False)
    step_together(*zip(optimizers, (params, others), strict=True), steps=2)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    params[0].grad = None
    step_together(*zip(optimizers, (params, others), strict=True), steps=2)
    torch.testing.assert_close(params[0].detach(), others[0].detach())
    assert optimizers[0].state[params[0]]["hessian"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 1e-2}, {"weight_decay": 1e-2, "rebound": "belief"}])
@pytest.mark.parametrize(
    "meanwhile", ["nothing", "a resume", "new weights", "new state", "other memory", "foreach", "another sigma"]
)
def test_carried_sums(settings, meanwhile):
    """The fused step takes a large tensor's sums from its last step, unless the tensor was written to since."""
    settings = {"lr": 0.1, "warmup": 0, **settings}
    params, twins = (random_parameters(LARGER, torch.float64) for _ in range(2))
    pairs = [[Apollo(params, fused=True, **settings), params], [Apollo(twins, foreach=False, **settings), twins]]
    step_together(*pairs, steps=3)
    for k, (optimizer, mine) in enumerate(pairs):
        large, state = mine[0], optimizer.state[mine[0]]
        with torch.no_grad():
            if meanwhile == "a resume":
                pairs[k][0] = Apollo(mine, lr=0.1)
                pairs[k][0].load_state_dict(copy.deepcopy(optimizer.state_dict()))
            elif meanwhile == "new weights":
                large.copy_(torch.linspace(-1, 1, large.numel()))
            elif meanwhile == "new state":
                state["direction"].mul_(0.5)
            elif meanwhile == "other memory":
                large.data = torch.linspace(-1, 1, large.numel(), dtype=torch.float64)
            elif meanwhile == "another sigma":
                optimizer.param_groups[0]["sigma"] = 0.5
            elif meanwhile == "foreach":
                optimizer.param_groups[0].update(fused=False, foreach=True)
    step_together(*pairs, steps=1)
    pairs[0][0].param_groups[0].update(fused=True, foreach=None)
    step_together(*pairs, steps=2)
    for x, y in zip(params, twins, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings", [{"weight_decay": 1e-2}, {"rebound": "belief"}, {"weight_decay_type": "decoupled"}]
)
def test_sums_carried_and_taken_anew_are_the_same_bits(dtype, settings):
    settings = {"lr": 0.1, "warmup": 0, "weight_decay": 1e-2, "fused": True, **settings}
    going_on, resumed = (random_parameters(LARGER, dtype) for _ in range(2))
    pairs = [(Apollo(going_on, **settings), going_on), (Apollo(resumed, **settings), resumed)]
    for _ in range(5):
        step_together(*pairs, steps=1)
        again = Apollo(resumed, **settings)
        again.load_state_dict(pairs[1][0].state_dict())
        pairs[1] = again, resumed
    assert all(torch.equal(x, y) for x, y in zip(going_on, resumed, strict=True))


@pytest.mark.parametrize("carry_sums", [True, False])
def test_writes_that_autograd_does_not_see(carry_sums):
    """Writes through `.data` need carry_sums=False."""
    settings = {"lr": 0.1, "warmup": 0, "weight_decay": 0.1}
    params, twins = random_parameters(LARGER), random_parameters(LARGER)
    ours = Apollo(params, fused=True, carry_sums=carry_sums, **settings), params
    theirs = Apollo(twins, foreach=False, **settings), twins
    step_together(ours, theirs, steps=3)
    for mine in (params, twins):
        mine[0].data.mul_(-1)
    step_together(ours, theirs, steps=2)
    assert torch.allclose(params[0], twins[0], rtol=1e-3, atol=1e-4) is not carry_sums


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_gradients_that_are_mostly_zero(dtype, decay):
    """As an embedding's gradients: the fused step does not read what is multiplied by zeros."""
    settings = {"lr": 0.1, "warmup": 0, "weight_decay": decay}
    shape, rows = (5_000, 60), ([0, 4_000], [3_999], [], [1_111, 1_112, 4_999], [2_500])
    params, twins, copies = (random_parameters((shape, (40, 60)), dtype) for _ in range(3))
    pairs = [(Apollo(params, fused=True, **settings), params), (Apollo(twins, foreach=False, **settings), twins)]
    pairs += [(Apollo(copies, fused=True, **settings), copies)]
    generator = torch.Generator().manual_seed(0)
    for touched in rows:
        grads = [torch.zeros(x.shape, dtype=dtype) for x in params]
        for grad in grads:
            here = [row for row in touched if row < len(grad)]
            grad[here] = torch.randn(len(here), 60, generator=generator).to(dtype)
        for optimizer, mine in pairs:
            for x, grad in zip(mine, grads, strict=True):
                x.grad = grad.clone() if mine is not copies else torch.where(grad == 0, -grad, grad)  # -0.0 is a zero
            optimizer.step()
    bound = {"rtol": 1e-10, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 2e-2, "atol": 1e-3}
    for x, y, z in zip(params, twins, copies, strict=True):
        assert torch.equal(x, z)
        torch.testing.assert_close(x, y, **bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_without_gradients_ends_at_zero(dtype):
    """It shrinks by beta = 0.5 a step, to zero and not to subnormal numbers. Then the parameter does not change."""
    param, twin = random_parameters(((1000,),), dtype)[0], random_parameters(((1000,),), dtype)[0]
    optimizer, single = (
        Apollo([x], lr=0.1, beta=0.5, warmup=0, **how) for x, how in ((param, {"fused": True}), (twin, PATHS["single"]))
    )
    step_together((optimizer, [param]), (single, [twin]), steps=2)
    direction = optimizer.state[param]["direction"]
    least, steps = torch.finfo(dtype).tiny, 0
    param.grad, twin.grad = torch.zeros_like(param), torch.zeros_like(twin)
    while direction.any():
        assert direction[direction != 0].abs().min() >= least
        optimizer.step(), single.step()
        steps += 1
    assert -math.log2(least) / 2 < steps < -math.log2(least) + 20
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param]["step"] == steps + 3
    torch.testing.assert_close(param, twin)


def test_default_path_is_fused():
    params = random_parameters()
    default, explicit = random_parameters(), random_parameters()
    step_together((Apollo(params, lr=0.1, fused=True), params), (Apollo(default, lr=0.1), default), steps=4)
    assert all(torch.equal(x, y) for x, y in zip(params, default, strict=True))
    assert fused_cpu.library() is not None, "no compiler here, so nothing was tested"
    step_together((Apollo(explicit, lr=0.1, fused=False), explicit), steps=4)


def test_without_a_compiler_one_warning_and_foreach(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    fused_cpu.library.cache_clear()
    try:
        params, others = random_parameters(), random_parameters()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step_together((Apollo(params, lr=0.1, fused=True), params), (Apollo(others, lr=0.1), others), steps=3)
        messages = [str(w.message) for w in caught if "Apollo takes the slower foreach step" in str(w.message)]
        assert len(messages) == 1 and "no-such-compiler" in messages[0] and "\n" not in messages[0]
        foreach = random_parameters()
        step_together((Apollo(foreach, lr=0.1, foreach=True), foreach), steps=3)
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(params, others, foreach, strict=True))
    finally:
        fused_cpu.library.cache_clear()


def test_a_build_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    built = compile_library(fused_cpu.SOURCE)
    assert built.is_relative_to(tmp_path) and ctypes.CDLL(str(built)).apollo_step
    written = built.stat().st_mtime_ns
    assert compile_library(fused_cpu.SOURCE) == built and built.stat().st_mtime_ns == written
    assert [path.name for path in built.parent.iterdir()] == [built.name]
