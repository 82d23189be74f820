"""NVIDIA's apex as a precision: amp at opt_level O1 or O2, and apex's DistributedDataParallel.

docs/apex.md says which apex this needs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from overrides import override

from engine.errors import UserError
from engine.precision import Precision


def require_apex(name: str, device: torch.device) -> None:
    """Raise UserError without CUDA, or an apex that still has amp. `name` is apex-O1 or apex-O2."""
    if device.type != "cuda":
        raise UserError(f"precision={name} exists on CUDA devices only, not on {device.type}; use precision=fp32")
    try:
        from apex import amp, parallel  # noqa: F401 - checks that they exist
    except ImportError as error:
        raise UserError(
            f"precision={name} needs an NVIDIA apex that still has amp and parallel ({error}): removed in April 2025 "
            f"(pull request 1896), so build an older tag, such as 23.05, from source (the package index's apex is "
            f"another project), or use precision=fp16, its native equivalent (docs/apex.md)"
        ) from None


class ApexPrecision(Precision):
    """apex.amp as a Precision. One per process, because amp patches torch's functions for good."""

    def __init__(self, name: str, device: torch.device) -> None:
        from apex import amp, parallel

        super().__init__("fp32", device)
        self.amp, self.parallel, self.opt_level = amp, parallel, name.removeprefix("apex-")
        self.overflowed = False

    @override
    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model, self.optimizer = self.amp.initialize(model, optimizer, opt_level=self.opt_level, verbosity=0)
        self.optimizer.zero_grad()  # makes O2's float32 weights before a state is loaded, which float16 would round
        return model, self.optimizer

    @override
    def data_parallel(self, network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        # Reduced after the backward pass, gradients include those of earlier passes.
        network = self.parallel.DistributedDataParallel(network, delay_allreduce=True)
        network.no_sync = partial(_no_sync, network)
        return network

    @override
    def autocast(self) -> AbstractContextManager:
        return nullcontext()  # amp has patched the model, or torch's functions

    @override
    def backward(self, loss: torch.Tensor, is_last: bool = True) -> None:
        scale = self._scale()
        # Unscaling before the last pass would put earlier gradients aside, and they would not be reduced.
        with self.amp.scale_loss(loss, self.optimizer, delay_unscale=not is_last) as scaled:
            scaled.backward()
        self.overflowed = self._scale() < scale

    @override
    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], max_norm: float
    ) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(list(self.amp.master_params(optimizer)), max_norm)

    @override
    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor] | None = None) -> bool:
        optimizer.step()  # amp skips it after an overflow; engine/needs.py refuses closures
        return not self.overflowed

    def _scale(self) -> float:
        return self.amp.state_dict()["loss_scaler0"]["loss_scale"]

    @override
    def state_dict(self) -> dict:
        """amp's own state, and at O2 the float32 weights behind the model's float16 ones."""
        masters = list(self.amp.master_params(self.optimizer)) if self.opt_level == "O2" else []
        return {"amp": dict(self.amp.state_dict()), "masters": [weight.detach() for weight in masters]}

    @override
    def load_state_dict(self, state: dict) -> None:
        self.amp.load_state_dict(state["amp"])
        with torch.no_grad():
            for weight, saved in zip(self.amp.master_params(self.optimizer), state["masters"], strict=False):
                weight.copy_(saved)


@contextmanager
def _no_sync(network: torch.nn.Module) -> Iterator[None]:
    network.disable_allreduce()
    try:
        yield
    finally:
        network.enable_allreduce()
