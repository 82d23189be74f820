"""Apollo's step over lists of tensors, with torch's foreach operations: few launches, and no extension to build.

The sums over a tensor, which foreach has no operation for, are taken one by one; all scalars of the update are then one
vector over the list.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .apollo_math import averaging_weight, curvature_offset, norm_eps, warmed_up_lr
from .sharded import ProcessGroups, join_sums

# On the CPU a launch costs little and memory much, so a long list goes in parts, whose temporaries stay in cache.
CPU_PART = 2**17  # elements


def _multi_tensor_apollo(params: list[Tensor], *columns: list, **settings: Any) -> None:
    """The step of parameters of one device and dtype. See optim/apollo.py for the arguments."""
    for part in _parts(params, shards=columns[6]):
        _step(params[part], *(column[part] for column in columns), **settings)


def _parts(params: list[Tensor], shards: list[ProcessGroups]) -> Iterator[slice]:
    """Consecutive parts of the list, of CPU_PART elements or of one tensor; the whole where parts gain nothing."""
    if params[0].device.type != "cpu" or any(shards):  # the ranks must take their sums in step
        yield slice(None)
        return
    first = elements = 0
    for i, param in enumerate(params):
        if i > first and elements + param.numel() > CPU_PART:
            yield slice(first, i)
            first, elements = i, 0
        elements += param.numel()
    yield slice(first, None)


def _step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor | None],
    hessians: list[Tensor],
    directions: list[Tensor],
    sigmas: list[Tensor | None],
    steps: list[Tensor],
    shards: list[ProcessGroups],
    numels: list[int],
    *,
    lr: float | Tensor,
    beta: float,
    eps: float,
    sigma: float,
    warmup: int,
    init_lr: float,
    weight_decay: float,
    weight_decay_type: str,
    rebound: str,
    maximize: bool,
    capturable: bool,
    grad_scale: Tensor | None,
) -> None:
    """The step of one part, with stored averages or without."""
    dtype = directions[0].dtype
    before = [step.to(dtype, copy=True) if capturable else step.item() for step in steps]
    torch._foreach_add_(steps, 1)
    now = [t + 1 for t in before]
    alphas = [averaging_weight(beta, t) for t in now]
    lrs = [warmed_up_lr(lr, init_lr, warmup, t) for t in before]

    if grads[0].dtype != dtype:
        grads = [grad.to(dtype) for grad in grads]
    if grad_scale is not None:
        grads = torch._foreach_div(grads, grad_scale)
    if maximize:
        grads = torch._foreach_neg(grads)
    if weight_decay != 0 and weight_decay_type == "L2":
        grads = torch._foreach_add(grads, params, alpha=weight_decay)

    if exp_avgs[0] is None:
        bounds = sigmas if rebound == "belief" else [sigma] * len(params)
        exp_avgs = _rectify(hessians, bounds, [curvature_offset(eps, beta, t, rebound) for t in before])
        torch._foreach_mul_(exp_avgs, directions)

    # delta = -sum(d * (alpha * delta_g + B * d)) / denom^2 and B += delta * d^2 / denom^2, where ||d||_4^2 = ||d^2||_2
    delta_g = torch._foreach_sub(grads, exp_avgs)
    if rebound == "belief":
        largest = torch.stack([x.abs().amax() if x.numel() else x.sum() for x in delta_g])
        join_sums(largest[:, None], shards, largest=True)
        torch._foreach_copy_(sigmas, list(largest.unbind()))
    torch._foreach_mul_(delta_g, alphas)
    torch._foreach_add_(exp_avgs, delta_g)
    torch._foreach_addcmul_(delta_g, hessians, directions)
    torch._foreach_mul_(delta_g, directions)
    dot = torch.stack([x.sum() for x in delta_g])
    del delta_g
    squares = torch._foreach_mul(directions, directions)
    sums = torch.stack([dot, torch.stack(torch._foreach_norm(squares, 2)).square_()], dim=1)
    join_sums(sums, shards)
    denoms = sums[:, 1].sqrt().sqrt_().add_(norm_eps(eps, sigma, rebound))
    torch._foreach_mul_(squares, list((-sums[:, 0] / denoms.square() / denoms.square()).unbind()))
    torch._foreach_add_(hessians, squares)
    del squares

    bounds = sigmas if rebound == "belief" else [sigma] * len(params)
    curvature = _rectify(hessians, bounds, [curvature_offset(eps, beta, t, rebound) for t in now])
    torch._foreach_copy_(directions, exp_avgs)
    torch._foreach_div_(directions, curvature)
    if weight_decay != 0 and weight_decay_type == "stable":
        totals = torch.stack([x.sum() for x in curvature])
        join_sums(totals[:, None], shards)
        decays = [weight_decay * max(n, 1) / x for n, x in zip(numels, totals.unbind(), strict=True)]
        torch._foreach_add_(directions, torch._foreach_mul([p.to(dtype) for p in params], decays))
    elif weight_decay != 0 and weight_decay_type == "decoupled":
        torch._foreach_add_(directions, params, alpha=weight_decay)
    torch._foreach_sub_(params, torch._foreach_mul(directions, lrs))


def _rectify(hessians: list[Tensor], bounds: list, offsets: list) -> list[Tensor]:
    """D = max(|B|, bound) + offset, tensor by tensor."""
    curvature = torch._foreach_abs(hessians)
    if isinstance(bounds[0], Tensor):
        for x, bound, offset in zip(curvature, bounds, offsets, strict=True):
            x.clamp_(min=bound).add_(offset)
    else:
        torch._foreach_clamp_min_(curvature, bounds)
    return curvature
