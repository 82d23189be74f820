"""A CPU stand-in for torch.cuda.CUDAGraph: it records the operators of torch that run, and runs them again.

Like a real graph it repeats operations on the same tensors and no line of Python, so it shows what a graph would lose:
a learning rate that is a number, a batch that is not copied to the fixed tensors. It refuses what a real capture
refuses, reading a tensor's value. Unlike a real capture, it computes while it records; the first replay is therefore
empty. Only torch's own operators are seen, so native steps and kernels of Triton are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from classification import cuda_graph


class Tape(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: a tensor's value is read")
        result = operator(*args, **(kwargs or {}))
        self.operations.append((operator, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        with torch.no_grad():
            for operator, args, kwargs, recorded in self.operations:
                for old, new in zip(tree_flatten(recorded)[0], tree_flatten(operator(*args, **kwargs))[0], strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextmanager
def recording(tape: Tape, capture_error_mode: str) -> Iterator[None]:
    """In the place of torch.cuda.graph."""
    with tape:
        yield


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Let classification/cuda_graph.py record on the CPU; the list fills with what it records."""
    tapes: list[Tape] = []

    def made() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(cuda_graph, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(cuda_graph, "can_capture", lambda device: True)
    for name, value in {
        "CUDAGraph": made,
        "graph": recording,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return tapes
