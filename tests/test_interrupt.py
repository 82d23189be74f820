"""Signals that ask a run to stop, and signals and deaths under torchrun with two ranks of gloo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_scripts import ENVIRONMENT, ROOT, script, wait_for
from training_runs import process

from engine.interrupt import StopRequest
from scripts.jobs import torchrun

SMALL = ["device=cpu", "log_every=10", "checkpoint.minutes=0"]  # with two ranks: saves every ten updates


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_asks_to_stop_and_is_the_exit_status(handlers, name):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stop = StopRequest()
    assert not stop.requested
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.requested
    assert stop.exit_status == 128 + signal.Signals[name]


def test_what_nohup_has_ignored_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested


def test_a_second_ctrl_c_stops_at_once(handlers):
    StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_scheduler_s_signal_saves_on_two_ranks_and_is_the_script_s_exit_status(tmp_path):
    arguments = ["--seeds", "1", "--schedules", "milestone", "--gpus", "2", "--runs", tmp_path]
    command = script("cifar_sgd", *arguments, "data.name=digits", "model.depth=8", *SMALL)
    folder = tmp_path / "cifar10/sgd_milestone/seed1"
    with process(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as row:
        wait_for(lambda: _lines(folder), row)
        row.send_signal(signal.SIGUSR2)
        _, told = row.communicate(timeout=240)
    assert row.returncode == 128 + signal.SIGUSR2, told
    assert "saved: the same command goes on" in (folder / "log.txt").read_text()
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / "result.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_a_killed_rank_s_job_goes_on_from_the_last_checkpoint_by_itself(tmp_path):
    command = [
        sys.executable,
        *torchrun(2),
        "-m",
        "classification.train",
        "configs/digits/sgd.yaml",
        "epochs=4",
        "batch=32",
        "passes=2",
        *SMALL,
    ]
    output = tmp_path / "output"
    command.append(f"run_dir={tmp_path}/run")
    with (
        open(output, "w") as file,
        process(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT) as run,
    ):
        wait_for(lambda: (tmp_path / "run/checkpoint.pt").exists(), run)
        ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        assert run.wait(timeout=240) == 0, output.read_text()
    assert json.loads((tmp_path / "run/result.json").read_text())["complete"]
    assert "resuming at epoch" in (tmp_path / "run/log.txt").read_text()
    updates = [line["update"] for line in _lines(tmp_path / "run") if line["kind"] == "train"]
    assert updates == sorted(set(updates)), "a line that was written twice"
    epochs = [line["epoch"] for line in _lines(tmp_path / "run") if line["kind"] == "epoch"]
    assert epochs == [1, 2, 3, 4]


def _lines(folder):
    path = folder / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if path.exists()
        else []
    )
