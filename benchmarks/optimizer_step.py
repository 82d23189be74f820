"""Time and memory of one optimizer step on the parameter shapes of the four experiments: no model, no data.

    python -m benchmarks.optimizer_step [--device cpu|cuda] [--shapes resnet110,lstm_1b] [--json FILE] [--plot FILE.png]

For each set of shapes, the median step time of Apollo (single, foreach, fused), of the published Apollo written
literally (benchmarks/literal_apollo.py) and of torch's SGD, AdamW and RAdam in their forms, as ratios

    / AdamW    to torch's fused AdamW, in the same process and the same rounds
    / floor    to the time that the step's transfers alone take at the measured copy bandwidth, each tensor read or
               written once a pass: 10 tensors for Apollo with L2 decay, 7 for AdamW and RAdam, 5 for SGD with momentum

and the bytes of state per parameter. A contender is visited once a round, the order reversed every other round: it is
made anew, steps twice uncounted, then `steps` times. Weights and gradients are random; parameters are float32.
"""

import argparse
import gc
import json
import shlex
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.models import resnext50_32x4d
from tqdm import tqdm

from benchmarks.literal_apollo import LiteralApollo
from classification.models import create_model
from engine.distributed import World, setup
from engine.errors import UserError, nearest, run_main
from engine.run_record import describe_environment
from optim import SGD, AdamW, Apollo, RAdam

