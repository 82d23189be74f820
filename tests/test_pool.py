"""The pool of jobs, with small programs instead of trainings: order, failures, signals, folders in use."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from training_runs import process

from engine.errors import UserError
from engine.files import hold, is_held
from scripts.jobs import Job, read_list, write_list
from scripts.live import Display, Progress, read_progress
from scripts.pool import Places, State, places_for, run_jobs

ROOT = Path(__file__).parent.parent
# A stand-in for a training: `python -m program.train WHAT FOLDER` takes its run folder's lock, then does as it is told.
PROGRAM = """
    import json, os, signal, sys, time
    from pathlib import Path
    from engine.files import hold

    what, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    lock = hold(folder, "training")
    (folder / "pids").open("a").write(f"{os.getpid()}\\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if what == "fail":
        print("error: this one fails\\nand says more", file=sys.stderr)
        sys.exit(2)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep" and not (folder / "go").exists():
        time.sleep(600)
    if what != "nothing":
        text = json.dumps({"devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "complete": True})
        (folder / "result.json").write_text(text)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "modules/program").mkdir(parents=True)
    (tmp_path / "modules/program/train.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{ROOT}")

    def make(what, name):
        folder = str(tmp_path / "runs" / name)
        return Job("program", what, (folder,), folder, length=1, unit="epoch")

    return make


def states(turns):
    return [turn.state for turn in turns]


def test_a_failure_holds_up_nothing_and_is_told_with_its_last_error(job):
    jobs = [job("fail", "a"), job("die", "b"), job("nothing", "c"), job("finish", "d"), job("finish", "e")]
    status, turns = run_jobs(jobs, Places([None, None]))
    assert status == 2
    assert states(turns) == [State.FAILED] * 3 + [State.COMPLETE] * 2
    assert [turn.error for turn in turns[:3]] == ["error: this one fails", "killed by SIGKILL", "exit status 0"]
    assert "and says more" in turns[0].job.log.read_text()

    again, turns = run_jobs(jobs, Places([None, None]))
    assert again == 2
    assert [turn.process is None for turn in turns] == [False] * 3 + [True] * 2


def test_without_keep_going_the_first_failure_stops_the_others(job):
    status, turns = run_jobs(
        [job("sleep", "a"), job("die", "b"), job("finish", "c")], Places([None, None]), keep_going=False
    )
    assert status == 128 + signal.SIGKILL
    assert states(turns) == [State.STOPPED, State.FAILED, State.WAITING]
    assert turns[0].status == 128 + signal.SIGTERM


def test_jobs_wait_for_a_place_and_get_its_gpus(job):
    most = 0

    def watch(turns):
        nonlocal most
        most = max(most, states(turns).count(State.RUNNING))

    jobs = [job("finish", name) for name in "abcde"]
    status, _ = run_jobs(jobs, Places(["0", "3"]), watch=watch)
    assert (status, most) == (0, 2)
    assert {json.loads((Path(j.folder) / "result.json").read_text())["devices"] for j in jobs} == {"0", "3"}


@contextmanager
def held(folder):
    """Another process holds `folder` until its standard input is closed."""
    folder.mkdir(parents=True)
    program = "import sys, time; from engine.files import hold; from pathlib import Path\n"
    program += "lock = hold(Path(sys.argv[1]), 'training'); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(folder)]
    with process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield other


def test_a_folder_that_another_process_holds_is_waited_for(job):
    waiting = job("finish", "a")
    with held(Path(waiting.folder)) as other:

        def watch(turns):
            if turns[0].state is State.HELD and turns[1].state is State.COMPLETE and not other.stdin.closed:
                other.stdin.close()

        status, turns = run_jobs([waiting, job("finish", "b")], watch=watch)
    assert (status, states(turns)) == (0, [State.COMPLETE] * 2)


def test_a_folder_that_another_process_only_looks_at_can_be_held(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    assert not is_held(folder)
    with held(folder) as other:
        assert is_held(folder)
        with pytest.raises(UserError, match="another process is training there"):
            hold(folder, "training")

        def let_go(seconds):
            other.stdin.close()
            other.wait()

        monkeypatch.setattr("engine.files.time.sleep", let_go)
        hold(folder, "training").close()
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()
    assert not is_held(folder)  # so that the job starts, and says what is wrong


def test_a_signal_reaches_the_jobs_and_is_the_exit_status(job):
    def watch(turns):
        if (Path(turns[0].job.folder) / "pids").exists():
            os.kill(os.getpid(), signal.SIGUSR1)

    status, turns = run_jobs([job("sleep", "a"), job("finish", "b")], watch=watch)
    assert status == 128 + signal.SIGUSR1
    assert states(turns) == [State.STOPPED, State.WAITING]
    assert turns[0].status == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere jobs outlive a pool that is killed")
def test_jobs_end_with_a_pool_that_is_killed(job, tmp_path):
    lists = write_list([job("sleep", "a")], tmp_path, "one")
    program = (
        "import sys; from pathlib import Path; from scripts.jobs import read_list; from scripts.pool import run_jobs"
    )
    with process([sys.executable, "-c", f"{program}; run_jobs(read_list(Path(sys.argv[1])))", lists]) as pool:
        folder = tmp_path / "runs/a"
        wait_for(lambda: (folder / "pids").exists())
        pool.kill()
    wait_for(lambda: not is_held(folder))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("visible", "at_once", "gpus", "devices"),
    [
        ("0,1,2,3", None, 1, ["0", "1", "2", "3"]),
        ("0,1,2,3", 2, 2, ["0,1", "2,3"]),
        ("0,1,2", None, 2, ["0,1"]),
        ("5", 3, 1, ["5", "5", "5"]),
        ("", 2, 1, [None, None]),
    ],
)
def test_places_are_what_the_gpus_allow(monkeypatch, visible, at_once, gpus, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list(places_for(at_once, gpus).devices) == devices


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match="--gpus 4: only 2 are visible"):
        places_for(None, 4)


def test_a_list_is_written_once_and_read_back(job, tmp_path):
    jobs = [job("finish", "a"), job("fail", "b")]
    path = write_list(jobs, tmp_path, "mine")
    written = path.stat().st_mtime_ns
    assert read_list(path) == jobs
    assert write_list(jobs, tmp_path, "mine") == path
    assert path.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="is the run folder of two runs"):
        write_list([*jobs, job("sleep", "a")], tmp_path, "mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: "", "an empty list"),
        (lambda line: line[:-20] + "\n", "line 1: not a run"),
        (lambda line: line.replace('"epoch"', '"hour"'), "line 1: not a run: unit"),
        (lambda line: line + line.replace('"task"', '"tusk"'), "line 2: not a run"),
    ],
)
def test_a_damaged_list_is_refused_in_one_line(job, tmp_path, change, message):
    path = write_list([job("finish", "a")], tmp_path, "mine")
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=message):
        read_list(path)


def test_progress_is_what_the_last_lines_say(tmp_path):
    job = Job("classification", "c.yaml", (), str(tmp_path), length=10, unit="epoch")
    assert read_progress(job) == Progress()
    lines = [
        {"kind": "train", "update": 5, "epoch": 1, "loss": 2.0},
        {"kind": "epoch", "update": 7, "epoch": 1, "train_loss": 1.5, "test_top1": 40.0},
        {"kind": "train", "update": 10, "epoch": 2, "loss": 1.25},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"kind": "train", "upd')
    progress = read_progress(job)
    assert progress == Progress(update=10, epoch=2, evaluated_at=(1, 7), loss=1.25, metric=40.0)
    assert (progress.length(job), progress.updates(job)) == (1, 70)


def test_the_display_tells_each_change_once_where_there_is_no_terminal(job, capsys):
    run_jobs([job("finish", "a"), job("fail", "b")], watch=Display())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert [line.partition(": ")[2].split("  ")[0] for line in lines] == [
        "running", "complete", "running", "failed: error: this one fails",
    ]  # fmt: skip
