"""Whole runs of the CIFAR-10 cell: ResNet-110 with Apollo as published.

Digits, to the end, say whether it learns. 50,000 images of noise say how long an epoch takes.
"""

import json
import os
import signal
import threading
from typing import Any

from benchmarks.gpu.data import images_in_memory
from benchmarks.gpu.record import Part
from benchmarks.gpu.worker import Place
from benchmarks.turns import CONFIGS
from classification.config import Config
from classification.train import train
from engine.config import load_config
from engine.distributed import setup

CELL = CONFIGS / "cifar10" / "apollo_milestone.yaml"
EPOCHS = 164  # published


def check(part: Part, place: Place) -> None:
    toy = ["model.depth=8", "batch=32"] if place.dry else []
    precision = "precision=fp32" if place.dry else "precision=bf16"
    with images_in_memory(place.packages, *((64, 10) if place.dry else (50_000, 10_000))):
        epochs = 1 if place.dry else 60
        schedule = [f"epochs={epochs}", f"schedule.milestones=[{max(1, epochs // 2)},{max(2, 3 * epochs // 4)}]"]
        if part.has_time("digits"):
            part.add("digits", **run("digits", ["data={name: digits}", *schedule, precision, *toy], part, place, 0.5))
        if part.has_time("noise"):
            share = 0.005 if place.dry else 1.0  # a few seconds
            part.add("noise", **run("noise", ["data={name: folder}", precision, *toy], part, place, share))


def ask_to_stop(seconds: float, done: threading.Event) -> None:
    """Send this process the signal after so many seconds, then each second until done."""
    while not done.wait(seconds):
        os.kill(os.getpid(), signal.SIGUSR2)
        seconds = 1.0


def run(name: str, settings: list[str], part: Part, place: Place, share: float) -> dict[str, Any]:
    """Train for at most this share of the part's time; then a signal ends the run."""
    folder = place.scratch / f"whole_{name}"
    config = load_config(Config, CELL, [*settings, f"run_dir={folder}", f"device={place.device.type}"])
    done = threading.Event()
    previous = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # until the loop listens to it
    threading.Thread(target=ask_to_stop, args=(part.left() * share, done), daemon=True).start()
    try:
        train(config, setup(config.device))
    finally:
        done.set()
        signal.signal(signal.SIGUSR2, previous)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    found: dict[str, Any] = {"precision": config.precision, "epochs": len(epochs), "of": config.epochs}
    if epochs:
        last = epochs[-1]
        found |= {"top1": last["test_top1"], "train_loss": last["train_loss"]}
        found |= {"examples_per_s": last["examples_per_s"], "s_per_epoch": last["wall_s"] / len(epochs)}
        found["minutes_for_164_epochs"] = found["s_per_epoch"] * EPOCHS / 60
    if name == "digits" and not place.dry:
        found["ok"] = bool(epochs) and epochs[-1]["test_top1"] > 90
    return found