BASELINE = "AdamW fused"
FORMS = {"single": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
APOLLO = {"lr": 1e-3, "weight_decay": 5e-4, "warmup": 0}

# What makes each contender from parameters, and the transfers of its step.
CONTENDERS: dict[str, tuple[Callable[..., Optimizer], int]] = {
    **{f"Apollo {form}": (partial(Apollo, **APOLLO, **how), 10) for form, how in FORMS.items()},
    "Apollo published": (partial(LiteralApollo, **APOLLO), 10),
    **{
        f"SGD {form}": (partial(SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4, **how), 5) for form, how in FORMS.items()
    },
    **{f"AdamW {form}": (partial(AdamW, lr=1e-3, weight_decay=5e-4, **how), 7) for form, how in FORMS.items()},
    "RAdam single": (partial(RAdam, lr=1e-3, weight_decay=5e-4, foreach=False), 7),
    "RAdam foreach": (partial(RAdam, lr=1e-3, weight_decay=5e-4, foreach=True), 7),
}


def resnet110() -> list[torch.Size]:
    return [p.shape for p in create_model("resnet", 10, depth=110).parameters()]


def resnext50() -> list[torch.Size]:
    return [p.shape for p in resnext50_32x4d().parameters()]


def transformer_base() -> list[torch.Size]:
    """6+6 layers of 512 / 2048, and one embedding of 37,000 words shared by both sides and the output."""
    layers = nn.Transformer(512, 8, 6, 6, 2048)
    return [torch.Size((37000, 512)), *(p.shape for p in layers.parameters())]


def lstm_1b() -> list[torch.Size]:
    """Embedding 300, LSTM 2 x 2048, adaptive softmax over the 793,470 words of One Billion Words."""
    parts = (
        nn.Embedding(793470, 300),
        nn.LSTM(300, 2048, 2),
        nn.AdaptiveLogSoftmaxWithLoss(2048, 793470, [60000, 100000, 640000], div_value=4),
    )
    return [p.shape for part in parts for p in part.parameters()]


# Shapes, and the parameters they must add up to where the paper's model is exactly this one; steps of one visit.
SHAPES: dict[str, tuple[Callable[[], list[torch.Size]], int | None, int]] = {
    "resnet110": (resnet110, 1_730_714, 20),
    "resnext50": (resnext50, 25_028_904, 5),
    "transformer_base": (transformer_base, None, 3),
    "lstm_1b": (lstm_1b, None, 1),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_step", description="step time of optimizers")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="visits to each contender; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every time that was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios to fused AdamW")
    options = parser.parse_args(arguments)
    names = options.shapes.split(",")
    for name in names:
        if name not in SHAPES:
            raise UserError(f"no shapes '{name}'{nearest(name, SHAPES)}; valid: {', '.join(SHAPES)}")

    world = setup(options.device)
    environment = describe_environment(world)
    bandwidth = copy_bandwidth(world)
    command = shlex.join(["python", "-m", "benchmarks.optimizer_step", *arguments])
    print(
        f"{command}\n{environment['device']}, {environment['cpu_threads']} CPU threads, torch {environment['torch']}, "
    )
    print(f"{environment['started']}; copying moves {bandwidth / 1e9:.1f} GB/s (read and written)")
    results = {}
    for name in names:
        results[name] = measure(name, world, options.rounds)
        report(name, results[name], bandwidth)
    if options.json:
        written = {"command": command, "environment": environment, "copy_bytes_per_s": bandwidth, "results": results}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    if options.plot:
        plot(results, environment["device"], options.plot)


def measure(name: str, world: World, rounds: int) -> dict:
    """Step times in ms of every contender on the shapes `name`, its state's bytes, and on CUDA its launches."""
    shapes, expected, steps = SHAPES[name]
    with torch.device("meta"):
        sizes = shapes()
    numel = sum(size.numel() for size in sizes)
    if expected not in (None, numel):
        raise RuntimeError(f"{name} has {numel} parameters, not {expected}")
    torch.manual_seed(0)
    params = [(0.02 * torch.randn(size, device=world.device)).requires_grad_() for size in sizes]
    for p in params:
        p.grad = 0.01 * torch.randn_like(p)

    times: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    state: dict[str, float] = {}
    launches: dict[str, int | None] = {}
    visits = [list(times) if number % 2 == 0 else list(reversed(times)) for number in range(rounds)]
    for contender in tqdm([c for visit in visits for c in visit], desc=name, unit="visit", disable=None):
        optimizer = CONTENDERS[contender][0](params)
        for _ in range(2):
            optimizer.step()
        for _ in range(steps):
            synchronize(world)
            started = time.perf_counter()
            optimizer.step()
            synchronize(world)
            times[contender].append(1000 * (time.perf_counter() - started))
        state[contender] = state_bytes(optimizer) / numel
        if contender not in launches:
            launches[contender] = count_launches(optimizer) if world.device.type == "cuda" else None
        del optimizer
        gc.collect()
    return {"parameters": numel, "tensors": len(sizes), "ms": times, "state_bytes": state, "launches": launches}


def report(name: str, result: dict, bandwidth: float) -> None:
    medians = {contender: statistics.median(ms) for contender, ms in result["ms"].items()}
    n = len(result["ms"][BASELINE])
    print(f"\n{name}: {result['parameters']:,} parameters in {result['tensors']} tensors, n = {n} steps each")
    counted = any(result["launches"].values())
    header = f"{'':<18}{'median ms':>11}{'std':>9}{'/ AdamW':>9}{'/ floor':>9}{'state B/param':>15}"
    print(header + (f"{'launches':>10}" if counted else ""))
    for contender, ms in result["ms"].items():
        floor = 1000 * CONTENDERS[contender][1] * 4 * result["parameters"] / bandwidth
        spread = statistics.stdev(ms) if len(ms) > 1 else 0.0
        line = f"{contender:<18}{medians[contender]:>11.3f}{spread:>9.3f}{medians[contender] / medians[BASELINE]:>9.2f}"
        line += f"{medians[contender] / floor:>9.2f}{result['state_bytes'][contender]:>15.2f}"
        print(line + (f"{result['launches'][contender]:>10}" if counted else ""))
    published = medians["Apollo published"]
    ratios = ", ".join(f"{form} {published / medians[f'Apollo {form}']:.1f} x" for form in FORMS)
    print(f"the published loop's time over Apollo's: {ratios}")


def copy_bandwidth(world: World) -> float:
    """Bytes read and written per second by a copy of a tensor far larger than any cache, the median of 7."""
    source = torch.ones(256 * 2**20 // 4 * (8 if world.device.type == "cuda" else 4), device=world.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(9):
        synchronize(world)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(world)
        seconds.append(time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / statistics.median(seconds[2:])


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's tensors, the steps' counts left out: they do not grow with the parameters."""
    values = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    return sum(x.numel() * x.element_size() for x in values if isinstance(x, Tensor))


def count_launches(optimizer: Optimizer) -> int:
    """Kernels and copies that one step starts on the GPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def plot(results: dict[str, dict], device: str, path: Path) -> None:
    """Bars of the median step over that of fused AdamW, one panel a set of shapes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(results), 4.6), layout="constrained")
    for axis, (name, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        medians = {contender: statistics.median(ms) for contender, ms in result["ms"].items()}
        ratios = {contender: ms / medians[BASELINE] for contender, ms in reversed(medians.items())}
        colours = ["#D55E00" if contender.startswith("Apollo") else "#0072B2" for contender in ratios]
        bars = axis.barh(list(ratios), list(ratios.values()), color=colours)
        axis.bar_label(bars, fmt="%.2g", padding=2, fontsize=8)
        axis.axvline(1, color="#444444", linewidth=0.8)
        axis.set(xscale="log", xlabel=f"time / {BASELINE}")
        axis.set_title(f"{name}\n{result['parameters'] / 1e6:.1f} M in {result['tensors']} tensors", fontsize=10)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(device, fontsize=10)
    figure.savefig(path, dpi=150)


def synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_main(main)
