"""relu(batch_norm(x) + shortcut): by torch's operators, or by one native function on the CPU.

On the CPU, convolutions are fastest channels-last, but torch's batch norm then takes a quarter of a CIFAR ResNet's
time. norm_relu.cpp passes over memory twice forward and twice backward.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from overrides import override
from torch import Tensor, nn
from torch.nn import functional as F

from optim.native import load_library

SOURCE = Path(__file__).with_name("norm_relu.cpp")
LANES = 16  # channels in a group of the native function


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(x) + shortcut); `x` is [N, C, H, W], `shortcut` like it or None."""
    if _is_native(norm, x, shortcut) and library():
        if norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked += 1
        return _NormRelu.apply(x, norm.weight, norm.bias, shortcut, norm)
    out = norm(x)
    return F.relu(out if shortcut is None else out + shortcut, inplace=True)


def _is_native(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None) -> bool:
    return (
        norm.training
        and x.device.type == "cpu"
        and x.dim() == 4
        and not torch.compiler.is_compiling()
        and type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.running_mean is not None
        and norm.momentum is not None
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] % LANES == 0
        and x.numel() > x.shape[1]
        and x.is_contiguous(memory_format=torch.channels_last)
        and (shortcut is None or _is_of_rows(shortcut, like=x))
        and all(_is_of_channels(each, x) for each in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    )


def _is_of_rows(tensor: Tensor, like: Tensor) -> bool:
    return tensor.shape == like.shape and tensor.dtype == like.dtype and tensor.device.type == "cpu"


def _is_of_channels(tensor: Tensor, x: Tensor) -> bool:
    """Whether it is float32 [channels of x], without gaps."""
    expected = tensor.shape == x.shape[1:2] and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    return expected and tensor.is_contiguous()


class _NormRelu(torch.autograd.Function):
    @staticmethod
    @override(check_signature=False)  # torch declares *args
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, shortcut: Tensor | None, norm: nn.BatchNorm2d
    ) -> Tensor:
        y, mean, inverse_std = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        tracked = norm.track_running_stats
        running = {"running_mean": norm.running_mean, "running_var": norm.running_var} if tracked else {}
        values = {"x": x, "shortcut": shortcut, "y": y, "weight": weight, "bias": bias}
        arguments = _arguments(values | running | {"mean": mean, "inverse_std": inverse_std}, norm.eps, norm.momentum)
        library().norm_relu_forward(arguments)
        torch.autograd.graph.increment_version(running.values())
        ctx.save_for_backward(x, y, weight, mean, inverse_std)
        ctx.has_shortcut, ctx.eps = shortcut is not None, norm.eps
        return y

    @staticmethod
    @override(check_signature=False)
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, mean, inverse_std = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: they will be differentiated
            return _differentiable_backward(x, weight, torch.where(y > 0, grad_y, 0), ctx.eps, ctx.has_shortcut)
        # A write to `.data` between the passes may have changed what was saved.
        rows = all(_is_of_rows(tensor, like=y) for tensor in (x, grad_y))
        if not (rows and _is_of_channels(weight, y) and x.is_contiguous(memory_format=torch.channels_last)):
            raise RuntimeError("relu(batch_norm(x)): x or the weight got another shape or dtype after forward")
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        grad_shortcut = torch.empty_like(x) if ctx.has_shortcut else None
        values = {"x": x, "y": y, "weight": weight, "mean": mean, "inverse_std": inverse_std, "grad_y": grad_y}
        grads = {"grad_x": grad_x, "grad_shortcut": grad_shortcut, "grad_weight": grad_weight, "grad_bias": grad_bias}
        library().norm_relu_backward(_arguments(values | grads))
        return grad_x, grad_weight, grad_bias, grad_shortcut, None


def _differentiable_backward(
    x: Tensor, weight: Tensor, grad_sum: Tensor, eps: float, has_shortcut: bool
) -> tuple[Tensor | None, ...]:
    """What `_NormRelu.backward` returns, by torch's functions."""
    normalised = F.batch_norm(x, None, None, weight, training=True, eps=eps)
    grad_x, grad_weight = torch.autograd.grad(normalised, (x, weight), grad_sum, create_graph=True)
    grad_bias = grad_sum.sum((0, 2, 3), dtype=weight.dtype)
    return grad_x, grad_weight, grad_bias, grad_sum if has_shortcut else None, None


ADDRESSES = (
    "x", "shortcut", "y", "weight", "bias", "mean", "inverse_std", "running_mean", "running_var",
    "grad_y", "grad_x", "grad_shortcut", "grad_weight", "grad_bias",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    """struct NormRelu of norm_relu.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ADDRESSES),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
        *((name, ctypes.c_int64) for name in ("rows", "channels", "bfloat16", "threads")),
    ]


def _arguments(tensors: dict[str, Tensor | None], eps: float = 0.0, momentum: float = 0.0) -> _Arguments:
    x = tensors["x"]
    return _Arguments(
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
        eps=eps,
        momentum=momentum,
        rows=x.numel() // x.shape[1],
        channels=x.shape[1],
        bfloat16=x.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None after one warning."""
    signature = None, [ctypes.POINTER(_Arguments)]
    signatures = {"norm_relu_forward": signature, "norm_relu_backward": signature}
    return load_library(SOURCE, signatures, "torch's slower batch norm is used")
