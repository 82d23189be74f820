"""Compiles a C++ file of this repository for this processor at first use, and caches the result.

The C++ has a plain C interface without torch, so it compiles in seconds and works with any torch. The cache is in
$TORCH_EXTENSIONS_DIR, $XDG_CACHE_HOME or ~/.cache. Its key is made of the sources, the compiler with its flags, and the
processor.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

Signatures = dict[str, tuple[type | None, list[type]]]  # ctypes of a function's result and arguments, by its name
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


class NotCompiled(Exception):
    """The reason, in one line."""


def load_library(source: Path, signatures: Signatures, instead: str) -> ctypes.CDLL | None:
    """The library of one C++ file. If there is none: None, after a warning that names what is used `instead`.

    Callers cache the result, so that they warn only once.
    """
    try:
        library = ctypes.CDLL(str(compile_library(source)))
    except (NotCompiled, OSError) as error:
        warnings.warn(f"{source.name} could not be compiled and loaded, {instead}: {error}", stacklevel=3)
        return None
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def compile_library(source: Path) -> Path:
    """The path of the shared library, compiled if not in the cache. Raises NotCompiled."""
    try:
        return _compile(source)
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NotCompiled(next((line for line in lines if "error:" in line), lines[0])) from error


def _compile(source: Path) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found (CXX, c++, g++, clang++)")
    version = _run([*compiler.split(), "--version"])
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, *FLAGS, version, _processor()]).encode()).hexdigest()[:16]
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    built = folder / "apollo_optim" / f"{source.stem}_{key}.so"
    if built.exists():
        return built
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # no writable cache: compile for this process alone
        built = Path(tempfile.mkdtemp(prefix="apollo_optim_")) / built.name

    # Several processes may build at once: each renames a file of its own. Compilers without OpenMP (Apple's) still
    # vectorise the loops, on one thread.
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


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
