"""The optimizer Apollo. Read apollo_reference.py first: it is the published algorithm, written literally.

m = d * D, the average of the gradient, is not stored where d and B give it. So the state has two tensors, like Adam's.
Decoupled and stable weight decay add to d and need a third. d is stored, not m, because a step's sums are over d.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import override

from .apollo_math import average_of
from .checks import state_dtype
from .dispatch import apollo, fused_step
from .settings import Settings, check_settings
from .step_tensors import StepTensors


class Apollo(Optimizer):
    r"""Apollo, an adaptive parameter-wise diagonal quasi-Newton method.

    The state of each tensor, zero at first, is t (`step`), m, B (`hessian`) and d, the last step's `direction`.

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

    lr_t rises linearly from `init_lr` to `lr` in the first `warmup` steps. With lr 0 no parameter moves, even then.
    `load_state_dict` takes all settings but `capturable` from the checkpoint; lr stays a tensor or a float.

    The published settings are sigma=1.0 with lr 0.5 (images) to 10 (language, translation) and warmup 100 to 1000 from
    init_lr 0.01; or sigma=0.01 with lr 0.01 to 0.1 and warmup 500 from init_lr 1e-5.

    Args:
        params: parameters, named parameters or groups of them.
        lr: learning rate; a float or a 1-element tensor.
        beta: decay of the average of the gradient, in [0, 1).
        eps: keeps the 4-norm's division finite, > 0.
        sigma: lower bound of the rectified curvature, > 0; rebound "belief" ignores it. With L2 decay, only the ratio
            of the rates (lr, init_lr) to sigma matters. Do not change sigma, beta, eps or rebound during a run: m is
            kept as d * D.
        warmup: number of warmup steps. Pass 0 if a scheduler warms up.
        init_lr: learning rate of the first warmup step.
        weight_decay: coefficient of weight decay.
        weight_decay_type: "L2", "decoupled" or "stable"; the last two keep a third state tensor.
        rebound: "constant" or "belief", the rule that bounds the curvature from below.
        maximize: ascend instead of descend.
        foreach: step over lists of tensors (True) or tensor by tensor (False).
        fused: one native call (CPU, compiled at first use) or a few Triton launches (CUDA) for all tensors, in float32,
            bfloat16, float16 and on the CPU float64; foreach for others. If foreach and fused are both None, the step
            is fused where it can be.
        capturable: keep every scalar on the device, to capture the step in a CUDA graph or compile it whole.
        carry_sums: let a fused step keep sums for the next one, which then reads less. Pass False if code writes to
            parameters through `.data` or a numpy view: this is not noticed, and with L2 decay one sum would be old.

    State and arithmetic are float32 for half-precision parameters, and of the parameter's dtype otherwise.
    `exp_avg` (m) is stored only where it is not d * D, `sigma` only with rebound "belief".

    Raises:
        ValueError: a setting out of range, not finite or unknown.
        RuntimeError: a sparse or complex gradient; state that does not fit its parameter, or shared memory (step).

    Source: arXiv 2009.13586, Algorithm 1; rebound "constant" with sigma 0.01 and "belief" from the later revisions.
    """

    # torch.amp.GradScaler then leaves dividing by the scale (grad_scale) and skipping (found_inf) to the step.
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
        given = locals()
        super().__init__(params, {name: given[name] for name in Settings.__annotations__})

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group in state_dict["param_groups"]:
            check_settings({**self.defaults, **group})
        own = [(group["capturable"], group["lr"]) for group in self.param_groups]
        # torch casts loaded state to the parameter's dtype; ours stays float32 for half precision. So we take it again
        # from the loaded state, as the user's hooks have left it.
        loaded: dict[str, Any] = {}
        handle = self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, (capturable, lr) in zip(self.param_groups, own, strict=True):
            # A CUDA graph needs its own `capturable` and `lr`.
            group["capturable"] = capturable
            if isinstance(lr, Tensor):
                group["lr"] = torch.as_tensor(group["lr"]).to(lr.device, lr.dtype, copy=True)
            else:
                group["lr"] = float(group["lr"])
            for key, value in self.defaults.items():  # settings that an old checkpoint lacks
                group.setdefault(key, value)
        ids = [i for group in loaded["param_groups"] for i in group["params"]]
        owners = [(group, param) for group in self.param_groups for param in group["params"]]
        for i, (group, param) in zip(ids, owners, strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                if key == "step":
                    device = param.device if _counts_on_device(group, param) else "cpu"
                    self.state[param][key] = torch.as_tensor(value).to(device, torch.float32, copy=True)
                elif isinstance(value, Tensor):
                    self.state[param][key] = value.to(param.device, state_dtype(param), copy=True)

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
        """Fills the lists with the tensors of parameters that have a gradient. Makes missing state.

        torch.compile does not trace a function of this name, and accepts only lists as its arguments.
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
        sigmas += [state.get("sigma") for state in states]
        try:
            hessians += [state["hessian"] for state in states]
            directions += [state["direction"] for state in states]
            steps += [state["step"] for state in states]
        except KeyError as missing:
            i = next(i for i, state in enumerate(states) if missing.args[0] not in state)
            name = _name_with_gradient(group, i)
            raise RuntimeError(f"Apollo: the state of {name} has no {missing}; is it another optimizer's?") from None

    def _init_state(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> None:
        """Adds the state that the group's settings need."""
        dtype = state_dtype(param)
        if not state:
            device = param.device if _counts_on_device(group, param) else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["hessian"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            state["direction"] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if group["rebound"] == "belief" and "sigma" not in state:
            # The last step's bound; m is computed from it. While d is 0, any bound is right.
            state["sigma"] = torch.full((), group["sigma"], dtype=dtype, device=param.device)
        if group["weight_decay"] != 0 and group["weight_decay_type"] != "L2" and "exp_avg" not in state:
            state["exp_avg"] = average_of(state, group)  # from now on, d is more than m / D

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Performs one step. `closure` reevaluates the model; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            if not group["capturable"] and not is_compiling() and _is_capturing():
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
                name_of=partial(_name_with_gradient, group),
            )
        return loss

    @torch.no_grad()
    def clamped(self) -> float | None:
        """The share of entries with |B| below its bound sigma in the last step; None before the first one.

        Those entries take the step of SGD with momentum, with the rate lr / sigma; the others one scaled by their
        curvature. Reads B once, and waits for the device.
        """
        counts, numel = [], 0
        for group in self.param_groups:
            for state in (self.state[param] for param in group["params"] if self.state.get(param)):
                hessian, bound = state["hessian"], state.get("sigma", group["sigma"])
                numel += hessian.numel()
                # In parts: a comparison makes a tensor as large as its own.
                counts += [torch.count_nonzero(part.abs() < bound) for part in hessian.flatten().split(1 << 20)]
        return float(torch.stack([count.to(counts[0].device) for count in counts]).sum()) / numel if numel else None


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _counts_on_device(group: dict[str, Any], param: Tensor) -> bool:
    """Whether the count of steps is on the parameter's device."""
    wants_fused = group["fused"] or (group["fused"] is None and group["foreach"] is None)
    return group["capturable"] or bool(
        param.device.type == "cuda" and wants_fused and fused_step(param.device, param.dtype)
    )


def _name_with_gradient(group: dict[str, Any], i: int) -> str:
    """The name of parameter i, counted among those that have a gradient."""
    return _name_of(group, [index for index, param in enumerate(group["params"]) if param.grad is not None][i])


def _name_of(group: dict[str, Any], index: int) -> str:
    if "param_names" in group:
        return f"parameter {group['param_names'][index]!r}"
    return f"the parameter of shape {tuple(group['params'][index].shape)}, number {index} of its group,"
