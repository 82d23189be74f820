"""Time and memory of an optimizer step, against torch's fused AdamW, on the published models' parameter shapes.

    python -m benchmarks.optimizer_step [--device cuda] [--shapes resnet110,lstm_1b] [--json OUT] [--plot OUT.png]

The contenders are Apollo single-tensor, foreach and fused; the published algorithm (optim/apollo_reference.py); torch's
SGD with momentum, AdamW and RAdam. Gradients are random and do not change. In the language model's embedding only the
words of one batch have a gradient, unless --dense is given.

The table gives medians. `/ AdamW` is the ratio to fused AdamW. `/ floor` compares the step with the least transfers of
a tensor that it needs (Apollo: 9, SGD: 5), at the speed of fused AdamW's 7; caches or zeros can make it less than 1.
`GB/s` is these transfers over the time.
"""

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.model_shapes import SETS, gradients, shapes
from benchmarks.turns import seconds_of, table, turns
from engine.distributed import World, setup
from engine.errors import UserError, run_main
from engine.run_record import describe_environment
from optim import SGD, AdamW, Apollo, RAdam
from optim.apollo_reference import LiteralApollo

BASELINE = "AdamW fused"
LR = 1e-6  # the parameters hardly change


class Contender(NamedTuple):
    make: Callable[[list[Tensor], float], torch.optim.Optimizer]  # from parameters and weight decay
    states: int  # tensors
    temporaries: int  # lists of the parameters' size that a step makes
    transfers: int | None  # least transfers of a parameter's 4 bytes in a step; None: no floor


def contenders() -> dict[str, Contender]:
    def make(cls: type[torch.optim.Optimizer], **how: Any) -> Callable[[list[Tensor], float], torch.optim.Optimizer]:
        return lambda params, decay: cls(params, lr=LR, weight_decay=decay, **how)

    forms = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    found = {"Apollo literal": Contender(make(LiteralApollo, warmup=0), 3, 1, None)}
    for name, cls, states, temporaries, transfers, how in (
        ("Apollo", Apollo, 2, 4, 9, {"warmup": 0}),
        ("SGD", SGD, 1, 3, 5, {"momentum": 0.9}),
        ("AdamW", AdamW, 2, 3, 7, {}),
        ("RAdam", RAdam, 2, 3, None, {}),
    ):
        for form, choice in forms.items():
            if form == "fused" and cls is RAdam:
                continue  # torch has no fused RAdam
            found[f"{name} {form}"] = Contender(
                make(cls, **how, **choice),
                states,
                temporaries if form == "foreach" else 1,
                transfers if form == "fused" else None,
            )
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="time and memory of one optimizer step, against torch's fused AdamW",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", default=",".join(SETS), help=f"comma-separated; of {', '.join(SETS)}")
    parser.add_argument("--contenders", default="", help="comma-separated parts of names to keep, besides the baseline")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a turn; at least one step is made")
    parser.add_argument("--dense", action="store_true", help="no gradient is zero, not even the embedding's of lstm_1b")
    parser.add_argument("--json", metavar="OUT", help="write everything measured to this file")
    parser.add_argument("--plot", metavar="OUT", help="draw the ratios to fused AdamW")
    options = parser.parse_args(arguments)
    for name in options.shapes.split(","):
        if name not in SETS:
            raise UserError(f"--shapes: {name!r} is none of {', '.join(SETS)}")
    known, parts = contenders(), options.contenders.split(",")
    for part in parts:
        if not any(part.lower() in name.lower() for name in known):
            raise UserError(f"--contenders: {part!r} is in none of the names: {', '.join(known)}")
    kept = {
        name: contender
        for name, contender in known.items()
        if name == BASELINE or any(part.lower() in name.lower() for part in parts)
    }

    world = setup(options.device)
    torch.manual_seed(0)
    record: dict[str, Any] = describe_environment(world)
    record["copy_gb_per_s"] = copy_bandwidth(world)
    print("\n".join(f"{key:13} {value}" for key, value in record.items() if not isinstance(value, dict | list)))
    record["sets"] = {}
    for name in options.shapes.split(","):
        record["sets"][name] = measure(name, kept, options, world)
        print(as_text(name, record["sets"][name]), flush=True)
        if options.json:
            Path(options.json).write_text(json.dumps(record, indent=1))
    if options.plot:
        plot(record, Path(options.plot))
    world.close()


