"""The whole training command on scikit-learn's digits: killed and resumed, on two ranks, and with bad input."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

CONFIG = """
table: digits
row: apollo
epochs: 2
global_batch: 64
data: {name: digits}
model: {name: resnet, depth: 8}
log_every: 1
optimizer: {name: apollo, lr: 0.5, eps: 1.0e-4, weight_decay: 5.0e-4}
schedule: {name: milestone, milestones: [1], decay_rate: 0.1, warmup_updates: 10, init_lr: 0.01}
checkpoint: {minutes: 0, keep: 2}      # a checkpoint after every update: a kill often hits the middle of one
"""
UPDATES = 2 * (1442 // 64)
TIMES = (
    "examples_per_s",
    "wall_s",
    "optimizer_ms_per_step",
    "peak_memory_mb",
)  # what may differ between two equal runs


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "cell.yaml"
    path.write_text(CONFIG)
    return path


def command(config: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "classification.train", str(config), f"run_dir={run_dir}", *overrides]


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=300)


def updates_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def interrupt(process: subprocess.Popen, run_dir: Path, at_update: int, number: signal.Signals) -> int:
    """Send the signal once the run has logged `at_update` updates; returns the exit status."""
    deadline = time.monotonic() + 120
    while updates_logged(run_dir) < at_update and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=60)


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def tensors(value, prefix="") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by their path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = {prefix: value} if isinstance(value, torch.Tensor) else {}
    for key, child in items:
        found |= tensors(child, f"{prefix}/{key}")
    return found


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer state and metrics of two finished runs are equal, bit for bit."""
    first, second = (tensors(torch.load(folder / "checkpoint.pt", weights_only=True)) for folder in (one, other))
    assert first.keys() == second.keys() and any("/optimizer/" in name for name in first)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert metrics(one) == metrics(other)
    assert {k: v for k, v in result(one).items() if k not in TIMES} == {
        k: v for k, v in result(other).items() if k not in TIMES
    }


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = run(config, run_dir)
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_whole_run(uninterrupted, config):
    outcome = result(uninterrupted)
    assert outcome["complete"] and outcome["epochs"] == 2 and outcome["evaluated"] == 355 and outcome["seed"] == 1
    assert outcome["parameters"] == 78042 and outcome["row"] == "apollo" and outcome["schedule"] == "milestone"
    assert outcome["best"] >= outcome["final"] > 15  # better than chance after two epochs
    lines = metrics(uninterrupted)
    assert [line["update"] for line in lines if line["kind"] == "train"] == list(range(1, UPDATES + 1))
    assert lines[-1]["kind"] == "epoch" and lines[-1]["test_top1"] == outcome["final"]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[0] == pytest.approx(0.01) and rates[10] == 0.5 and rates[-1] == pytest.approx(0.05)
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["recipe"]["world_size"] == 1 and environment["recipe"]["per_rank_batch"] == 64
    again = run(config, uninterrupted)
    assert again.returncode == 0 and "nothing to do" in again.stderr


