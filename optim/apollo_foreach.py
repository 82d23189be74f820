"""Apollo's step over lists of tensors, with torch's foreach operations: few launches, and no extension to build.

foreach cannot sum over a tensor, so these sums are computed one by one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .apollo_math import averaging_weight, curvature_offset, norm_eps, warmed_up_lr
from .settings import Settings
from .sharded import join_sums
from .step_tensors import StepTensors

# On the CPU a list is cut into parts whose temporaries stay in cache.
CPU_PART = 2**17  # elements


def _multi_tensor_apollo(tensors: StepTensors, settings: Settings, grad_scale: Tensor | None) -> None:
    for part in _parts(tensors):
        _step(tensors.part(part), settings, grad_scale)


def _parts(tensors: StepTensors) -> Iterator[range]:
    """Consecutive parts of up to CPU_PART elements or one tensor; the whole list on GPUs or with shards."""
    params = tensors.params
    if params[0].device.type != "cpu" or any(tensors.shards):  # all ranks must join their sums in the same order
        yield range(len(params))
        return
    first = elements = 0
    for i, param in enumerate(params):
        if i > first and elements + param.numel() > CPU_PART:
            yield range(first, i)
            first, elements = i, 0
        elements += param.numel()
    yield range(first, len(params))


def _step(tensors: StepTensors, settings: Settings, grad_scale: Tensor | None) -> None:
    s, params, grads, exp_avgs, hessians = settings, tensors.params, tensors.grads, tensors.exp_avgs, tensors.hessians
    directions, sigmas, shards = tensors.directions, tensors.sigmas, tensors.shards
    dtype = directions[0].dtype
    before = [step.to(dtype, copy=True) if s.capturable else step.item() for step in tensors.steps]
    torch._foreach_add_(tensors.steps, 1)
    now = [t + 1 for t in before]
    alphas = [averaging_weight(s.beta, t) for t in now]
    lrs = [warmed_up_lr(s.lr, s.init_lr, s.warmup, t) for t in before]

    if grads[0].dtype != dtype:
        grads = [grad.to(dtype) for grad in grads]
    if grad_scale is not None:
        grads = torch._foreach_div(grads, grad_scale)
    if s.maximize:
        grads = torch._foreach_neg(grads)
    if s.l2 != 0:
        grads = torch._foreach_add(grads, params, alpha=s.l2)

    if not tensors.stores_average:
        bounds = sigmas if s.belief else [s.sigma] * len(params)
        exp_avgs = _rectify(hessians, bounds, [curvature_offset(s.eps, s.beta, t, s.rebound) for t in before])
        torch._foreach_mul_(exp_avgs, directions)

    # delta = -sum(d * (alpha * delta_g + B * d)) / denom^2 and B += delta * d^2 / denom^2, where ||d||_4^2 = ||d^2||_2
    delta_g = torch._foreach_sub(grads, exp_avgs)
    if s.belief:
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
    denoms = sums[:, 1].sqrt().sqrt_().add_(norm_eps(s.eps, s.sigma, s.rebound))
    torch._foreach_mul_(squares, list((-sums[:, 0] / denoms.square() / denoms.square()).unbind()))
    torch._foreach_add_(hessians, squares)
    del squares

    bounds = sigmas if s.belief else [s.sigma] * len(params)
    curvature = _rectify(hessians, bounds, [curvature_offset(s.eps, s.beta, t, s.rebound) for t in now])
    torch._foreach_copy_(directions, exp_avgs)
    torch._foreach_div_(directions, curvature)
    if s.stable:
        totals = torch.stack([x.sum() for x in curvature])
        join_sums(totals[:, None], shards)
        decays = [s.decay * max(n, 1) / x for n, x in zip(tensors.numels, totals.unbind(), strict=True)]
        torch._foreach_add_(directions, torch._foreach_mul([p.to(dtype) for p in params], decays))
    elif s.decay != 0:
        torch._foreach_add_(directions, params, alpha=s.decay)
    torch._foreach_sub_(params, torch._foreach_mul(directions, lrs))


def _rectify(hessians: list[Tensor], bounds: list, offsets: list) -> list[Tensor]:
    """D = max(|B|, bound) + offset."""
    curvature = torch._foreach_abs(hessians)
    if isinstance(bounds[0], Tensor):
        for x, bound, offset in zip(curvature, bounds, offsets, strict=True):
            x.clamp_(min=bound).add_(offset)
    else:
        torch._foreach_clamp_min_(curvature, bounds)
    return curvature
