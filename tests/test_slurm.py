"""Runs as jobs of a queue, without SLURM: submission, saving before time is up, going back into the queue."""

import json
import os
import signal
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_scripts import ROOT

from engine.errors import UserError
from scripts.execution import carry_out
from scripts.jobs import plan
from scripts.pool import State
from scripts.slurm import Request, Training, in_queue, queue_name, run_in_queue, submit

pytest.importorskip("submitit")
SMALL = ["device=cpu", "epochs=3", "log_every=1"]


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the job's processes in /proc")
def test_a_job_saves_when_its_time_is_up_and_goes_on_when_it_is_back(in_root, tmp_path):
    run = plan("digits", Path("configs/digits/sgd.yaml"), 1, tmp_path, SMALL)
    (job,) = submit([run], "one", tmp_path / "slurm", Request(on_cpu=True), cluster="local")
    metrics = Path(run.folder) / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size)
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # as SLURM does
    job.result()
    assert run.complete
    said = (Path(run.folder) / "log.txt").read_text()
    assert said.index("by SIGTERM; saved") < said.index("resuming at epoch") < said.index("done:")
    updates = [json.loads(line)["update"] for line in metrics.read_text().splitlines() if '"train"' in line]
    assert updates == list(range(1, len(updates) + 1))

    assert submit([run], "one", tmp_path / "slurm", Request(on_cpu=True), cluster="local") == []


def test_a_job_that_fails_ends_with_the_run_s_own_line(in_root, tmp_path):
    run = plan("digits", Path("configs/digits/sgd.yaml"), 1, tmp_path, [*SMALL, "optimizer.name=sgdd"])
    (job,) = submit([run], "one", tmp_path / "slurm", Request(on_cpu=True), cluster="local")
    assert "error: " in str(job.exception())
    assert "sgdd" in str(job.exception())


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def put_slurm(tmp_path, monkeypatch, squeue):
    """Put stand-ins for SLURM's programs on the PATH."""
    programs = {
        "sbatch": f'cp "$1" {tmp_path}/batch\necho "Submitted batch job 77"',
        "srun": "",
        "squeue": squeue,
    }
    for name, text in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def test_what_is_asked_of_slurm(in_root, tmp_path, monkeypatch):
    put_slurm(tmp_path, monkeypatch, squeue="echo 77_0 77_1")
    runs = [plan("digits", Path("configs/digits/sgd.yaml"), seed, tmp_path, SMALL) for seed in (1, 2, 3)]
    request = Request(at_once=2, gpus=4, nodes=2, options=(("time", "60"), ("partition", "long")))
    jobs = submit(runs, "mine-1", tmp_path / "slurm", request)
    assert [job.job_id for job in jobs] == ["77_0", "77_1", "77_2"]
    asked = (tmp_path / "batch").read_text()
    for option in (
        "array=0-2%2", "time=60", "signal=USR2@180", "requeue", "gpus-per-node=4", "nodes=2", "ntasks-per-node=1",
        "partition=long", "job-name=mine-1",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in asked
    assert in_queue("mine-1") == 2


def test_lists_of_the_same_name_in_two_checkouts_do_not_share_jobs(tmp_path, monkeypatch):
    names = []
    for checkout in ("one", "two"):
        (tmp_path / checkout).mkdir()
        monkeypatch.chdir(tmp_path / checkout)
        put_slurm(tmp_path, monkeypatch, squeue=f'echo "$@" > {tmp_path}/asked; echo 77')
        options = SimpleNamespace(executor="slurm", jobs=1, gpus=1, nodes=1, slurm=(), runs=Path("runs"))
        with pytest.raises(InterruptedError):
            carry_out([], Path("runs/lists/mine.jsonl"), options, stop_watching)
        names.append((tmp_path / "asked").read_text().split()[4])
        assert names[-1] == queue_name(tmp_path / checkout / "runs/lists/mine.jsonl")
    assert names[0] != names[1] and all(name.startswith("mine-") for name in names)


def stop_watching(turns):
    raise InterruptedError


def test_the_error_of_an_earlier_attempt_is_not_that_of_a_job_that_left_the_queue(in_root, tmp_path, monkeypatch):
    put_slurm(tmp_path, monkeypatch, squeue="true")
    run = plan("digits", Path("configs/digits/sgd.yaml"), 1, tmp_path, SMALL)
    run.log.parent.mkdir(parents=True)
    run.log.write_text("error: the run has diverged\n")
    status, (turn,) = run_in_queue([run], "mine-2", tmp_path / "slurm", Request(on_cpu=True), lambda turns: None)
    assert (status, turn.state) == (1, State.FAILED)
    assert turn.error.startswith("no log; ")


def test_machines_meet_on_the_first(tmp_path):
    job = plan("digits", ROOT / "configs/digits/sgd.yaml", 1, tmp_path)
    words = Training(job, gpus=4, nodes=2)._over_nodes("node7", "123456")
    assert {"--nnodes=2", "--nproc_per_node=4", "--rdzv_endpoint=node7:23456"} <= set(words)


def test_without_slurm_it_says_so(in_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here"):
        submit([], "mine", tmp_path, Request())
    with pytest.raises(UserError, match="cannot ask SLURM"):
        in_queue("mine")
