"""Compiles a C++ file of this repository for the processor at hand, at first use; the result is kept in a cache.

The C++ has a plain C interface and includes nothing of torch: it compiles in seconds, works with any version of torch,
and is called through ctypes. The cache ($TORCH_EXTENSIONS_DIR, else ~/.cache) is keyed by the source, the compiler and
the processor.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


class NotCompiled(Exception):
    """Why there is no library, in one line."""


def compile_library(source: Path) -> Path:
    """The shared library of one C++ file, from the cache where it is there. Raises NotCompiled."""
    try:
        return _compile(source)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiled((getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]) from error


def _compile(source: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found (CXX, c++, g++, clang++)")
    version = _run([*compiler.split(), "--version"])
    key = hashlib.sha256("\0".join([source.read_text(), *FLAGS, version, _processor()]).encode()).hexdigest()[:16]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = folder / "apollo_optim" / f"{source.stem}_{key}.so"
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
            _run([*compiler.split(), *FLAGS, "-fopenmp", str(source), "-o", temporary])
        except subprocess.CalledProcessError:
            _run([*compiler.split(), *FLAGS, "-fopenmp-simd", str(source), "-o", temporary])
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
