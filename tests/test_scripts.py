"""The shell scripts as users call them: a row trained, skipped, interrupted and resumed; the quickstart; set-up."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import process

from engine.errors import UserError
from scripts.jobs import division
from scripts.missing import missing
from scripts.quickstart import EXPERIMENTS, METHODS
from scripts.reporting.recipes import published_cells
from scripts.run_row import main as run_row
from scripts.tables import TASKS, cells

ROOT = Path(__file__).parent.parent
ON_DIGITS = ["data.name=digits", "model.depth=8", "device=cpu"]
# The interpreter of the tests comes first, so that the scripts find torch there and set nothing up.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def script(name, *arguments):
    return ["bash", f"scripts/{name}.sh", *map(str, arguments)]


def call(command, cwd=ROOT, env=ENVIRONMENT):
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_row_is_trained_then_skipped(tmp_path):
    command = script(
        "cifar_apollo", "--seeds", "1 101", "--schedules", "milestone", *ON_DIGITS, "epochs=1", "--runs", tmp_path
    )
    first = call(command)
    assert first.returncode == 0, first.stderr
    folders = [tmp_path / f"cifar10/apollo_milestone/seed{seed}" for seed in (1, 101)]
    finals = [json.loads((folder / "result.json").read_text())["final"] for folder in folders]

    _, header, row, *notes = first.stdout.splitlines()
    assert header.split()[-2:] == ["published", "difference"]
    words = row.split()
    assert words[:2] == ["apollo", "milestone"]
    assert float(words[2]) == pytest.approx(sum(finals) / 2, abs=0.005)
    assert words[6:9] == ["2", "94.20", "(0.12)"]
    (note,) = [line for line in notes if line]
    assert "seeds 1 101: not the published recipe: " in note
    assert all(change in note for change in ("epochs=1", "data.name=digits", "model.depth=8"))

    written = [(folder / "result.json").stat().st_mtime_ns for folder in folders]
    second = call(command)
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("complete, skipped") == 2
    assert second.stdout == first.stdout
    assert [(folder / "result.json").stat().st_mtime_ns for folder in folders] == written

    other = call([*command, "epochs=2"])
    assert (other.returncode, other.stdout) == (2, "")
    assert re.fullmatch(r"error: .*seed1 holds a run with other settings: epochs .*\n", other.stderr)


def test_signal_reaches_the_run_which_saves_and_is_resumed(tmp_path):
    command = script(
        "cifar_sgd", "--seeds", "1", "--schedules", "milestone", *ON_DIGITS, "epochs=2", "--runs", tmp_path
    )
    command.append("log_every=1")
    folder = tmp_path / "cifar10/sgd_milestone/seed1"
    with process(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as row:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, row)
        row.send_signal(signal.SIGTERM)
        _, told = row.communicate(timeout=60)
    assert row.returncode == 128 + signal.SIGTERM, told
    assert "the same command carries on" in told
    assert (folder / "checkpoint.pt").exists()
    assert not (folder / "result.json").exists()

    resumed = call(command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stderr
    assert json.loads((folder / "result.json").read_text())["complete"]


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_row_stops_at_the_first_failure_with_its_one_line(tmp_path):
    row = call(script("cifar_adam", "--seeds", "1 101", "--runs", tmp_path, *ON_DIGITS, "optimizer.name=adamm"))
    assert row.returncode == 2
    assert row.stdout == ""
    (error,) = [line for line in row.stderr.splitlines() if line.startswith("error: ")]
    assert "adamm" in error
    assert "[1/4]" in row.stderr
    assert "[2/4]" not in row.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=3"], "seed= cannot be set for a row.*--seeds"),
        (["run_dir=here"], "run_dir= cannot be set for a row.*--runs"),
        (["epoch=3"], "unknown key 'epoch' .did you mean 'epochs'"),
        (["epochs"], "not of the form key=value"),
        (["--seeds", "1 -2"], "seeds are whole numbers"),
        (["--seeds", ""], "seeds are whole numbers"),
        (["--schedules", "cosine linear"], "not one or more of: milestone, cosine"),
        (["--gpus", "0"], "a whole number above 0"),
        (["--seed", "3"], "unrecognized arguments: --seed"),
    ],
)
def test_refusals_are_one_line_and_come_before_any_training(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message) as caught:
        run_row(["cifar10", "apollo", "--runs", str(tmp_path), *arguments])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_are_said_before_torch_is_imported(tmp_path):
    offline = ENVIRONMENT | {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}
    ended = call(script("cifar_apollo", f"data.root={tmp_path}", "--runs", tmp_path / "runs"), env=offline)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert f"(or: bash scripts/prepare.sh cifar10 SOURCE {tmp_path})" in ended.stderr

    code = (
        "import sys\n"
        "from scripts.run_row import UserError, main\n"
        "try: main(['cifar10', 'apollo', *sys.argv[1:]])\n"
        "except UserError as error: print(error, {'torch', 'torchvision'} & set(sys.modules), sep='\\n')\n"
    )
    ended = call([sys.executable, "-c", code, f"data.root={tmp_path}", "--runs", tmp_path / "runs"], env=offline)
    assert ended.returncode == 0, ended.stderr
    message, imported = ended.stdout.splitlines()
    assert "is not complete" in message and imported == "set()"
    assert not (tmp_path / "runs").exists()


def test_a_row_with_all_its_data_does_not_download(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("scripts.run_row.run_jobs", lambda *arguments, **settings: (3, []))
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert run_row(["cifar10", "apollo", f"data.root={tmp_path}", "--runs", str(tmp_path / "runs")]) == 3


def test_configs_are_read_without_torch():
    code = "import sys, scripts.tables\n" + "".join(
        f"scripts.tables.load_settings('{task}', '{next((ROOT / 'configs' / table).glob('a*.yaml'))}')\n"
        for table, task in TASKS.items()
    )
    ended = call([sys.executable, "-c", f"{code}print({{'torch', 'torchvision'}} & set(sys.modules))"])
    assert (ended.stdout, ended.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    ("config", "overrides", "gpus", "added", "said"),
    [
        ("cifar10/sgd_cosine", [], 2, ["batch=64", "passes=2"], "BatchNorm sees 64 instead of 128, which is another"),
        ("cifar10/sgd_cosine", ["batch=64", "passes=2"], 2, [], ""),
        ("imagenet/sgd_cosine", [], 4, [], ""),
        (
            "imagenet/sgd_cosine",
            ["batch=256", "passes=1", "batchnorm_group=32"],
            2,
            ["batch=128", "passes=2"],
            "the same",
        ),
        ("one_billion_words/adam", [], 4, ["batch=32", "passes=4"], "the update is the same"),
        ("wmt14_en_de/adam", [], 8, [], ""),
        ("wmt14_en_de/adam", [], 16, ["batch=4096", "passes=16"], "a pass sees 4096 instead of 8192, which is another"),
    ],
)
def test_gpus_that_do_not_divide_the_passes_say_what_they_change(
    capsys, monkeypatch, config, overrides, gpus, added, said
):
    monkeypatch.chdir(ROOT)
    path = Path(f"configs/{config}.yaml")
    assert division(TASKS[path.parent.name], path, overrides, gpus) == added
    words = capsys.readouterr().err
    assert (said in words and " ".join(added) in words) if said else words == ""


def test_gpus_that_cannot_divide_an_update_are_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="--gpus 3: an update of batch=128 passes=1 cannot be divided"):
        division("classification", Path("configs/cifar10/sgd_cosine.yaml"), [], 3)


@pytest.mark.parametrize(
    ("prefix", "table"),
    [("cifar", "cifar10"), ("imagenet", "imagenet"), ("lm", "one_billion_words"), ("nmt", "wmt14_en_de")],
)
def test_every_row_of_a_table_has_its_script(monkeypatch, prefix, table):
    monkeypatch.chdir(ROOT)
    rows = {}
    for row, schedule in published_cells(table):
        rows.setdefault(row, set()).add(schedule)
    assert {path.stem.removeprefix(f"{prefix}_") for path in ROOT.glob(f"scripts/{prefix}_*.sh")} == set(rows)
    for row, schedules in rows.items():
        assert set(cells(table, row)) == schedules
        assert f"scripts.run_row {table} {row} " in (ROOT / f"scripts/{prefix}_{row}.sh").read_text()


def test_a_row_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="cifar10 has no row 'adamax' .did you mean 'adam'"):
        run_row(["cifar10", "adamax"])


TASKS_SHORT = {
    "classification": ["epochs=1"],
    "lm": ["--task", "lm", "epochs=1", "model.embedding=32", "model.hidden=32"],
    "nmt": ["--task", "nmt", "updates=20", "decoding.beam=1", "model.width=32", "model.inner_width=32"],
}


@pytest.mark.parametrize("task", EXPERIMENTS)
def test_quickstart_ends_in_a_table_and_a_picture(tmp_path, task):
    ended = call(script("quickstart", *TASKS_SHORT[task], "--seeds", "1", "--runs", tmp_path, "device=cpu"))
    assert ended.returncode == 0, ended.stderr
    table = EXPERIMENTS[task]
    lines = [line.split() for line in ended.stdout.splitlines()]
    n = next(line.index("n") for line in lines if line[:1] == ["row"] and "n" in line)
    assert [line[0] for line in lines if line[n : n + 1] == ["1"]] == list(METHODS)
    assert (tmp_path / table / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in ended.stderr


def test_missing_names_what_is_absent_or_too_old():
    assert missing(["torch>=2.6", "numpy", "pytest"]) == []
    assert missing(["torch>=1000", "numpy", "no-such-distribution"]) == ["torch>=1000", "no-such-distribution"]


@pytest.fixture
def bare_machine(tmp_path):
    """A copy of the scripts, and an environment whose PATH has a few tools but no Python."""
    shutil.copytree(ROOT / "scripts", tmp_path / "tree/scripts", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path / "tree")
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "grep", "sed", "tr"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path / "tree", {"PATH": str(tmp_path / "bin"), "PIP_NO_INDEX": "1"}


def put_python(environment, name, failing="nothing"):
    """Put this interpreter on that PATH as `name`. It fails if its arguments match `failing`."""
    python = Path(environment["PATH"]) / name
    python.write_text(f'#!/bin/sh\ncase "$*" in {failing}) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)


def test_setup_without_python_says_what_to_install(bare_machine):
    tree, environment = bare_machine
    ended = call(["bash", "scripts/test.sh"], cwd=tree, env=environment)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"error: no Python 3\.10 or newer found; install one .*\n", ended.stderr)


def test_setup_without_the_venv_module_says_what_to_install(bare_machine):
    tree, environment = bare_machine
    put_python(environment, "python3.12", failing="*torch*|*ensurepip*")
    ended = call(["bash", "scripts/setup.sh"], cwd=tree, env=environment)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: python3\.12 cannot make virtual environments; .*python3\.12-venv\)\n", ended.stderr)


def test_setup_uses_an_interpreter_that_has_torch_and_installs_nothing(bare_machine):
    tree, environment = bare_machine
    put_python(environment, "python")
    ended = call(["bash", "scripts/setup.sh", "--print-python"], cwd=tree, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert Path(ended.stdout.strip()).samefile(sys.executable)
    assert not (tree / ".venv").exists()
