"""Synthetic run folders, as the three train.py leave them, for the tests of the report and for measuring its time.

python -m tests.report_runs FOLDER COUNT      writes COUNT run folders there: tables of searches and of final runs
"""

import json
import math
import random
import sys
from pathlib import Path

import yaml

METHODS = {"sgd": 0.1, "adam": 0.001, "radam": 0.001, "apollo": 0.5}  # and the rate that is best for each
EPOCHS, UPDATES_PER_EPOCH, LOG_LINES = 12, 100, 4
KEYS = {
    "top1": ("train_loss", "test_top1"),
    "ppl": ("train_ppl", "test_ppl"),
    "fairseq_bleu": ("train_loss", "valid_bleu"),
}


def write_run(
    folder: Path,
    table: str,
    row: str,
    seed: int,
    rate: float,
    metric: str = "top1",
    decay: float = 5e-4,
    epochs: int = EPOCHS,
) -> dict:
    """Write one complete run: the better its rate, the higher it ends, and above five times the best it diverges."""
    folder.mkdir(parents=True)
    draw = random.Random(f"{table} {row} {seed} {rate} {decay}")
    octaves = math.log2(rate / METHODS[row])
    diverged = octaves > 3.5
    top = 90 - octaves**2 - abs(math.log2(decay / 5e-4)) / 4 + draw.gauss(0, 0.2) + 0.3 * len(row)
    config = {
        "table": table,
        "row": row,
        "optimizer": {"name": row, "lr": rate, "weight_decay": decay},
        "schedule": {"name": "milestone", "milestones": [8, 10], "decay_rate": 0.1},
        "seed": seed,
        "run_dir": str(folder),
        "batch": 128,
        "passes": 1,
        "accumulation": 1,
        "precision": "fp32",
        "compile": False,
        "device": "auto",
        "log_every": 50,
        "tensorboard": False,
        "checkpoint": {"minutes": 10.0, "keep": 2},
        "epochs": epochs,
        "data": {"name": "synthetic", "root": "data", "mean": None, "std": None, "workers": None},
        "model": {"name": "resnet", "depth": 8},
        "channels_last": True,
        "sync_batchnorm": False,
        "eval_batch": 1000,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None))
    environment = {
        "command": f"python -m classification.train x.yaml run_dir={folder}",
        "started": "2026-01-01T00:00:00+00:00",
        "python": "3.11",
        "torch": "2.6",
        "device": "a processor, 2 cores",
        "git": "0" * 40,
        "recipe": {"world_size": 1, "batchnorm_batch": 128},
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))
    train_key, test_key = KEYS[metric]
    lines, value = [], 0.0
    for epoch in range(1, epochs + 1):
        update = epoch * UPDATES_PER_EPOCH
        value = top * (1 - 0.7 ** (epoch + 1)) + draw.gauss(0, 0.3)
        value = 4000 / value if metric == "ppl" else value
        where = {"update": update, "epoch": epoch}
        lines += [{"kind": "train", **where, "loss": 2 / epoch, "lr": rate}] * LOG_LINES
        measured = {
            train_key: 2 / epoch + draw.random() / 20,
            test_key: value,
            "wall_s": round(epoch * (9 + len(row)), 1),
        }
        lines.append({"kind": "epoch", **where, **measured})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[: 4 if diverged else None]))
    result = {
        "table": table,
        "row": row,
        "schedule": "milestone",
        "seed": seed,
        "metric": metric,
        "final": value,
        "best": value,
        "validation": value + draw.gauss(0, 0.3),
        "examples_per_s": 1280.0,
        "optimizer_ms_per_step": 1.5 * len(row),
        "peak_memory_mb": 812.5,
        "wall_s": epochs * 12.5,
        "complete": True,
    }
    if diverged:
        result |= {"diverged": True, "final": None, "best": None, "validation": None}
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return result


def write_search(runs: Path, table: str, row: str, metric: str = "top1") -> None:
    """Seven rates, half a decade apart, then the decay at a fifth and at five times: nine trials."""
    best = METHODS[row]
    rates = [best * 10 ** (step / 2) for step in range(-3, 4)]
    for number, (rate, decay) in enumerate([*((rate, 5e-4) for rate in rates), (best, 1e-4), (best, 2.5e-3)]):
        write_run(runs / table / "search" / row / f"trial{number}", table, row, 7, rate, metric, decay)


def write_tables(runs: Path, count: int) -> int:
    """At least `count` run folders: tables of four methods, each with a search and with 40 final runs."""
    written, number = 0, 0
    while written < count:
        metric = tuple(KEYS)[number % len(KEYS)]
        table, number = f"synthetic{number:02d}", number + 1
        for row, rate in METHODS.items():
            write_search(runs, table, row, metric)
            for seed in range(40):
                write_run(runs / table / f"{row}_milestone/seed{seed}", table, row, seed, rate, metric)
            written += 49
    return written


if __name__ == "__main__":
    print(write_tables(Path(sys.argv[1]), int(sys.argv[2])), "run folders")
