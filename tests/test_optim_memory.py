"""No input that Python can make lets a step read or write outside a tensor: what does not fit raises, in every form.

A few hundred random attacks run with the suite; APOLLO_EXAMPLES=10000 runs more. benchmarks/sanitize.py runs this file
with the C++ built for AddressSanitizer, which sees what a test cannot.
"""

import contextlib
import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_cases import PATHS, VARIANTS, paths, variants
from optim_steps import random_parameters, step_together
from torch import Tensor, nn

import optim.dispatch
from optim import Apollo
from optim.apollo_reference import LiteralApollo

EXAMPLES = int(os.environ.get("APOLLO_EXAMPLES", "200"))
SHAPES = ((6, 5), (30,), (2, 3, 4, 4), (70_001,))


def trained(path: dict, variant: dict, dtype: torch.dtype = torch.float32) -> tuple[Apollo, list[nn.Parameter]]:
    params = random_parameters(SHAPES, dtype)
    optimizer = Apollo([(f"p{i}", param) for i, param in enumerate(params)], **{**variant, **path})
    set_grads(params)
    optimizer.step()
    return optimizer, params


def set_grads(params: list[nn.Parameter]) -> None:
    for param in params:
        param.grad = None
        param.grad = torch.ones_like(param)


# What is done to parameter 0 or its state between two steps, and what an error then speaks of.
RAISING = {
    "another shape": (lambda p, s: s.update(hessian=torch.zeros(4, 3)), "hessian of parameter 'p0' is .* shape"),
    "too short": (lambda p, s: s.update(direction=torch.zeros(1)), "direction of parameter 'p0' is"),
    "transposed": (lambda p, s: s.update(hessian=s["hessian"].t()), "hessian of parameter 'p0' is .* shape"),
    "another dtype": (lambda p, s: s.update(direction=s["direction"].bfloat16()), "direction of parameter 'p0' is"),
    "integers": (lambda p, s: s.update(hessian=s["hessian"].int()), "hessian of parameter 'p0' is torch.int32"),
    "another device": (lambda p, s: s.update(hessian=s["hessian"].to("meta")), "hessian of parameter 'p0' is .* meta"),
    "resized in place": (lambda p, s: s["direction"].resize_(2), "direction of parameter 'p0' is"),
    "data of another shape": (lambda p, s: setattr(s["hessian"], "data", torch.zeros(3)), "hessian of parameter 'p0'"),
    "no tensor": (lambda p, s: s.update(hessian=[0.0] * 30), "hessian of parameter 'p0' must be a tensor, not list"),
    "missing": (lambda p, s: s.pop("hessian"), "the state of parameter 'p0' has no 'hessian'"),
    "a count of integers": (lambda p, s: s.update(step=torch.tensor(1)), "step of parameter 'p0' is torch.int64"),
    "a count that is empty": (lambda p, s: s.update(step=torch.zeros(0)), "step of parameter 'p0' is"),
    "parameter of another shape": (lambda p, s: reshaped(p, torch.zeros(4)), "parameter 'p0'"),
    "parameter of another dtype": (lambda p, s: reshaped(p, p.data.double()), "parameter 'p0'"),
    "one state twice": (lambda p, s: s.update(direction=s["hessian"]), "share memory"),
    "state in the parameter": (lambda p, s: s.update(hessian=p.detach()), "share memory"),
    "state of a single number": (lambda p, s: s.update(hessian=torch.zeros(1, 1).expand(6, 5)), "share memory"),
    "parameter of a single number": (lambda p, s: reshaped(p, torch.zeros(1, 1).expand(6, 5)), "share memory"),
}


def reshaped(param: nn.Parameter, data: Tensor) -> None:
    param.grad = None
    param.data = data
    param.grad = torch.ones_like(param)


@paths
@pytest.mark.parametrize("attack", RAISING)
def test_what_does_not_fit_raises(path, attack):
    optimizer, params = trained(path, VARIANTS["L2"])
    change, message = RAISING[attack]
    change(params[0], optimizer.state[params[0]])
    others = [param.detach().clone() for param in params[1:]]
    for _ in range(2):  # and not just once
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(params[1:], others, strict=True))


