"""What the benchmarks share: contenders that take turns, loops to measure, tables.

In turn, a machine that grows slower is as slow for all contenders.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from engine.config import load_config
from engine.distributed import World, setup
from engine.precision import Precision
from engine.run import Run, end_epoch
from engine.run_record import RunRecord, describe_environment

CONFIGS = Path(__file__).parents[1] / "configs"
Contender = Callable[[], object]  # does the work of one round
PassT = TypeVar("PassT")


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Each name once a round. Every other round reverses the order."""
    for number in tqdm(range(rounds), unit="round", leave=False, disable=None):
        yield from list(names)[:: 1 if number % 2 == 0 else -1]


def speeds(
    contenders: dict[str, Contender], amount: float, rounds: int, world: World, warmup: bool = True
) -> dict[str, list[float]]:
    """What each contender does per second in each round; a call does `amount`. With `warmup`, one more is not timed."""
    for run in contenders.values() if warmup else ():
        run()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for name in turns(contenders, rounds):
        found[name].append(amount / seconds_of(contenders[name], world))
    return found


def seconds_of(run: Contender, world: World) -> float:
    world.synchronize()
    started = time.perf_counter()
    run()
    world.synchronize()
    return time.perf_counter() - started


def prepared(module: ModuleType, path: str | Path, *overrides: str) -> Any:
    """The Run of a task's train.py for a config and overrides."""
    config = load_config(module.Config, path, overrides)
    world = setup(config.device)
    return module.prepare(config, world, RunRecord(config, config.folder, world))


def end_of_epoch(module: ModuleType, run: Run, updates: int) -> None:
    """Train the last `updates` updates of the run's epoch, without evaluation and checkpoint."""
    epoch = run.progress.epoch
    run.progress.update_in_epoch = run.updates_per_epoch - updates
    if not module.train_epoch(run, tqdm(disable=True)):
        raise KeyboardInterrupt  # the loop has caught a signal
    if run.progress.epoch == epoch:  # translation's loop ends its epoch itself
        end_epoch(run)


def bare_loop(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    cast: Precision,
    updates: Sequence[Sequence[PassT]],
    loss_of: Callable[[PassT], torch.Tensor],
    clip: float | None = None,
) -> Contender:
    """Forward, backward, clipping and step alone, of `updates`, each a list of passes."""

    def one_round() -> None:
        for passes in updates:
            optimizer.zero_grad()
            for one in passes:
                with cast.autocast():
                    loss = loss_of(one)
                cast.backward(loss)
            if clip:
                cast.clip(optimizer, model.parameters(), clip)
            cast.step(optimizer)

    return one_round


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def report(unit: str, found: dict[str, list[float]], pairs: Iterable[tuple[str, str]]) -> None:
    """Print speeds, and the ratios of `pairs`, taken round by round."""
    rows = [[unit, "median", "mean", "std", "n"]]
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        numbers = (statistics.median(values), statistics.mean(values), spread)
        rows.append([name, *(f"{number:,.1f}" for number in numbers), str(len(values))])
    print(table(rows))
    rows = [["ratio in the same round", "median", "lowest", "highest"]]
    for ours, theirs in pairs:
        each = ratios(found[ours], found[theirs])
        rows.append([f"{ours} / {theirs}", *(f"{x:.3f}" for x in (statistics.median(each), min(each), max(each)))])
    print(f"\n{table(rows)}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned lines. Rows shorter than the first one do not widen columns."""
    widths = [max(map(len, column)) for column in zip(*(row for row in rows if len(row) == len(rows[0])), strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def machine(world: World) -> str:
    found = describe_environment(world)
    return f"{found['device']}, {found['cpu_threads']} CPU threads, torch {found['torch']}, {found['started']}"
