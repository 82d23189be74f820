"""Contenders of a benchmark take turns: a machine that grows slower is then as slow for all of them."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from engine.distributed import World
from engine.run import RunT, end_epoch
from engine.run_record import describe_environment

COLUMNS = f"{'median':>9}{'mean':>9}{'std':>8}{'n':>4}"  # above the rows of `columns`


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Each name once a round. Every other round reverses the order."""
    for number in tqdm(range(rounds), unit="round", leave=False, disable=None):
        yield from list(names)[:: 1 if number % 2 == 0 else -1]


def speeds(
    contenders: dict[str, Callable[[], object]], amount: float, rounds: int, world: World, warmup: bool = True
) -> dict[str, list[float]]:
    """What each contender does per second in each round, where a call does `amount`.

    With `warmup`, a first call does not count.
    """
    for run in contenders.values() if warmup else ():
        run()
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for name in turns(contenders, rounds):
        found[name].append(amount / seconds_of(contenders[name], world))
    return found


def seconds_of(run: Callable[[], object], world: World) -> float:
    world.synchronize()
    started = time.perf_counter()
    run()
    world.synchronize()
    return time.perf_counter() - started


def end_of_epoch(run: RunT, train_epoch: Callable[[RunT, tqdm], bool], updates: int) -> None:
    """Train the last `updates` updates of the run's epoch, without evaluation and checkpoint."""
    epoch = run.progress.epoch
    run.progress.update_in_epoch = run.updates_per_epoch - updates
    if not train_epoch(run, tqdm(disable=True)):
        raise KeyboardInterrupt  # the loop has caught a signal
    if run.progress.epoch == epoch:  # translation's loop ends its epoch itself
        end_epoch(run)


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def columns(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.median(values):>9.1f}{statistics.mean(values):>9.1f}{spread:>8.1f}{len(values):>4}"


def machine(world: World) -> str:
    found = describe_environment(world)
    return f"{found['device']}, {found['cpu_threads']} CPU threads, torch {found['torch']}, {found['started']}"