@paths
def test_state_of_parameters_in_another_order(path):
    optimizer, params = trained(path, VARIANTS["plain"])
    other = Apollo(params[::-1], lr=0.5, **path)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"hessian of parameter 'p0' is .* \(6, 5\) .* not .* \(70001,\)"):
        other.step()


@paths
@variants
def test_what_fits_goes_on(path, variant):
    """Changes that torch's optimizers take are taken: other memory, another order in it, views, shared gradients."""
    settings = {"warmup": 0, **variant}
    ours, theirs = random_parameters(SHAPES, torch.float64), random_parameters(SHAPES, torch.float64)
    pairs = (Apollo(ours, **settings, **path), ours), (LiteralApollo(theirs, **settings), theirs)
    step_together(*pairs, steps=2)
    ours[0].data = ours[0].data.t().contiguous().t()
    columns = torch.zeros(30, 2, dtype=torch.float64)
    state = pairs[0][0].state[ours[1]]
    ours[1].data, state["hessian"] = columns[:, 0].copy_(ours[1].data), columns[:, 1].copy_(state["hessian"])
    state = pairs[0][0].state[ours[2]]
    state["direction"] = state["direction"].to(memory_format=torch.channels_last)
    step_together(*pairs, steps=2)
    for mine in (ours, theirs):
        for param in mine:
            param.grad = param.detach()  # of the memory that is written to
    pairs[0][0].step(), pairs[1][0].step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 200)
