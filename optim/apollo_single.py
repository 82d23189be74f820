"""Apollo's step tensor by tensor. It reads like the paper's algorithm, but stores m only where needed."""

from functools import partial

import torch
from torch import Tensor

from .apollo_math import averaging_weight, curvature_offset, norm_eps, warmed_up_lr
from .settings import Settings
from .sharded import join
from .step_tensors import StepTensors


def _single_tensor_apollo(tensors: StepTensors, settings: Settings, grad_scale: Tensor | None) -> None:
    s = settings
    for i, param in enumerate(tensors.params):
        hessian, d, sigma, step = tensors.hessians[i], tensors.directions[i], tensors.sigmas[i], tensors.steps[i]
        before = step.to(d.dtype, copy=True) if s.capturable else step.item()
        t = before + 1
        step += 1
        if tensors.numels[i] == 0:
            continue
        alpha = averaging_weight(s.beta, t)
        total = partial(join, groups=tensors.shards[i])  # adds up a sharded parameter's sums

        grad = tensors.grads[i].to(d.dtype)
        if grad_scale is not None:
            grad = grad / grad_scale
        if s.maximize:
            grad = -grad
        if s.l2 != 0:
            grad = grad.add(param, alpha=s.l2)

        # the average of the gradient: m = d * D of the last step, then its change
        exp_avg = tensors.exp_avgs[i]
        if exp_avg is None:
            bound = sigma if s.belief else s.sigma
            exp_avg = d * (hessian.abs().clamp_(min=bound) + curvature_offset(s.eps, s.beta, before, s.rebound))
        delta_g = grad - exp_avg
        exp_avg.add_(alpha * delta_g)

        # the diagonal Hessian, by the weak secant equation along the last direction
        denom = total(d.pow(4).sum()) ** 0.25 + norm_eps(s.eps, s.sigma, s.rebound)
        v = d / denom
        delta = total(-alpha * (delta_g / denom * v).sum() - (hessian * v.square()).sum())
        hessian.add_(delta * v.square())

        # the rectified curvature, and the direction
        if s.belief:
            sigma.copy_(total(delta_g.abs().amax() if delta_g.numel() else delta_g.sum(), largest=True))
            curvature = hessian.abs().clamp_(min=sigma) + curvature_offset(s.eps, s.beta, t, s.rebound)
        else:
            curvature = hessian.abs().clamp_(min=s.sigma)
        torch.div(exp_avg, curvature, out=d)
        if s.stable:
            d.addcmul_(param.to(d.dtype), s.decay / (total(curvature.sum()) / tensors.numels[i]))
        elif s.decay != 0:
            d.add_(param, alpha=s.decay)

        param.sub_(d * warmed_up_lr(s.lr, s.init_lr, s.warmup, before))
