"""The published algorithm, written literally. Read this file first.

As in the published code, each parameter has three state tensors: `exp_avg` (m), `hessian` (B) and `direction` (d),
which is scaled in place before use. Tests compare `optim.Apollo` with this class, and this class with trajectories of
the published implementations. It is slow, and takes only dense real gradients.

Source: arXiv 2009.13586, Algorithm 1.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class LiteralApollo(torch.optim.Optimizer):
    """The settings are those of `optim.Apollo` up to `maximize`, but `lr` is a float, and none is checked.

    With lr 0 the warmup moves parameters. State has the parameters' dtype; `step` is an int.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        beta: float = 0.9,
        eps: float = 1e-4,
        sigma: float = 1.0,
        warmup: int = 100,
        init_lr: float = 0.01,
        weight_decay: float = 0.0,
        weight_decay_type: str = "L2",
        rebound: str = "constant",
        maximize: bool = False,
    ) -> None:
        settings = dict(locals())
        super().__init__(params, {k: v for k, v in settings.items() if k not in ("self", "params", "__class__")})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            beta, sigma, weight_decay = group["beta"], group["sigma"], group["weight_decay"]
            constant = group["rebound"] == "constant"
            eps = group["eps"] / sigma if constant else group["eps"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"], state["hessian"], state["direction"] = (torch.zeros_like(p) for _ in range(3))
                m, B, d = state["exp_avg"], state["hessian"], state["direction"]

                lr = group["lr"]
                if state["step"] < group["warmup"]:
                    lr = (lr - group["init_lr"]) * state["step"] / group["warmup"] + group["init_lr"]
                state["step"] += 1
                alpha = (1 - beta) / (1 - beta ** state["step"])

                grad = -p.grad if group["maximize"] else p.grad
                if weight_decay != 0 and group["weight_decay_type"] == "L2":
                    grad = grad.add(p, alpha=weight_decay)
                delta_grad = grad - m
                if not constant:
                    sigma = delta_grad.norm(p=float("inf")) if p.numel() else 0.0

                m.add_(delta_grad, alpha=alpha)
                denom = d.norm(p=4).add(eps)
                d.div_(denom)
                v_sq = d.mul(d)
                delta = delta_grad.div_(denom).mul_(d).sum().mul(-alpha) - B.mul(v_sq).sum()
                B.addcmul_(v_sq, delta)

                D = B.abs().clamp_(min=sigma)
                if not constant:
                    D.add_(group["eps"] / alpha)
                d.copy_(m.div(D))
                if weight_decay != 0 and group["weight_decay_type"] == "decoupled":
                    d.add_(p, alpha=weight_decay)
                elif weight_decay != 0 and group["weight_decay_type"] == "stable":
                    d.add_(p, alpha=weight_decay / D.mean().item())
                p.add_(d, alpha=-lr)