@given(data=st.data(), path=st.sampled_from(list(PATHS.values())), variant=st.sampled_from(list(VARIANTS.values())))
def test_random_attacks(data, path, variant):
    """After each attack a step either raises RuntimeError or leaves the memory around the optimizer's as it was."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    optimizer, params = trained(path, variant, dtype)
    for _ in range(data.draw(st.integers(1, 3))):
        param = data.draw(st.sampled_from(params))
        state = optimizer.state[param]
        name = data.draw(st.sampled_from(["param", "grad", *state]))
        target = {"param": param, "grad": param.grad}.get(name, state.get(name))
        if target is None:
            continue
        shape = data.draw(st.sampled_from([tuple(target.shape), tuple(target.shape)[::-1], (), (0,), (3,), (70_001,)]))
        kind = data.draw(st.sampled_from([target.dtype, torch.float64, torch.float32, torch.bfloat16]))
        how = data.draw(st.sampled_from(["fresh", "expanded", "strided", "meta", "another's", "resized"]))
        another = data.draw(st.sampled_from(params))
        with contextlib.suppress(RuntimeError):  # torch itself refuses some
            new = replacement(how, target, another, shape, kind)
            if name in ("param", "grad") or data.draw(st.booleans()):
                target.data = new
            else:
                state[name] = new
        around = [torch.full((64,), 3.0) for _ in range(8)]  # neighbours, where small blocks are taken from
        with contextlib.suppress(RuntimeError):
            optimizer.step()
        assert all((x == 3).all() for x in around)


def replacement(how: str, target: Tensor, another: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if how == "expanded":
        return torch.ones((), dtype=dtype).expand(shape)
    if how == "strided":
        return torch.ones(*shape, 2, dtype=dtype)[..., 0]
    if how == "another's":
        return another.data
    if how == "resized":
        return target.detach().clone().resize_(shape)
    return torch.ones(shape, dtype=dtype, device="meta" if how == "meta" else "cpu")


def test_views_that_interleave_are_not_shared_memory():
    """Every other column of one matrix: their ranges of memory meet, their elements do not."""
    whole = torch.randn(8, 6)
    params = [nn.Parameter(whole[:, ::2]), nn.Parameter(whole[:, 1::2])]
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    step_together((Apollo(params, lr=0.1), params), (Apollo(twins, lr=0.1), twins), steps=2)
    assert all(torch.allclose(x, y) for x, y in zip(params, twins, strict=True))


@paths
@variants
@pytest.mark.parametrize("warmup", [0, 100])
def test_a_learning_rate_of_zero_moves_nothing(path, variant, warmup):
    params = random_parameters()
    still = [param.detach().clone() for param in params]
    lr = torch.tensor(0.0) if path.get("capturable") else 0.0
    optimizer = Apollo(params, **{**variant, "lr": lr, "warmup": warmup, **path})
    step_together((optimizer, params), steps=3)
    assert all(torch.equal(x, y) for x, y in zip(params, still, strict=True))


@paths
@variants
def test_state_dict_helpers_resume_exactly(path, variant):
    """Those of torch.distributed.checkpoint, which take a step with lr 0 to make the state that they load into."""
    helpers = pytest.importorskip("torch.distributed.checkpoint.state_dict")

    def build() -> tuple[nn.Module, Apollo]:
        torch.manual_seed(0)
        model = nn.Linear(7, 5)
        return model, Apollo(model.parameters(), **{"warmup": 4, **variant, **path})

    def train(model: nn.Module, optimizer: Apollo, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            model(torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, range(3))
    weights, state = copy.deepcopy((model.state_dict(), helpers.get_optimizer_state_dict(model, optimizer)))
    resumed, other = build()
    resumed.load_state_dict(weights)
    helpers.set_optimizer_state_dict(resumed, other, state)
    assert torch.equal(resumed.weight, weights["weight"])
    train(model, optimizer, range(3, 6)), train(resumed, other, range(3, 6))
    assert torch.equal(model.weight, resumed.weight) and torch.equal(model.bias, resumed.bias)


def test_loading_keeps_what_belongs_to_the_process():
    """A capturable optimizer stays one, with its learning rate as a tensor where it was, whatever was saved."""
    params = random_parameters()
    plain = Apollo(params, lr=0.3)
    step_together((plain, params), steps=1)
    saved = plain.state_dict()
    del saved["param_groups"][0]["carry_sums"]  # as of a version that did not have it
    capturable = Apollo(params, lr=torch.tensor(0.5), capturable=True)
    capturable.load_state_dict(saved)
    group = capturable.param_groups[0]
    assert group["capturable"] is True and isinstance(group["lr"], Tensor) and float(group["lr"]) == pytest.approx(0.3)
    assert group["carry_sums"] is True
    plain.load_state_dict(capturable.state_dict())
    assert plain.param_groups[0]["capturable"] is False and plain.param_groups[0]["lr"] == pytest.approx(0.3)


def test_triton_that_cannot_launch_is_one_warning(monkeypatch):
    """No C compiler, no Python.h: Triton is there and raises at the first launch."""
    fused_cuda = pytest.importorskip("optim.fused.cuda")

    def refuse() -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(fused_cuda, "launch_one", refuse)
    optim.dispatch._triton_works.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match="Apollo takes the slower foreach step: Failed to find C compiler"
        ) as caught:
            found = [optim.dispatch.fused_step(torch.device("cuda"), torch.float32) for _ in range(2)]
        assert found == [None, None] and len(caught) == 1
    finally:
        optim.dispatch._triton_works.cache_clear()


def test_each_step_fills_the_reserve_that_a_capture_takes(monkeypatch):
    fused_cuda = pytest.importorskip("optim.fused.cuda")
    capturing = False
    monkeypatch.setattr(fused_cuda, "_is_capturing", lambda _: capturing)
    for kept in ("_reserve", "_captured", "_tables"):
        monkeypatch.setattr(fused_cuda, kept, type(getattr(fused_cuda, kept))())
    cpu = torch.device("cpu")
    fused_cuda._on_device((1, 2, 3), cpu)
    for addresses in ((4, 5, 6), (7, 8, 9)):
        capturing = True
        assert fused_cuda._on_device(addresses, cpu).tolist() == list(addresses)
        capturing = False
        fused_cuda._on_device((1, 2, 3), cpu)  # a step whose table is there already
    capturing = True
    fused_cuda._on_device((0, 0, 0), cpu)
    with pytest.raises(RuntimeError, match="make a step before each one that is captured"):
        fused_cuda._on_device((1, 1, 1), cpu)


def test_compiling_is_asked_before_capturing(monkeypatch):
    """What CUDA's functions answer cannot be traced."""

    def refuse() -> bool:
        raise AssertionError("asked while compiling")

    monkeypatch.setattr(optim.apollo, "is_compiling", lambda: True)
    monkeypatch.setattr(optim.apollo, "_is_capturing", refuse)
    params = random_parameters()
    step_together((Apollo(params, lr=0.1, foreach=True), params), steps=1)
