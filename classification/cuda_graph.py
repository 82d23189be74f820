"""An update in CUDA graphs: its kernels are recorded once and then started by two calls.

At batch 128 an update of ResNet-110 starts some 1,100 kernels, most of them shorter than their start. One graph holds
the forward and backward pass, another the optimizer's step, whose time can still be measured. The first updates, also
after a resume, run without a graph: they choose and compile kernels, and make the optimizer's state.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam

from engine.errors import UserError
from optim import Apollo

if TYPE_CHECKING:
    from classification.config import Config
    from classification.train import ImageRun

CAPTURABLE = (Apollo, Adam, AdamW, SGD, RAdam)  # their steps keep every scalar on the device
PRECISIONS = ("fp32", "tf32", "bf16")  # fp16's loss scaler and apex decide on the host whether to step
DEVICES = ("cuda",)  # tests add the CPU, which records nothing
WARMUP = 3  # calls without a graph; torch.cuda.graph asks for some


def uses_graph(config: "Config", optimizer: Optimizer, device: torch.device, world_size: int) -> bool:
    """UserError where `graph: true` asks in vain."""
    obstacle = _obstacle(config, optimizer, device, world_size)
    if config.graph and obstacle:
        raise UserError(f"graph=true needs {obstacle}; leave `graph` out, and a graph is used wherever it can be")
    return obstacle is None and config.graph is not False


def _obstacle(config: "Config", optimizer: Optimizer, device: torch.device, world_size: int) -> str | None:
    """What a graph needs and this run lacks."""
    if device.type not in DEVICES:
        return f"a GPU (device=cuda), and this run is on {device.type}"
    if world_size > 1:
        return f"a single rank, not {world_size}: between ranks gradients are exchanged in the middle of an update"
    if config.passes > 1:
        return f"updates of one pass, not passes={config.passes} (batchnorm_group can make one pass of several)"
    if config.precision not in PRECISIONS:
        return f"precision={', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, not {config.precision}"
    if config.optimizer.needs:
        return f"an optimizer whose step needs nothing but gradients, not needs={config.optimizer.needs}"
    if type(optimizer) not in CAPTURABLE:
        names = ", ".join(kind.__name__ for kind in CAPTURABLE)
        return f"an optimizer that is known to be capturable ({names}), not {config.optimizer.name}"
    if type(optimizer) is SGD and any(group["fused"] is False for group in optimizer.param_groups):
        return "fused SGD, as its other forms read the learning rate on the host: leave optimizer.fused=false out"
    return None


def use_graphs(run: "ImageRun") -> None:
    """Call it once the last checkpoint is restored."""
    forward_backward, device = run.forward_backward, run.world.device

    def one_pass(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        with counted_together(run.model):
            return forward_backward(run, images, labels)

    recorded = Recorded(one_pass, device)
    run.forward_backward = lambda run, images, labels, *_: recorded(images, labels)
    run.take_step = RecordedStep(run.optimizer, device)


class Recorded:
    """A function of tensors, recorded as a graph in call WARMUP + 1, then replayed.

    Arguments must keep their shapes and dtypes. The next call overwrites the result. The CPU records nothing.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self.function, self.device, self.calls = function, device, 0
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        if not self.calls:
            self.inputs = tuple(map(torch.empty_like, arguments))
        for own, given in zip(self.inputs, arguments, strict=True):
            own.copy_(given)
        self.calls += 1
        if not can_capture(self.device):
            return self.function(*self.inputs)
        if self.calls <= WARMUP:
            return self._warm_up()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Threads that load data may use the device meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        self.graph.replay()
        return self.outputs

    def _warm_up(self) -> tuple[Tensor, ...]:
        """Run on a stream of its own, as torch asks before a capture."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self.function(*self.inputs)
        current.wait_stream(stream)
        return outputs


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


class RecordedStep:
    """Learning rates stay numbers for schedules, checkpoints and the log. Each step copies them to the device."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        # Steps take a rate that is a number in float32 on the GPU, in float64 on the CPU.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self.rates = [torch.zeros((), dtype=dtype, device=device) for _ in optimizer.param_groups]
        self.recorded = Recorded(self._step, device)
        for state in optimizer.state.values():  # a checkpoint may have left `step` on the CPU
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(device)

    def __call__(self) -> bool:
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.recorded()
        return True

    def _step(self) -> tuple[Tensor, ...]:
        with capturable(self.optimizer, self.rates), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True")  # that nothing is captured: not yet
            self.optimizer.step()
        return ()


@contextmanager
def capturable(optimizer: Optimizer, rates: list[Tensor]) -> Iterator[None]:
    """Inside, the optimizer has these learning rates and the settings for a capture."""
    before = [dict(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
        elif group["fused"] is None:  # SGD
            group["fused"] = True
    try:
        yield
    finally:
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            group.update(settings)


@contextmanager
def counted_together(model: torch.nn.Module) -> Iterator[None]:
    """Inside, all BatchNorms count a batch in one operation."""
    norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None]
    norms = [norm for norm in norms if norm.track_running_stats and norm.momentum is not None]
    counts = [norm.num_batches_tracked for norm in norms]
    for norm in norms:
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, count in zip(norms, counts, strict=True):
            norm.num_batches_tracked = count
    if counts:
        torch._foreach_add_(counts, 1)
