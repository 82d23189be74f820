"""The C++ of this repository under AddressSanitizer and UndefinedBehaviorSanitizer: `python -m benchmarks.sanitize`.

A child process builds the three C++ files with the sanitizers and runs their tests, some minutes long. A wrong read or
write, or undefined behaviour, ends it with a report. Needs g++ or clang++ with its sanitizers.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.errors import UserError, run_main

SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")
TESTS = (
    "tests/test_optim_memory.py",
    "tests/test_optim_fused_cpu.py",
    "tests/test_optim_random.py",
    "tests/test_classification_norm_relu.py",
    "tests/test_classification_resize.py",
)
# Tests that need a compiler of their own, or look at how and where libraries are built.
LEFT_OUT = "not without_a_compiler and not a_build_is_kept and not state_dict_helpers"
CHILD = """
import sys
import optim.native
optim.native.FLAGS += tuple(sys.argv[1].split())
from optim.fused import cpu
from classification.native import norm_relu, resize
assert cpu.library() and norm_relu.library() and resize.native_resize(), "not all of the C++ could be built"
import pytest
sys.exit(pytest.main(["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-s", "-k", sys.argv[2], *sys.argv[3:]]))
"""


def main(arguments: list[str]) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise UserError("benchmarks.sanitize needs a C++ compiler: c++, g++, or the one that CXX names")
    # The sanitizer must be loaded first, with the C++ library, whose exceptions it watches.
    preloaded = [_library(compiler, name) for name in ("libasan.so", "libstdc++.so")]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(preloaded),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TORCH_EXTENSIONS_DIR": folder,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }
        command = [sys.executable, "-c", CHILD, " ".join(SANITIZED), LEFT_OUT, *(arguments or TESTS)]
        done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent)
    if done.returncode != 0:
        raise UserError(f"the sanitized run ended with status {done.returncode}: see its report above")
    print("the sanitizers found nothing")


def _library(compiler: str, name: str) -> str:
    found = subprocess.run(
        [*compiler.split(), f"-print-file-name={name}"], capture_output=True, text=True
    ).stdout.strip()
    if not Path(found).is_file():
        raise UserError(f"{compiler} has no {name}: install its sanitizers, or name another compiler in CXX")
    return found


if __name__ == "__main__":
    run_main(main)
