"""Do the loops train on a GPU, in each precision, and how fast? Thirty updates of each, in three windows of ten.

The first window compiles, chooses kernels and records graphs. In the second torch reports operations that wait for the
device: `waits` are their places in the code. The third is timed. The last `loss` must be finite and close to fp32's.
"""

import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch

import classification.train
import language_model.train
import nmt.train
from benchmarks import lm
from benchmarks import nmt as nmt_benchmark
from benchmarks.gpu.data import images_in_memory
from benchmarks.gpu.record import Part
from benchmarks.gpu.worker import Place, is_usable
from benchmarks.turns import CONFIGS, end_of_epoch, prepared, seconds_of
from classification import cuda_graph
from engine.run import parameter_count
from engine.run_record import peak_memory_mb

WINDOW, TOY_WINDOW = 10, 2  # updates
CLOSE = 0.05  # share of the fp32 loss by which another precision's may differ

# Task, precision, more settings, and seconds at most, in order of worth.
CASES = [
    ("images", "fp32", "graph=false", 10),
    ("images", "bf16", "graph=false", 10),
    ("images", "fp32", "graph=true", 10),
    ("images", "bf16", "graph=true", 10),
    ("words", "fp32", "", 30),
    ("words", "bf16", "", 30),
    ("sentences", "fp32", "", 15),
    ("sentences", "bf16", "", 15),
    ("images", "tf32", "graph=true", 10),
    ("sentences", "tf32", "", 15),
    ("words", "tf32", "", 30),
    ("images", "fp16", "", 10),
    ("sentences", "fp16", "", 15),
    ("words", "fp16", "", 30),
    ("sentences", "bf16", "compile=true", 60),
    ("images", "bf16", "graph=true compile=true", 90),
]
FULL_SIZE = ("fp32", "tf32", "bf16")  # of Transformer-base


def check(part: Part, place: Place) -> None:
    sizes = (4 * TOY_WINDOW, 10) if place.dry else (128 * WINDOW, 1000)
    # On the CPU a graph runs its function over fixed tensors and records nothing.
    on_the_cpu = patch.object(cuda_graph, "DEVICES", ("cpu",)) if place.dry else nullcontext()
    with on_the_cpu, images_in_memory(place.packages, *sizes):
        corpus = make_words(place)
        for task, precision, more, seconds in CASES:
            case = " ".join([task, precision, more]).strip()
            if place.dry and (precision == "tf32" or "compile" in more or case == "words fp16"):
                part.add(case, skipped="not on the CPU")  # it has no such thing, or compiles for a minute
            elif part.has_time(case, 0 if place.dry else seconds):
                module, settings_of = TASKS[task]
                run_dir = place.scratch / f"training{len(part.cases)}"
                own = [*more.split(), f"precision={precision}", f"run_dir={run_dir}"]
                try:
                    found = measure(module, [*settings_of(place, corpus), *own], place)
                    found |= compare(found, part.cases.get(first_of(task), found), precision)
                except Exception as error:
                    found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
                part.add(case, **found)
                if not is_usable(place.device):
                    raise RuntimeError(f"after '{case}' the device refuses everything")
    for precision in FULL_SIZE[:1] if place.dry else FULL_SIZE:
        case = f"Transformer-base at full size, {precision}"
        if part.has_time(case, 0 if place.dry else 15):
            size = "--batch 64 --passes 1 --updates 1" if place.dry else "--batch 8192 --passes 8 --updates 3"
            arguments = ["full-size", *size.split(), "--precision", precision, "--device", place.device.type]
            part.add(case, tokens_per_s=nmt_benchmark.measure_full_size(nmt_benchmark.parse(arguments))[-1])


def first_of(task: str) -> str:
    return next(" ".join(case[:3]).strip() for case in CASES if case[0] == task)


def compare(found: dict[str, Any], in_fp32: dict[str, Any], precision: str) -> dict[str, Any]:
    loss, expected = found["loss"], in_fp32.get("loss", found["loss"])
    close = math.isfinite(loss) and abs(loss - expected) <= CLOSE * abs(expected)
    may_wait = precision == "fp16"  # its gradient scaler is asked whether the step was skipped
    return {"loss_in_fp32": expected, "ok": close and (may_wait or not found["waits"])}


def of_images(place: Place, corpus: Path) -> list[str]:
    toy = ["model.depth=8", "batch=4"] if place.dry else []
    return [str(CONFIGS / "cifar10/apollo_milestone.yaml"), "data={name: folder}", *toy]


def of_words(place: Place, corpus: Path) -> list[str]:
    toy = ["model.hidden=64", "model.cutoffs=[20,100]", "batch=4", "model.div_value=2"] if place.dry else []
    return [str(CONFIGS / "one_billion_words/apollo.yaml"), f"data.root={corpus}", *toy]


def of_sentences(place: Place, corpus: Path) -> list[str]:
    never = ["updates=100000", "validate_every=100000", "average.every=100000", "passes=1"]
    toy = "batch=256 model.width=16 model.inner_width=32 model.encoder_layers=1 model.decoder_layers=1".split()
    data = f"data={{name: grammar, root: {place.scratch / 'grammar'}}}"
    return [str(CONFIGS / "wmt14_en_de/apollo.yaml"), data, *never, *(toy if place.dry else ["batch=4096"])]


TASKS: dict[str, tuple[Any, Callable[[Place, Path], list[str]]]] = {
    "images": (classification.train, of_images),
    "words": (language_model.train, of_words),
    "sentences": (nmt.train, of_sentences),
}


def make_words(place: Place) -> Path:
    folder = place.scratch / "words"
    folder.mkdir()
    words, rows = (200, 4 * (TOY_WINDOW + 2)) if place.dry else (793_470, 128 * (WINDOW + 2))
    return lm.make_corpus(folder, words, rows * lm.LENGTH)


def measure(module: Any, settings: list[str], place: Place) -> dict[str, Any]:
    updates = TOY_WINDOW if place.dry else WINDOW
    run = prepared(module, *settings, f"device={place.device.type}", f"log_every={updates}")
    if place.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def window() -> None:
        end_of_epoch(module, run, updates)

    window()
    with counted_waits(place.device, module.log) as waits:
        window()
    seconds = seconds_of(window, run.world)
    lines = [json.loads(line) for line in (run.record.folder / "metrics.jsonl").read_text().splitlines()]
    counted = run.progress.since_evaluation[run.COUNTED] / 3  # of a window; sentences differ in length: the mean
    return {
        "loss": [line["loss"] for line in lines if line["kind"] == "train"][-1],
        "updates_per_s": updates / seconds,
        f"{run.COUNTED}_per_s": counted / seconds,
        "optimizer_ms": run.optimizer_ms[-1],
        "peak_memory_mb": peak_memory_mb(place.device),
        "parameters": parameter_count(run.model),
        "waits": dict(waits),
    }


@contextmanager
def counted_waits(device: torch.device, log_line: Callable) -> Iterator[Counter[str]]:
    """Counts operations that wait for the device, by place in the code, without those within `log_line`."""
    waits: Counter[str] = Counter()

    def note(message: Warning, category: type[Warning], filename: str, line: int, *_: Any) -> None:
        frame: FrameType | None = sys._getframe()
        while frame and frame.f_code is not log_line.__code__:
            frame = frame.f_back
        if not frame and "synchronizing" in str(message):
            waits[f"{'/'.join(Path(filename).parts[-2:])}:{line}"] += 1

    set_mode = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        set_mode("warn")
        try:
            yield waits
        finally:
            set_mode("default")
