"""Apollo's fused step on the CPU: one call into csrc/apollo_cpu.cpp for a whole list of tensors.

The C++ has a plain C interface and includes nothing of torch: it compiles in seconds, works with any version of torch,
and is called through ctypes. It is compiled for this machine's processor at first use and kept in a cache, keyed by its
source, the compiler and the processor; `python -m optim.fused_cpu` does so beforehand.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from array import array
from functools import cache
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .layout import lay_out_like
from .sharded import ProcessGroups, join_sums

SOURCE = Path(__file__).parent / "csrc" / "apollo_cpu.cpp"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
SUM, UPDATE, DIRECTION = 1, 2, 4


class _Settings(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta", "eps", "sigma", "init_lr", "l2", "decay", "grad_factor")),
        *((name, ctypes.c_int64) for name in ("warmup", "belief", "stable")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """The compiled step, or None, after one warning, where it cannot be compiled."""
    try:
        path = _build()
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        warnings.warn(
            f"Apollo's fused CPU step could not be compiled, the slower foreach step is used instead: {detail}",
            stacklevel=2,
        )
        return None
    loaded = ctypes.CDLL(str(path))
    loaded.apollo_step.argtypes = [ctypes.c_void_p] * 2 + [ctypes.POINTER(_Settings)] + [ctypes.c_int64] * 4
    loaded.apollo_step.restype = None
    return loaded


def _fused_cpu_apollo(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    directions: list[Tensor | None],
    sigmas: list[Tensor | None],
    steps: list[Tensor],
    shards: list[ProcessGroups],
    numels: list[int],
    *,
    lr: float | Tensor,
    beta: float,
    eps: float,
    sigma: float,
    warmup: int,
    init_lr: float,
    weight_decay: float,
    weight_decay_type: str,
    rebound: str,
    maximize: bool,
    capturable: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The step of parameters of one dtype whose memory has no gaps. See optim/apollo.py for the arguments."""
    if found_inf is not None and found_inf.item():
        return
    stored, belief = directions[0] is not None, rebound == "belief"
    stable = weight_decay != 0 and weight_decay_type == "stable"
    grads = lay_out_like(params, grads, exp_avgs, hessians, *([directions] if stored else []))
    tensors = (params, grads, exp_avgs, hessians, directions if stored else None, sigmas if belief else None, steps)
    columns = [[0] * len(params) if column is None else [x.data_ptr() for x in column] for column in tensors]
    columns += [[param.numel() for param in params], numels]
    table = array("q", chain.from_iterable(zip(*columns, strict=True)))  # rows are the struct ApolloTensor

    sums = torch.zeros(len(params), 5, dtype=torch.float64)
    factor = (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else grad_scale.item())
    l2, decay = (weight_decay, 0.0) if weight_decay_type == "L2" else (0.0, weight_decay)
    settings = _Settings(float(lr), beta, eps, sigma, init_lr, l2, decay, factor, int(warmup), belief, stable)

    def run(stages: int) -> None:
        library().apollo_step(
            table.buffer_info()[0],
            sums.data_ptr(),
            settings,
            len(params),
            DTYPES[params[0].dtype],
            stages,
            torch.get_num_threads(),
        )

    increment_version(params)  # written to behind autograd's back
    if not any(shards):
        run(SUM | UPDATE | DIRECTION if stable else SUM | UPDATE)
        return
    run(SUM)
    join_sums(sums[:, :3], shards)
    if belief:
        join_sums(sums[:, 4:], shards, largest=True)
    run(UPDATE)
    if stable:
        join_sums(sums[:, 3:4], shards)
        run(DIRECTION)


def _build() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found (CXX, c++, g++, clang++)")
    version = _run([*compiler.split(), "--version"])
    key = hashlib.sha256("\0".join([SOURCE.read_text(), *FLAGS, version, _processor()]).encode()).hexdigest()[:16]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = folder / "apollo_optim" / f"apollo_cpu_{key}.so"
    if built.exists():
        return built
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        built = (
            Path(tempfile.mkdtemp(prefix="apollo_optim_")) / built.name
        )  # no home to write to: for this process alone

    # Several processes may build at once: each into a file of its own, then renamed. Compilers without OpenMP (Apple's)
    # still vectorise the loops, on one thread.
    handle, temporary = tempfile.mkstemp(dir=built.parent, suffix=".so")
    os.close(handle)
    try:
        try:
            _run([*compiler.split(), *FLAGS, "-fopenmp", str(SOURCE), "-o", temporary])
        except subprocess.CalledProcessError:
            _run([*compiler.split(), *FLAGS, "-fopenmp-simd", str(SOURCE), "-o", temporary])
        os.replace(temporary, built)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return built


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


if __name__ == "__main__":
    print(_build())
