"""Does a run that was killed go on on a GPU as if nothing had happened? With deterministic=true, to the same bits.

SIGKILL ends one process of each task in mid-epoch. Its run continues here, and its last checkpoint is compared
with that of a run without a break.
"""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.data import images_in_memory
from benchmarks.gpu.record import Part
from benchmarks.gpu.worker import Place, is_usable
from benchmarks.turns import CONFIGS
from engine.config import load_config
from engine.distributed import setup

COMMON = ["deterministic=true", "log_every=1", "checkpoint.minutes=0"]  # a checkpoint after every update
KILLED_AT = 5  # updates, at least
TASKS: dict[str, tuple[str, str, list[str]]] = {
    "images": ("classification.train", "digits/apollo.yaml", ["epochs=2", "batch=128"]),
    "words": ("language_model.train", "pydoc_topics/apollo.yaml", ["epochs=1", "batch=128", "model.hidden=64"]),
    "sentences": ("nmt.train", "grammar/apollo.yaml", ["updates=20", "average.every=10", "decoding.beam=1"]),
}
SHORTER = {"images": ["epochs=1"], "words": ["batch=256"], "sentences": ["updates=10"]}  # in a dry run


def check(part: Part, place: Place) -> None:
    with images_in_memory(place.packages, 100, 10):
        try:
            kill_all(part, place)
            for task in TASKS:
                if part.has_time(task):
                    part.add(task, **compared(task, place))
                    if not is_usable(place.device):
                        raise RuntimeError(f"after '{task}' the device refuses everything")
        finally:
            torch.use_deterministic_algorithms(False)  # the runs ask for it; the next parts do not


def kill_all(part: Part, place: Place) -> None:
    """Start them together, and kill each once it has logged enough updates."""
    command = [sys.executable, "-m", "benchmarks.gpu.resuming"]
    started = {
        task: subprocess.Popen([*command, task, str(place.packages), *settings(task, place, "killed")])
        for task in TASKS
    }
    try:
        while started and part.left() > 0:
            for task, process in list(started.items()):
                if process.poll() is not None:
                    raise RuntimeError(f"{task}: ended with status {process.returncode} before it was killed (log.txt)")
                if logged(place.scratch / "killed" / task) >= KILLED_AT:
                    process.kill()
                    process.wait()
                    del started[task]
            time.sleep(0.02)
        if started:
            raise RuntimeError(f"no time left before {', '.join(started)} had logged {KILLED_AT} updates")
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def settings(task: str, place: Place, kind: str) -> list[str]:
    _, config, own = TASKS[task]
    data = [f"data.root={place.scratch / 'grammar'}"] if task == "sentences" else []
    places = [f"run_dir={place.scratch / kind / task}", f"device={place.device.type}"]
    return [str(CONFIGS / config), *COMMON, *own, *(SHORTER[task] if place.dry else []), *data, *places]


def logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def compared(task: str, place: Place) -> dict[str, Any]:
    at = logged(place.scratch / "killed" / task)
    for kind in ("killed", "whole"):
        train(task, settings(task, place, kind))
    ours, theirs = (tensors(place.scratch / kind / task) for kind in ("killed", "whole"))
    differing = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    lines = (place.scratch / "whole" / task / "metrics.jsonl").read_text().splitlines()
    updates = max(json.loads(line)["update"] for line in lines)
    found = {"killed_at": at, "updates": updates, "tensors": len(theirs), "differing": differing[:5]}
    return found | {"ok": not differing}


def train(task: str, arguments: list[str]) -> None:
    module = import_module(TASKS[task][0])  # here, as each process needs one alone
    config = load_config(module.Config, arguments[0], arguments[1:])
    status = module.train(config, setup(config.device, config.deterministic))
    if status:
        raise RuntimeError(f"{config.folder}: the run ended with status {status}")


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """The last checkpoint's tensors by their place."""
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                walk(child, f"{name}/{key}")

    walk(torch.load(run_dir / "checkpoint.pt", weights_only=True, map_location="cpu"), "")
    return found


if __name__ == "__main__":  # the process that is killed: task, folder of the packed digits, arguments
    with images_in_memory(Path(sys.argv[2]), 100, 10):
        train(sys.argv[1], sys.argv[3:])
