"""Training that is killed again and again, and must end as if nothing had happened.

    python -m tests.crash.kills TASK [KILLS] [SEED]      TASK: digits grammar pydoc_topics

From the root of the repository. One run is left alone. Another is sent SIGKILL after random times, KILLS times (30),
and is then left to its end. Compared are the weights and the optimizer's state, bit for bit, metrics.jsonl, the events
for TensorBoard (each step once, none missing), and result.json without its times. What a killed run was doing last is
counted and printed.
"""

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, "tests")

import signal

from training_runs import Cell, assert_same_end, metrics

TASKS = {
    "digits": (
        Cell("classification.train", Path("configs/digits/apollo.yaml")),
        ["epochs=4", "schedule={name: constant}", "tensorboard=true", "log_every=5", "checkpoint.minutes=0"],
    ),
    "pydoc_topics": (
        Cell("language_model.train", Path("configs/pydoc_topics/apollo.yaml")),
        ["epochs=1", "schedule={name: constant}", "tensorboard=true", "log_every=5", "checkpoint.minutes=0"],
    ),
    "grammar": (
        Cell("nmt.train", Path("configs/grammar/apollo.yaml")),
        ["updates=40", "validate_every=20", "average={every: 10, last: 2}", "schedule={name: constant}", "log_every=5"]
        + ["tensorboard=true", "checkpoint.minutes=0"],
    ),
}  # fmt: skip


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in TASKS:
        print(__doc__)
        return 2
    kills, random = int((arguments[1:] or ["30"])[0]), Random(int((arguments[2:] or ["1"])[0]))
    cell, overrides = TASKS[arguments[0]]
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        overrides = [*overrides, f"data.root={folder}/data"]
        cell.complete(alone, *overrides)
        started = time.monotonic()
        cell.complete(Path(folder, "timed"), *overrides)
        length = time.monotonic() - started
        met: Counter[str] = Counter()
        while met.total() < kills:
            running = cell.start(killed, *overrides)
            time.sleep(random.uniform(0, length))
            if running.is_alive:
                met[doing(killed)] += 1
            running.send(signal.SIGKILL, group=True)
            ended = running.wait()
            if ended.status == 0:  # at its end before the kill: once more from the beginning
                compare(alone, killed)
                killed.rename(Path(folder, f"ended{met.total()}-{time.monotonic_ns()}"))
            elif ended.status != -signal.SIGKILL:
                print(ended.stderr)
                return 1
        cell.complete(killed, *overrides)
        compare(alone, killed)
    print(f"{arguments[0]}: {kills} kills, {dict(met)}: every end as that of the run left alone")
    return 0


def doing(run_dir: Path) -> str:
    """How far the run that has just been killed had come."""
    if (run_dir / "checkpoint.tmp").exists():
        return "saving"
    if (run_dir / "result.json").exists():
        return "at its end"
    return "after a checkpoint" if (run_dir / "checkpoint.pt").exists() else "before the first checkpoint"


def compare(alone: Path, killed: Path) -> None:
    assert_same_end(alone, killed)
    wanted = [points_written(run_dir) for run_dir in (alone, killed)]
    shown = [points_shown(run_dir) for run_dir in (alone, killed)]
    assert wanted[0] == wanted[1] == shown[0] == shown[1], "TensorBoard shows other steps"


def points_written(run_dir: Path) -> dict[str, list[int]]:
    """The steps of each number of metrics.jsonl."""
    steps: dict[str, list[int]] = {}
    for line in metrics(run_dir):
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "update":
                steps.setdefault(f"{line['kind']}/{name}", []).append(line["update"])
    return steps


def points_shown(run_dir: Path) -> dict[str, list[int]]:
    """The same as TensorBoard shows them, but for the times that `points_written` leaves out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = points_written(run_dir)
    return {name: [event.step for event in board.Scalars(name)] for name in board.Tags()["scalars"] if name in names}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
