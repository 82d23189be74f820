"""Mixed precision in one path: autocast and a gradient scaler, which can be disabled. The loops have no branch for it.

    optimizer.zero_grad() ... with precision.autocast(): loss = ...; precision.backward(loss); precision.step(optimizer)

fp32 is full precision everywhere. tf32 lets CUDA matrix products round their inputs to 10 mantissa bits. bf16 and fp16
use autocast, and fp16 also dynamic loss scaling. Parameters, gradients and optimizer state stay float32 in all of them.
apex-O1 and apex-O2 leave these steps to NVIDIA's apex, if a suitable one is installed (engine/apex_adapter.py).
engine/run.py chooses among them.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch.nn.parallel import DistributedDataParallel

from engine.errors import UserError

AUTOCAST_DTYPES = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The precision of a run: `autocast()` around the forward pass, then `backward` and `step`.

    Raises UserError if the device does not support it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "tf32" and device.type != "cuda":
            raise UserError(f"precision=tf32 exists on CUDA devices only, not on {device.type}; use precision=fp32")
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = name == "tf32"
        self.device_type = device.type
        self.dtype = AUTOCAST_DTYPES[name]
        self.create_graph = False  # whether gradients can be differentiated again (engine/needs.py)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def prepare(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """The model and optimizer to train instead of these. Called once, before compiling and data_parallel."""
        return model, optimizer

    def data_parallel(self, network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """`network`, with gradients averaged over all ranks, except in passes inside its `no_sync()`."""
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def autocast(self) -> AbstractContextManager:
        """Context for the forward pass and the loss, in training and in evaluation."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: torch.Tensor, is_last: bool = True) -> None:
        """Add the gradients of `loss`. `is_last` is False if more gradients follow before the step."""
        self.scaler.scale(loss).backward(create_graph=self.create_graph)

    def clip(
        self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], max_norm: float
    ) -> torch.Tensor:
        """Clip the true (unscaled) gradients to a total norm of `max_norm`. Returns the norm before clipping."""
        self.scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def step(self, optimizer: torch.optim.Optimizer, closure: Callable[[], torch.Tensor] | None = None) -> bool:
        """Take the optimizer step. Returns False if the scaler skipped it because a gradient overflowed.

        `closure` takes the gradients again, for an optimizer that asks for them; with a scaler there must be none.
        """
        if not self.scaler.is_enabled():
            optimizer.step() if closure is None else optimizer.step(closure)
            return True
        scale = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= scale

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.scaler.load_state_dict(state)
