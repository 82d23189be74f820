"""reproduce.sh as users call it: cells of a table, a farm killed at some moment, a cell that always fails."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_scripts import ENVIRONMENT, ROOT, call, wait_for
from training_runs import process

from classification.data import load_data as load_images
from engine.errors import UserError
from language_model.data import load_corpus
from nmt.data import load_data as load_parallel
from scripts.jobs import read_list
from scripts.reproduce import list_of_runs, parse
from scripts.reproduce import main as reproduce
from scripts.synthetic import make_data
from scripts.tables import TASKS, load_settings

REPRODUCE = [sys.executable, "-m", "scripts.reproduce"]
SMALL = ["device=cpu", "epochs=2", "log_every=1"]


def kill_all(farm):
    trainings = _children(farm.pid)
    for pid in (farm.pid, *trainings):
        os.kill(pid, signal.SIGKILL)
    farm.communicate()


def _children(pid):
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_children(int(child))]
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the trainings in /proc")
def test_a_farm_killed_twice_ends_in_the_right_table_and_names_what_always_fails(tmp_path):
    arguments = ["digits", "--rows", "sgd adam", "--seeds", "1", "--jobs", "2", *SMALL, "--runs"]
    uninterrupted = call([*REPRODUCE, *arguments, str(tmp_path / "whole")])
    assert uninterrupted.returncode == 0, uninterrupted.stderr

    # The same two runs, and one that always fails; as a list, and first in it.
    (path,) = (tmp_path / "whole/lists").iterdir()
    lines = path.read_text().replace(f"{tmp_path}/whole", f"{tmp_path}/killed")
    failing = json.loads(lines.splitlines()[0])
    failing["folder"] = failing["folder"].replace("sgd_milestone", "failing")
    failing["overrides"] = [*failing["overrides"][:-1], "optimizer.name=sgdd", f"run_dir={failing['folder']}"]
    (tmp_path / "killed.jsonl").write_text(json.dumps(failing) + "\n" + lines)
    folders = [Path(job.folder) for job in read_list(tmp_path / "killed.jsonl")]

    command = [*REPRODUCE, str(tmp_path / "killed.jsonl"), "--jobs", "2"]
    checkpoints = [folder / "checkpoint.pt" for folder in folders[1:]]
    for reached in (
        lambda: (folders[1] / "metrics.jsonl").exists(),  # in the first epoch of one
        lambda: any(map(Path.exists, checkpoints)),  # with a checkpoint to go on from
    ):
        with process(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as farm:
            wait_for(reached, farm)
            kill_all(farm)
    ended = call(command)
    assert ended.returncode == 1, ended.stderr
    shown = uninterrupted.stdout.strip()
    assert shown in ended.stdout
    (failed,) = re.findall("^failed: .*", ended.stdout, re.M)
    assert str(folders[0]) in failed
    assert re.search(r"error: .*'sgdd'", failed)
    assert f"log: {folders[0]}.log" in failed
    for folder in folders[1:]:
        updates = [json.loads(line)["update"] for line in (folder / "metrics.jsonl").open() if '"train"' in line]
        assert updates == list(range(1, len(updates) + 1))


def test_a_dry_run_says_what_all_will_take_and_leaves_nothing_behind(tmp_path):
    arguments = ["cifar10", "--rows", "sgd", "--seeds", "1 101", "--jobs", "4", "--dry-run", "--runs", str(tmp_path)]
    complete = tmp_path / "cifar10/sgd_milestone/seed1"
    complete.mkdir(parents=True)
    (complete / "result.json").write_text('{"complete": true}')
    small = ["device=cpu", "model.depth=8", "data.root=not_there"]
    ended = call([*REPRODUCE, *arguments, *small])
    assert ended.returncode == 0, ended.stderr
    header, line, _, total, *notes = ended.stdout.splitlines()
    values = dict(zip(re.split("  +", header), re.split("  +", line), strict=True))
    assert (values["cell"], values["runs"]) == ("cifar10/sgd", "3")
    updates = 164 * (50_000 // 128)
    assert values["updates"] == f"{updates:,}"
    hours = float(values["ms/update"]) / 1000 * updates / 3600
    assert float(values["hours a run"]) == pytest.approx(hours, rel=0.01)
    assert float(values["hours"]) == pytest.approx(hours * (1 + 2 * 200 / 164), rel=0.01)  # 164 and 200 epochs
    assert float(values["memory GB"]) > 0.1
    assert "hours of training" in total and "with 3 at a time" in total
    assert "timed on synthetic data, as not_there is not there" in notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar10", "lists"]


@pytest.mark.parametrize("table", ["one_billion_words", "wmt14_en_de", "imagenet"])
def test_synthetic_data_are_what_the_task_reads(monkeypatch, tmp_path, table):
    monkeypatch.chdir(ROOT)
    settings = load_settings(TASKS[table], f"configs/{table}/apollo{'_cosine' if table == 'imagenet' else ''}.yaml")
    overrides = make_data(settings.data.name, tmp_path)
    (root,) = (Path(override.partition("=")[2]) for override in overrides if override.startswith("data.root"))
    settings.data.root = str(root)
    if table == "one_billion_words":
        corpus = load_corpus(settings.data)
        assert corpus.words == 793_471
        assert corpus.train[0].tokens > 200_000
    elif table == "wmt14_en_de":
        data = load_parallel(settings.data.name, root)
        assert data.codec.size == 40_000
        assert 20 < (data.train.target.lengths - 1).mean() < 40
        assert len(data.valid.references) == len(data.valid)
    else:
        data = load_images(settings.data, "cpu", seed=1)
        assert (data.num_classes, data.train_size, data.test_size) == (1000, 1000, 1000)


def test_a_whole_table_is_the_first_published_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    listed = []
    for rows in ([], ["--rows", "sgd_2021 apollow"]):
        options = parse(["all", *rows, "--seeds", "1", "--runs", str(tmp_path)])
        listed.append({Path(job.folder).parent.name for job in read_list(list_of_runs(options))})
    schedules = ("milestone", "cosine")
    rows = ("sgd", "adam", "radam", "adam_adj", "radam_adj", "apollo")
    assert listed[0] == {f"{row}_{schedule}" for row in rows for schedule in schedules} | {"adam_inverse_sqrt"}
    assert listed[1] == {f"{row}_{schedule}" for row in ("sgd_2021", "apollow") for schedule in schedules}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar"], "'cifar' is neither a table .did you mean 'cifar10'"),
        (["cifar10", "--rows", "sgd adamm"], "cifar10 has no 'adamm' .did you mean 'adam'"),
        (["all", "--schedules", "linear"], "all has no 'linear'"),
        (["wmt14_en_de", "--rows", "apollo", "--schedules", "inverse_sqrt"], "no cell of these rows and schedules"),
        (["cifar10", "--rows", " "], "no name given"),
        (["cifar10", "epoch=3"], "unknown key 'epoch'"),
        (["cifar10", "--slurm", "gpu"], "options are of the form"),
    ],
)
def test_refusals_come_before_any_training(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        reproduce([*arguments, "--runs", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