def test_killed_again_and_again_it_ends_the_same(config, uninterrupted, tmp_path):
    for at_update in (5, 17, 31):
        process = subprocess.Popen(command(config, tmp_path / "run"), stderr=subprocess.PIPE)
        assert interrupt(process, tmp_path / "run", at_update, signal.SIGKILL) == -signal.SIGKILL
        assert not (tmp_path / "run/result.json").exists()
    done = run(config, tmp_path / "run")
    assert done.returncode == 0 and "resuming at epoch 2" in done.stderr, done.stderr
    assert_same_end(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_first(config, uninterrupted, tmp_path, number, status):
    """Without timed checkpoints: what is there after the signal was saved because of it, in mid-epoch."""
    process = subprocess.Popen(
        command(config, tmp_path / "run", "checkpoint.minutes=60"), stderr=subprocess.PIPE, text=True
    )
    assert interrupt(process, tmp_path / "run", 3, number) == status
    assert "saved" in process.stderr.read()
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["progress"]["update_in_epoch"] == saved["progress"]["update"] == updates_logged(tmp_path / "run") >= 3
    assert run(config, tmp_path / "run").returncode == 0
    assert_same_end(uninterrupted, tmp_path / "run")


def test_two_ranks_are_one_rank_with_two_passes(config, tmp_path):
    """The same global batches and BatchNorm batches: the loss curves agree to rounding; every image is counted once."""
    ours = ["epochs=1", "optimizer={name: sgd, lr: 0.05, momentum: 0.9}"]
    two = run(config, tmp_path / "two", *ours, ranks=2)
    one = run(config, tmp_path / "one", *ours, "accumulation=2")
    assert two.returncode == one.returncode == 0, two.stderr + one.stderr
    losses = [[line["loss"] for line in metrics(tmp_path / name) if line["kind"] == "train"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert result(tmp_path / "two")["evaluated"] == 355
    recipe = json.loads((tmp_path / "two/environment.json").read_text())["recipe"]
    assert recipe["world_size"] == 2 and recipe["per_rank_batch"] == recipe["batchnorm_batch"] == 32


def test_two_ranks_stopped_and_resumed(config, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen(command(config, stopped, "checkpoint.minutes=60", ranks=2), stderr=subprocess.PIPE)
    interrupt(process, stopped, 12, signal.SIGTERM)
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["progress"]["update"] % 10 == 0
    assert not (stopped / "result.json").exists()
    for folder in (stopped, whole):
        done = run(config, folder, "checkpoint.minutes=60", ranks=2)
        assert done.returncode == 0, done.stderr
    assert_same_end(stopped, whole)


def one_line_error(done: subprocess.CompletedProcess) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["epoch=3"], ["unknown key 'epoch'", "'epochs'"]),
        (["optimizer.lr=-1"], ["optimizer", "lr", "-1"]),
        (["optimizer.name=apolo"], ["optimizer", "apolo", "'apollo'"]),
        (["optimizer.betas=[0.9, 0.999]"], ["optimizer", "betas", "'beta'"]),
        (["optimizer={name: no.such.Thing}"], ["optimizer", "no.such.Thing", "cannot be imported"]),
        (["schedule.name=milestones"], ["schedule", "milestones", "'milestone'"]),
        (["model.depth=9"], ["model", "9"]),
        (["global_batch=2000"], ["global_batch", "1442"]),
        (["global_batch=63", "accumulation=2"], ["63", "not divisible", "64"]),
        (["data={name: folder, root: nowhere}"], ["nowhere"]),
        (["optimizer={name: sgd, lr: 1.0e+30}"], ["loss is nan at update", "diverged", "optimizer.lr"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(config, tmp_path, overrides, words):
    message = one_line_error(run(config, tmp_path / "run", *overrides))
    assert all(word in message for word in words), message


def test_a_folder_of_another_run_is_left_alone(config, uninterrupted):
    before = (uninterrupted / "config.yaml").read_bytes()
    message = one_line_error(run(config, uninterrupted, "optimizer.lr=0.1", "model.depth=14"))
    assert "optimizer.lr (0.5 there, 0.1 now)" in message and "model.depth" in message
    assert (uninterrupted / "config.yaml").read_bytes() == before


def test_one_folder_takes_one_run_at_a_time(config, tmp_path):
    process = subprocess.Popen(command(config, tmp_path / "run"), stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "run/metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        assert "another process is training" in one_line_error(run(config, tmp_path / "run"))
    finally:
        process.kill()
        process.wait()


def test_a_disk_that_fills_up_loses_nothing(config, uninterrupted, tmp_path):
    """A limit on the size of files stands for the full disk: the second half of the run's log no longer fits."""
    run_dir = tmp_path / "run"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))  # noqa: E731
    process = subprocess.Popen(command(config, run_dir), stderr=subprocess.DEVNULL)
    assert interrupt(process, run_dir, 9, signal.SIGKILL) == -signal.SIGKILL
    names = ("checkpoint.pt", "checkpoint.1.pt")
    before = {name: (run_dir / name).read_bytes() for name in names if (run_dir / name).exists()}
    full = subprocess.run(command(config, run_dir), capture_output=True, text=True, timeout=120, preexec_fn=limit)
    message = one_line_error(full)
    assert "cannot save a checkpoint" in message and "File too large" in message
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    assert run(config, run_dir).returncode == 0
    assert_same_end(uninterrupted, run_dir)


def test_a_truncated_checkpoint_costs_one_checkpoint(config, uninterrupted, tmp_path):
    process = subprocess.Popen(command(config, tmp_path / "run"), stderr=subprocess.DEVNULL)
    assert interrupt(process, tmp_path / "run", 9, signal.SIGKILL) == -signal.SIGKILL
    os.truncate(tmp_path / "run/checkpoint.pt", 1000)
    done = run(config, tmp_path / "run")
    assert done.returncode == 0 and "checkpoint.pt is damaged" in done.stderr and "checkpoint.1.pt" in done.stderr
    assert_same_end(uninterrupted, tmp_path / "run")
