"""Random cases: Apollo agrees with the literal algorithm for any mixture of tensors, settings and gradients.

The suite runs a few hundred. `APOLLO_EXAMPLES=10000 python -m pytest tests/test_optim_random.py` runs more.
"""

import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_cases import PATHS
from torch import Tensor, nn

from optim import Apollo
from optim.apollo_reference import LiteralApollo

EXAMPLES = int(os.environ.get("APOLLO_EXAMPLES", "300"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

shapes = st.one_of(
    st.just(()),
    st.just((0, 3)),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    st.just((70_001,)),  # longer than the fused kernel takes in one piece
)
layouts = st.sampled_from(["contiguous", "strided", "reversed dimensions", "channels last", "a view"])
tensors = st.tuples(shapes, layouts, st.sampled_from(DTYPES), st.booleans())  # the last: gradient laid out as parameter
groups = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.5, 0.01]),
        "beta": st.sampled_from([0.9, 0.0, 0.99]),
        "eps": st.sampled_from([1e-4, 1e-2]),
        "sigma": st.sampled_from([1.0, 0.01]),
        "warmup": st.integers(0, 3),
        "init_lr": st.sampled_from([0.0, 0.01]),
        "weight_decay": st.sampled_from([0.0, 1e-2]),
        "weight_decay_type": st.sampled_from(["L2", "decoupled", "stable"]),
        "rebound": st.sampled_from(["constant", "belief"]),
        "maximize": st.booleans(),
    }
)


def laid_out(values: Tensor, layout: str, dtype: torch.dtype, storage: dict[torch.dtype, Tensor]) -> Tensor:
    """A tensor of these values with the given memory layout. "a view" is cut from the rest of `storage`."""
    values = values.to(dtype)
    if layout == "strided":
        return torch.zeros(*values.shape, 2, dtype=dtype)[..., 0].copy_(values)
    if layout == "reversed dimensions":
        return torch.zeros(values.shape[::-1], dtype=dtype).permute(tuple(reversed(range(values.ndim)))).copy_(values)
    if layout == "channels last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "a view":
        if len(storage[dtype]) < values.numel():
            storage[dtype] = torch.zeros(200_000, dtype=dtype)
        view, storage[dtype] = storage[dtype].split([values.numel(), len(storage[dtype]) - values.numel()])
        return view.view(values.shape).copy_(values)
    return values.clone()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 300)
@given(
    seed=st.integers(0, 2**32),
    drawn=st.lists(st.tuples(groups, st.lists(tensors, min_size=1, max_size=4)), min_size=1, max_size=2),
    path=st.sampled_from(list(PATHS.values())),
    steps=st.integers(1, 5),
    absent=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 7))),
    drop=st.integers(0, 5),
)
def test_agrees_with_the_literal_algorithm(
    seed: int,
    drawn: list[tuple[dict[str, Any], list[tuple]]],
    path: dict[str, Any],
    steps: int,
    absent: set[tuple[int, int]],
    drop: int,
) -> None:
    """Each step starts at the same parameters, so errors of half precision and of belief do not add up."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    storage = {dtype: torch.zeros(200_000, dtype=dtype) for dtype in DTYPES}
    params, twins, given_groups, literal_groups = [], [], [], []
    for options, members in drawn:
        ours = [nn.Parameter(laid_out(draw(shape), layout, dtype, storage)) for shape, layout, dtype, _ in members]
        theirs = [nn.Parameter(param.detach().double()) for param in ours]
        params += ours
        twins += theirs
        given_groups.append({"params": ours, **options})
        literal_groups.append({"params": theirs, **options})
    optimizer = Apollo(given_groups, lr=1.0, **path)
    literal = LiteralApollo(literal_groups, lr=1.0)
    kinds = [kind for _, members in drawn for kind in members]

    # The least D so far. Under "belief" it may come down to eps, which magnifies the rounding of B.
    least = [1.0] * len(params)
    for step in range(steps):
        if step == drop:
            for group in (*optimizer.param_groups, *literal.param_groups):
                group["lr"] *= 0.1
        for i, (param, twin, (_, layout, dtype, alike)) in enumerate(zip(params, twins, kinds, strict=True)):
            twin.data = param.detach().double().clone(memory_format=torch.contiguous_format)
            param.grad = twin.grad = None
            if (step, i) not in absent:
                param.grad = laid_out(draw(param.shape), layout if alike else "contiguous", dtype, storage)
                twin.grad = param.grad.double().contiguous()
        before = [twin.detach().clone() for twin in twins]
        optimizer.step()
        literal.step()
        for i, (param, twin, start) in enumerate(zip(params, twins, before, strict=True)):
            if twin.grad is not None and twin.numel():
                curvature = (literal.state[twin]["exp_avg"] / literal.state[twin]["direction"]).abs().nan_to_num(1.0)
                least[i] = min(least[i], float(curvature.min()) + 1e-4)
            bound = (1e-10 if param.dtype is torch.float64 else 2e-4) * max(1.0, 1e-2 / least[i])
            rounding = torch.finfo(param.dtype).eps
            # a number that the step takes from 0.5 to 0.00006 has lost digits in any arithmetic
            scale = float(torch.stack([start, twin.detach()]).abs().max()) if twin.numel() else 0.0
            error = (param.detach().double() - twin.detach()).abs()
            assert bool((error <= bound * scale + rounding * twin.detach().abs()).all()), (error.max(), scale)
            if param in optimizer.state and param.dtype is torch.float64:
                for key in ("direction", "hessian"):
                    torch.testing.assert_close(
                        optimizer.state[param][key], literal.state[twin][key], rtol=1e-8, atol=1e-10
                    )
