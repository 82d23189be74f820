"""Mixed precision: autocast and a gradient scaler.

fp32 is full precision everywhere. tf32 lets CUDA matrix products round their inputs to 10 mantissa bits. bf16 and fp16
use autocast, and fp16 also dynamic loss scaling. With bf16, products left in float32 may round as with tf32.
Parameters, gradients and optimizer state stay float32. engine/apex_adapter.py has apex-O1 and apex-O2.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from inspect import signature

import torch
from torch.nn.parallel import DistributedDataParallel

from engine.errors import UserError
from optim import OPTIMIZERS

# Torch's name of this argument since 2.13, and before.
BUFFERS_ARE_SENT = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)
AUTOCAST_DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """`autocast()` goes around the forward pass; `backward` and `step` follow.

    Raises UserError where the device lacks the precision.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "tf32" and device.type != "cuda":
            raise UserError(f"precision=tf32 exists on CUDA devices only, not on {device.type}; use precision=fp32")
        if device.type == "cuda":
            tf32 = name in ("tf32", "bf16")  # bf16 keeps 7 mantissa bits, so 10 are enough
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
        self.device_type = device.type
        self.dtype = AUTOCAST_DTYPES[name]
        self.create_graph = False  # engine/needs.py
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """The model and optimizer to train instead. It comes before compiling and data_parallel."""
        return model, optimizer

    def data_parallel(self, network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """`network` with gradients averaged over all ranks, except in its `no_sync()`.

        Buffers are not sent: each rank normalises by its own batch.
        """
        return DistributedDataParallel(
            network,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{BUFFERS_ARE_SENT: False},
        )

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: torch.Tensor, is_last: bool = True) -> None:
        """Add the gradients of `loss`. `is_last` is False if more follow before the step."""
        self.scaler.scale(loss).backward(create_graph=self.create_graph)

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], max_norm: float
    ) -> torch.Tensor:
        """Clip the unscaled gradients to a total norm of `max_norm`. Returns the norm before.

        On CUDA an optimizer that can divide gradients in its step does so, which spares two transfers of them all.
        """
        self.scaler.unscale_(optimizer)
        if not (self.device_type == "cuda" and not self.scaler.is_enabled() and _divides_in_step(optimizer)):
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        norm = torch.nn.utils.get_total_norm([x.grad for x in parameters if x.grad is not None])
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # clip_grad_norm_ has the reciprocal
        return norm

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor] | None = None) -> bool:
        """Returns False if the scaler skipped the step because a gradient overflowed. A scaler allows no `closure`."""
        if not self.scaler.is_enabled():
            optimizer.step() if closure is None else optimizer.step(closure)
            if _divides_in_step(optimizer):
                optimizer.grad_scale = None  # it holds for one update
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.scaler.load_state_dict(state)


def _divides_in_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step divides gradients by `grad_scale`, like Apollo's and torch's fused ones."""
    return type(optimizer) in OPTIMIZERS.values() and getattr(optimizer, "_step_supports_amp_scaling", False)
