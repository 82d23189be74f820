"""The machine's processor, and the memory of processes. Linux counts hardware threads, of which a core may have two."""

import os
import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
# Linux's names of instructions that multiply bfloat16 numbers: AVX-512-BF16 and AMX on x86, BF16 on ARM.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def core_count() -> int:
    """How many hardware threads this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name and number of hardware threads."""
    names = _cpu_info("model name")
    return f"{names[0]}, {len(names)} hardware threads" if names else platform.processor() or platform.machine()


def cpu_has_bf16() -> bool | None:
    """Whether the processor has bfloat16 arithmetic; None if unknown."""
    flags = cpu_flags()
    return not BF16_FLAGS.isdisjoint(flags) if flags else None


def cpu_flags() -> list[str]:
    """The processor's features by Linux's names (avx2, amx_bf16, ...), if it reports them."""
    lines = _cpu_info("flags") or _cpu_info("Features")
    return lines[0].split() if lines else []


def _cpu_info(key: str) -> list[str]:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        return []
    return [value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key]


def memory_of_tree_mb(pid: int) -> float:
    """The sum of the peak resident MiB of a process and of each descendant; 0 if unknown."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), "0")
    return int(peak) / 1024 + sum(memory_of_tree_mb(int(child)) for child in children)
