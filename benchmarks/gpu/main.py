"""benchmarks/gpu.sh: starts the process that runs the parts, and limits their time.

All run in one process, as importing, compiling and starting a GPU take longer than most of them. After a kernel that
hangs or faults, a new process goes on. This file needs only Python.
"""

import argparse
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.gpu.record import Record
from benchmarks.gpu.summary import write_summary

# The parts in order of worth, and their shares of the time; the next ones get what one leaves over.
SHARES = {"steps": 0.2, "optimizer": 0.15, "training": 0.35, "resuming": 0.1, "whole_runs": 0.2}
WORKER = "benchmarks.gpu.worker"
GRACE_S = 20  # for the case at work to end by itself
PACKAGES = Path(__file__).parent / "packages"
# Some of setup.py's experiments. torchvision fits one torch alone; neither it nor scipy is needed here.
NEEDED = ["numpy", "pydantic", "pyyaml", "overrides", "tqdm", "pillow", "safetensors", "xxhash"]
NEEDED += ["sacremoses", "sacrebleu", "tokenizers"]
MOST_BYTES = 60_000_000


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu.sh", description="all that needs a GPU")
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu_results"), help="folder (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (%(default)s)")
    parser.add_argument("--parts", default=",".join(SHARES), help="comma-separated (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy size")
    parser.add_argument("--packages", type=Path, default=PACKAGES, metavar="FOLDER", help="of --pack (%(default)s)")
    parser.add_argument("--pack", nargs="?", const=platform.python_version(), metavar="PYTHON", help="and do no more")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts.split(",")) - set(SHARES):
        parser.error(f"--parts: {', '.join(sorted(unknown))}; there are {', '.join(SHARES)}")
    if options.pack:
        return pack(options.packages, options.pack)
    return check(options)


def pack(folder: Path, python: str) -> int:
    """Fetch the packages for that Python, and write the digits as one file."""
    from benchmarks.gpu.data import pack_digits  # here, as it needs the packages

    folder.mkdir(parents=True, exist_ok=True)
    version = ".".join(python.split(".")[:2])
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--dest", str(folder)]
    subprocess.run([*pip, "--only-binary=:all:", "--python-version", version, *NEEDED], check=True)
    pack_digits(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB for Python {version}; it travels with the checkout")
    if size > MOST_BYTES:
        print(f"error: that is more than {MOST_BYTES / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 0


def unpack(packages: Path, site: Path) -> list[str]:
    """Unpack what this interpreter lacks into `site`; returns names."""
    missing = []
    for wheel in sorted(packages.glob("*.whl")):
        name = wheel.name.split("-")[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            missing.append(name)
    return missing


def check(options: argparse.Namespace) -> int:
    """Run the parts. Returns 1 where one failed or found something wrong."""
    until = time.time() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the worker too
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "record.json"
    path.unlink(missing_ok=True)
    record = Record(path)
    record.values |= {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dry_run": options.dry_run,
        "minutes": options.minutes,
    }
    with tempfile.TemporaryDirectory() as scratch, open(options.out / "log.txt", "w") as log:
        record.values["unpacked"] = unpack(options.packages, Path(scratch) / "site")
        record.write()
        environment = environment_of(options, Path(scratch))
        remaining, mode = options.parts.split(","), "dry" if options.dry_run else "gpu"
        while remaining:
            arguments = [path, scratch, options.packages, str(until), ",".join(remaining), mode]
            command = [sys.executable, "-m", WORKER, *arguments]
            worker = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            try:
                stopped = supervise(worker, path, until)
            finally:
                worker.kill()
                worker.wait()
            record = Record(path)
            said = last_line(options.out / "log.txt")
            at_work = next((name for name in remaining if record.parts.get(name, {}).get("status") == "running"), None)
            if at_work and stopped:
                record.end(at_work, "stopped", "its time was over")
            elif at_work:
                record.end(at_work, "failed", f"the process ended with status {worker.returncode}: {said}")
            elif not any(name in record.parts for name in remaining):  # it ended before its first part
                for name in remaining:
                    record.end(name, "failed", said)
            remaining = [name for name in remaining if name not in record.parts]
            write_summary(record, options.out / "summary.md")
    print((options.out / "summary.md").read_text())
    return int(not all_fine(record))


def environment_of(options: argparse.Namespace, scratch: Path) -> dict[str, str]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] += f"{os.pathsep}{scratch / 'site'}"
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for deterministic=true; read at the first use
    if options.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def supervise(worker: subprocess.Popen, path: Path, until: float) -> bool:
    """Wait for the worker; True where a part did not end in time."""
    while worker.poll() is None:
        time.sleep(0.2)
        limits = [part["until"] for part in Record(path).parts.values() if "until" in part] or [until]
        if time.time() > max(limits) + GRACE_S:
            return True
    return False


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def all_fine(record: Record) -> bool:
    cases = [case for part in record.parts.values() for case in part["cases"].values()]
    failed = any(part["status"] in ("failed", "stopped") for part in record.parts.values())
    return not failed and all(case.get("ok", True) for case in cases)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
