"""Apollo, an adaptive parameter-wise diagonal quasi-Newton method (Ma, arXiv 2009.13586).

Laid out as a file of torch.optim: the class, the state of a group, the step, the algorithm, and the choice between its
implementations. The published algorithm, written literally, is apollo_reference.py: read that first. The step here
takes it tensor by tensor; the foreach step (apollo_foreach.py) and the fused ones (fused/cpu.py, fused/cuda.py) do the
same over lists of tensors. Tests hold all of them to the reference.

The average m = d * D of the gradient is not stored where it can be computed again from d and B: two state tensors, like
Adam, instead of the three of the published code. Only decoupled weight decay, which adds to d, needs the third. (Or d =
m / D might not be stored, instead of m. But a step's sums are of d: with d at hand, they take less reading.)
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import override

from .apollo_foreach import _multi_tensor_apollo
from .apollo_math import averaging_weight, curvature_offset, norm_eps, warmed_up_lr
from .fused import cpu as fused_cpu
from .fused.layout import is_dense
from .settings import Settings, check_settings
from .sharded import join
from .step_tensors import StepTensors


class Apollo(Optimizer):
    r"""Apollo, an adaptive parameter-wise diagonal quasi-Newton method.

    For each parameter tensor, with the state t, m, B (`hessian`) and the direction d of the step before, all zero at
    first:

        g      <-  gradient  (+ weight_decay * p  if weight_decay_type is "L2")
        t      <-  t + 1,   alpha = (1 - beta) / (1 - beta^t)
        delta_g =  g - m
        v       =  d / (||d||_4 + eps')                                    eps' = eps / sigma,  "belief": eps
        delta   = -alpha * sum(delta_g / (||d||_4 + eps') * v) - sum(B * v^2)
        m      <-  m + alpha * delta_g
        B      <-  B + delta * v^2
        D       =  max(|B|, sigma),      "belief": max(|B|, max|delta_g|) + eps / alpha
        d      <-  m / D  (+ weight_decay * p  if "decoupled",  + weight_decay / mean(D) * p  if "stable")
        p      <-  p - lr_t * d

    lr_t rises linearly from `init_lr` to `lr` over the first `warmup` steps. Where a scheduler warms up, pass warmup=0.

    Starting points, of the two eras of the published results: sigma=1.0 with lr 0.5 (image classification) to 10
    (language modelling, translation), warmup 100 to 1000 from init_lr 0.01; or sigma=0.01 with lr 0.01 to 0.1, warmup
    500 from init_lr 1e-5. A learning rate does not carry over between values of sigma.

    Args:
        params: parameters, named parameters or groups of them, as any torch optimizer takes them.
        lr: learning rate; a float or a 1-element tensor.
        beta: decay of the average of the gradient, in [0, 1).
        eps: keeps the 4-norm's division finite, > 0.
        sigma: lower bound of the rectified curvature, > 0; not used by rebound "belief". Like beta, eps and rebound it
            holds for a whole run: m is kept as d * D.
        warmup: number of steps of linear warmup; 0 for none.
        init_lr: learning rate of the first warmup step.
        weight_decay: coefficient of weight decay.
        weight_decay_type: "L2", "decoupled" or "stable". The last two keep a third state tensor (if weight_decay != 0).
        rebound: "constant" or "belief", the rule that bounds the curvature from below.
        maximize: ascend instead of descend.
        foreach: step over lists of tensors (True) or tensor by tensor (False).
        fused: one native call (CPU, compiled at first use) or a few Triton launches (CUDA) for all tensors, where the
            dtype is supported: float32, bfloat16, float16, and float64 on the CPU; foreach where not.
            With foreach and fused both None, fused where there is one.
        capturable: keep every scalar on the device, so that the step can be captured in a CUDA graph or compiled whole.
        carry_sums: let the fused steps keep sums from one step for the next, which saves reading memory. A write to a
            parameter or its state under `torch.no_grad()` is noticed, and the sums are taken anew. A write through
            `.data` or a numpy view is not: with L2 decay one step would use an old parameter in a sum. Pass False where
            your code writes in these ways.

    State, per parameter: `step`, `hessian` and `direction`, and `exp_avg` (m, where it is not d * D) or `sigma` where
    they are needed. It is float32 for half-precision parameters (arithmetic too), else of the parameter's dtype.

    Raises:
        ValueError: a setting that is out of range, not finite or unknown.
        RuntimeError: a sparse or complex gradient (step).

    Source: arXiv 2009.13586, Algorithm 1; rebound "constant" with sigma 0.01 and "belief" from the later revisions.
    """

    # torch.amp.GradScaler then leaves dividing by its scale, and skipping the step, to the step: grad_scale, found_inf.
    _step_supports_amp_scaling = True

    @override
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        beta: float = 0.9,
        eps: float = 1e-4,
        sigma: float = 1.0,
        warmup: int = 100,
        init_lr: float = 0.01,
        weight_decay: float = 0.0,
        weight_decay_type: str = "L2",
        rebound: str = "constant",
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        carry_sums: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "eps": eps,
            "sigma": sigma,
            "warmup": warmup,
            "init_lr": init_lr,
            "weight_decay": weight_decay,
            "weight_decay_type": weight_decay_type,
            "rebound": rebound,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "carry_sums": carry_sums,
        }
        super().__init__(params, defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            check_settings({**self.defaults, **group})
        # torch casts loaded state to the parameter's dtype. Ours stays float32 where parameters are half precision, so
        # the tensors are taken once more from what was loaded, after any hook of the user's has had its say.
        loaded: dict[str, Any] = {}
        handle = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        owners = [(group, param) for group in self.param_groups for param in group["params"]]
        for i, (group, param) in zip(ids, owners, strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                if key == "step":
                    device = param.device if _counts_on_device(group, param) else "cpu"
                    self.state[param][key] = torch.as_tensor(value).to(device, torch.float32, copy=True)
                elif isinstance(value, Tensor):
                    self.state[param][key] = value.to(param.device, _state_dtype(param), copy=True)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor | None],
        hessians: list[Tensor],
        directions: list[Tensor],
        sigmas: list[Tensor | None],
        steps: list[Tensor],
    ) -> None:
        """Fills the lists with the tensors of parameters that have a gradient. Makes the state that is not there yet.

        torch.compile knows the optimizers' `_init_group` by its name and does not trace it, but takes lists alone.
        """
        states = []
        adds_to_state = group["rebound"] == "belief" or group["weight_decay_type"] != "L2"
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse or grad.is_complex():
                kind = "sparse" if grad.is_sparse else "complex"
                raise RuntimeError(f"Apollo does not take {kind} gradients: {_name_of(group, index)} has one")
            state = self.state[param]
            if adds_to_state or not state:
                self._init_state(group, param, state)
            params.append(param)
            grads.append(grad)
            states.append(state)
        exp_avgs += [state.get("exp_avg") for state in states]
        hessians += [state["hessian"] for state in states]
        directions += [state["direction"] for state in states]
        sigmas += [state.get("sigma") for state in states]
        steps += [state["step"] for state in states]

    def _init_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        """Adds to a parameter's state what its group's settings ask for and it does not have yet."""
        belief, dtype = group["rebound"] == "belief", _state_dtype(param)
        if not state:
            device = param.device if _counts_on_device(group, param) else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["hessian"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["direction"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if belief and "sigma" not in state:
            # The bound of the step before, from which m is computed again. Before the first step d = 0: any will do.
            state["sigma"] = torch.full((), group["sigma"], dtype=dtype, device=param.device)
        if group["weight_decay"] != 0 and group["weight_decay_type"] != "L2" and "exp_avg" not in state:
            # A new parameter, or a weight decay that was zero until now: from here on d is more than m / D.
            bound = float(state["sigma"]) if belief else group["sigma"]
            offset = curvature_offset(group["eps"], group["beta"], float(state["step"]), group["rebound"])
            state["exp_avg"] = state["direction"] * (state["hessian"].abs().clamp_(min=bound) + offset)

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Performs one step; `closure`, if given, reevaluates the model and returns the loss, which step returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing() and not group["capturable"]:
                raise RuntimeError("Apollo: a step captured in a CUDA graph needs capturable=True")
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor | None] = []
            hessians: list[Tensor] = []
            directions: list[Tensor] = []
            sigmas: list[Tensor | None] = []
            steps: list[Tensor] = []
            self._init_group(group, params, grads, exp_avgs, hessians, directions, sigmas, steps)
            apollo(
                StepTensors(params, grads, exp_avgs, hessians, directions, sigmas, steps),
                Settings.of(group),
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )
        return loss


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
        total = partial(join, groups=tensors.shards[i])  # of a sharded parameter's sums, over its shards

        grad = tensors.grads[i].to(d.dtype)
        if grad_scale is not None:
            grad = grad / grad_scale
        if s.maximize:
            grad = -grad
        if s.l2 != 0:
            grad = grad.add(param, alpha=s.l2)

        # the average of the gradient: m = d * D of the step before, and what this gradient changes
        exp_avg = tensors.exp_avgs[i]
        if exp_avg is None:
            bound = sigma if s.belief else s.sigma
            exp_avg = d * (hessian.abs().clamp_(min=bound) + curvature_offset(s.eps, s.beta, before, s.rebound))
        delta_g = grad - exp_avg
        exp_avg.add_(alpha * delta_g)

        # the diagonal Hessian, by the weak secant equation along the direction of the step before
        denom = total(d.pow(4).sum()) ** 0.25 + norm_eps(s.eps, s.sigma, s.rebound)
        v = d / denom
        delta = total(-alpha * (delta_g / denom * v).sum() - (hessian * v.square()).sum())
        hessian.add_(delta * v.square())

        # the rectified curvature, and the direction of this step
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


def apollo(
    tensors: StepTensors,
    settings: Settings,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Functional form of `Apollo`'s step, in place.

    Sorts the parameters into lists of one device and dtype, and gives each list to the implementation that suits it.
    Gradients are divided by `grad_scale`; nothing happens where `found_inf` is not 0. Both are 1-element tensors.
    """
    tensors = tensors.local()
    kinds = [
        (param.device, param.dtype, grad.dtype, exp_avg is None, is_dense(param))
        for param, grad, exp_avg in zip(tensors.params, tensors.grads, tensors.exp_avgs, strict=True)
    ]
    lists = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)}
    for (device, dtype, grad_dtype, _, dense), indices in lists.items():
        step = _implementation(device, dtype, settings, dense and grad_dtype is dtype)
        part = tensors.part(indices) if len(lists) > 1 else tensors
        scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
        if step not in (_single_tensor_apollo, _multi_tensor_apollo):
            step(part, settings, scale, None if found_inf is None else found_inf.to(device, non_blocking=True))
        elif found_inf is None or not found_inf.item():
            on_host = isinstance(settings.lr, Tensor) and not settings.capturable
            step(part, replace(settings, lr=settings.lr.item()) if on_host else settings, scale)


def _implementation(device: torch.device, dtype: torch.dtype, s: Settings, plain: bool) -> Callable[..., None]:
    """What steps over a list. `plain`: in memory without gaps, with gradients of the parameters' dtype."""
    if s.fused or (s.fused is None and s.foreach is None):
        return (plain and not is_compiling() and _fused_step(device, dtype)) or _multi_tensor_apollo
    return _multi_tensor_apollo if s.foreach else _single_tensor_apollo


def _fused_step(device: torch.device, dtype: torch.dtype) -> Callable[..., None] | None:
    """The fused step for parameters of this device and dtype, if there is one."""
    if device.type == "cpu":
        return fused_cpu._fused_cpu_apollo if dtype in fused_cpu.DTYPES and fused_cpu.library() else None
    if device.type == "cuda" and find_spec("triton"):
        from .fused import cuda as fused_cuda  # not at the top: it needs Triton

        return fused_cuda._fused_cuda_apollo if dtype in fused_cuda.DTYPES else None
    return None


def _counts_on_device(group: dict[str, Any], param: Tensor) -> bool:
    """Whether the count of steps lives on the parameter's device, for a graph or a fused step; else on the CPU."""
    wants_fused = group["fused"] or (group["fused"] is None and group["foreach"] is None)
    return group["capturable"] or bool(
        param.device.type == "cuda" and wants_fused and _fused_step(param.device, param.dtype)
    )


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.float32 if param.dtype.itemsize < 4 else param.dtype


def _name_of(group: dict[str, Any], index: int) -> str:
    if "param_names" in group:
        return f"parameter {group['param_names'][index]!r}"
    return f"the parameter of shape {tuple(group['params'][index].shape)}, number {index} of its group,"
