"""Runs the parts of benchmarks/gpu.sh in one process; without CUDA only in a dry run. main.py gives the arguments."""

import gc
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.main import SHARES
from benchmarks.gpu.record import Part, Record
from benchmarks.gpu.summary import write_summary


class Place(NamedTuple):
    """What a part works with."""

    device: torch.device
    dry: bool  # on the CPU, at toy size
    scratch: Path  # removed at the end
    packages: Path  # of --pack; perhaps not there


def main(arguments: list[str]) -> int:
    path, scratch, packages = map(Path, arguments[:3])
    until, names, dry = float(arguments[3]), arguments[4].split(","), arguments[5] == "dry"
    record = Record(path)
    if not (dry or torch.cuda.is_available()):
        for name in names:
            record.end(name, "not run", f"torch {torch.__version__} finds no CUDA device here")
        return 0
    place = Place(torch.device("cpu") if dry else torch.device("cuda", 0), dry, scratch, packages)
    record.values["machine"] = record.values.get("machine", {}) | describe()  # a process before may have measured it
    while names:
        name, *others = names
        share = SHARES[name] / sum(SHARES[each] for each in names)
        seconds = (until - time.time()) * share
        if seconds < 1:
            record.end(name, "not run", "no time was left")
        elif not run_part(name, place, record, seconds):
            return 1
        names = others
        write_summary(record, path.with_name("summary.md"))
    return 0


def run_part(name: str, place: Place, record: Record, seconds: float) -> bool:
    """False where the device has failed: then CUDA refuses everything in this process."""
    part = Part(record, name, seconds)
    print(f"\n== {name}, {seconds:.0f} s", flush=True)
    try:
        import_module(f"benchmarks.gpu.{name}").check(part, place)
    except Exception as error:
        traceback.print_exc()
        record.end(name, "failed", f"{type(error).__name__}: {error}")
    else:
        record.end(name, "done")
    return is_usable(place.device)


def is_usable(device: torch.device) -> bool:
    """Free the device's memory; False where that fails."""
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


def describe() -> dict[str, str | float | None]:
    """The machine. The imports are here, as they need the packages."""
    from engine.distributed import setup
    from engine.run_record import describe_environment

    found = describe_environment(setup("auto"))
    kept = {key: value for key, value in found.items() if isinstance(value, str | int | float) or value is None}
    kept["cuda"] = torch.version.cuda
    return kept


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
