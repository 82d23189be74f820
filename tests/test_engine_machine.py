"""What the machine has: hardware threads, and instructions for bfloat16."""

import subprocess
import sys

import pytest
import torch

from engine.machine import cpu_name
from engine.run import create_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("description", "warned"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", True),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", False),
        ("flags\t\t: fpu amx_bf16 amx_tile", False),
        ("Features\t: fp asimd asimdhp", True),
        ("Features\t: fp asimd bf16 i8mm", False),
        ("Processor\t: one that does not say what it can do", False),
    ],
)
def test_bf16_on_a_cpu_without_it_brings_one_warning(tmp_path, monkeypatch, description, warned):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{description}\n\nprocessor\t: 1\n{description}\n")
    monkeypatch.setattr("engine.machine.CPU_INFO", tmp_path / "cpuinfo")
    said = []
    for name in ("fp32", "bf16"):
        create_precision(name, CPU, said.append)
    assert len(said) == warned and all("precision=fp32" in line for line in said)
    create_precision("bf16", torch.device("cuda"), pytest.fail)


def test_hardware_threads_are_called_so(tmp_path, monkeypatch):
    """Two threads of one core."""
    thread = "processor\t: {}\nmodel name\t: Engine 1\nsiblings\t: 2\ncpu cores\t: 1\n\n"
    (tmp_path / "cpuinfo").write_text(thread.format(0) + thread.format(1))
    monkeypatch.setattr("engine.machine.CPU_INFO", tmp_path / "cpuinfo")
    assert cpu_name() == "Engine 1, 2 hardware threads"


def test_cores_are_those_that_the_process_may_use():
    program = """if True:
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from engine.machine import core_count
        print(core_count())
    """
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "1\n"