def measure(
    name: str, kept: dict[str, Contender], options: argparse.Namespace, world: World
) -> dict[str, dict[str, Any]]:
    """Seconds a step in every round, bytes of state per parameter, launches."""
    device, decay = world.device, SETS[name][2]
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes(name)]
    so_far, following = gradients(name, device, options.dense)
    count = sum(param.numel() for param in params)
    # If all states would fill the memory, each is made for its turn alone.
    together = 4 * count * sum(contender.states for contender in kept.values()) < free_memory(device) / 3
    made: dict[str, torch.optim.Optimizer] = {}
    results: dict[str, dict[str, Any]] = {label: {"seconds": []} for label in kept}
    for label in turns(kept, options.rounds):
        contender, result = kept[label], results[label]
        if label not in made:
            needed = 4 * count * (contender.states + contender.temporaries)
            if needed > free_memory(device):
                result["skipped"] = f"needs {needed / 2**30:.0f} GiB more memory than is free"
                continue
            made[label] = contender.make(params, decay)
            for grads in (so_far, following):  # makes the state and compiles kernels
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                made[label].step()
        result["seconds"].append(timed(made[label], options.seconds, world))
        if "bytes_per_parameter" not in result:
            result["bytes_per_parameter"] = state_bytes(made[label]) / count
            if contender.transfers:
                result["transfers"] = contender.transfers
                result["gb_per_step"] = 4 * count * contender.transfers / 1e9
            result["launches"] = launches(made[label], world)
        if not together:
            made.clear()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    compare(results)
    return results


def compare(results: dict[str, dict[str, Any]]) -> None:
    for result in results.values():
        if result["seconds"]:
            result["median_ms"] = 1e3 * statistics.median(result["seconds"])
    base = results[BASELINE]
    for result in results.values():
        if "median_ms" in result and "median_ms" in base:
            result["ratio"] = result["median_ms"] / base["median_ms"]
            if "transfers" in result:
                result["ratio_to_floor"] = result["ratio"] * base["transfers"] / result["transfers"]
                result["gb_per_s"] = 1e3 * result["gb_per_step"] / result["median_ms"]


def timed(optimizer: torch.optim.Optimizer, seconds: float, world: World) -> float:
    """Seconds a step, over as many as fill `seconds`, after one that fills caches."""
    optimizer.step()
    world.synchronize()
    steps, start = 0, time.perf_counter()
    while True:
        optimizer.step()
        steps += 1
        if world.device.type != "cuda" or steps % 10 == 0:
            world.synchronize()
            spent = time.perf_counter() - start
            if spent >= seconds:
                return spent / steps


def copy_bandwidth(world: World) -> float:
    """Best GB/s of ten copies of 256 MiB, reading and writing counted."""
    source = torch.ones(2**26, device=world.device)
    target = torch.empty_like(source).copy_(source)
    best = min(seconds_of(lambda: target.copy_(source), world) for _ in range(10))
    return 2 * source.nbytes / best / 1e9


def launches(optimizer: torch.optim.Optimizer, world: World) -> int:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        optimizer.step()
        world.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state tensors with a parameter's shape."""
    states = ((param, x) for param, state in optimizer.state.items() for x in state.values())
    return sum(x.nbytes for param, x in states if isinstance(x, Tensor) and x.shape == param.shape)


def free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf  # not Linux: unknown


def as_text(name: str, results: dict[str, dict[str, Any]]) -> str:
    rows = [["", "ms", "min", "max", "n", "/ AdamW", "/ floor", "GB/s", "bytes/param", "launches"]]
    for label, result in results.items():
        if "median_ms" not in result:
            rows.append([label, result["skipped"]])
            continue
        seconds = result["seconds"]
        rows.append(
            [
                label,
                f"{result['median_ms']:.2f}",
                f"{1e3 * min(seconds):.2f}",
                f"{1e3 * max(seconds):.2f}",
                str(len(seconds)),
                *(f"{result[key]:.2f}" if key in result else "" for key in ("ratio", "ratio_to_floor")),
                f"{result['gb_per_s']:.1f}" if "gb_per_s" in result else "",
                f"{result['bytes_per_parameter']:.1f}",
                str(result["launches"] or ""),
            ]
        )
    _, count, decay = SETS[name]
    title = f"\n{name}: {count:,} parameters in {len(shapes(name))} tensors, weight decay {decay:g}"
    return f"{title}\n{table(rows)}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Step times over fused AdamW's, a panel for each set of shapes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(record["sets"]), figsize=(2 + 3.2 * len(record["sets"]), 4), sharey=True, sharex=True, squeeze=False
    )
    for panel, (name, results) in zip(panels[0], record["sets"].items(), strict=True):
        labels = list(results)[::-1]
        ratios = [results[label].get("ratio", math.nan) for label in labels]
        colors = ["tab:red" if label.startswith("Apollo") else "tab:gray" for label in labels]
        bars = panel.barh(labels, ratios, color=colors)
        panel.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=2, fontsize=8)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=name, xscale="log")
        panel.margins(x=0.2)
    figure.supxlabel(f"step time / {BASELINE}   ({record['device']}, torch {record['torch']})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_main(main)
