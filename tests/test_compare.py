"""compare.sh: its protocol on made-up values, what it refuses, and a comparison that is killed twice."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from meta_models import meta_model, needs_muon
from training_runs import process

from engine.config import load_config
from engine.errors import UserError
from engine.parameter_groups import create_grouped_optimizer
from scripts.compare import COMPARISONS, accept_diverged, main, parse, read_comparison, task_of
from scripts.jobs import Job
from scripts.methods import Lines, read_methods
from scripts.pool import State, Turn
from scripts.protocol import FURTHEST, Method, best_factor, best_step, widened
from scripts.tables import CONFIGS, TASKS, load_settings

ROOT = Path(__file__).parent.parent
LOST = -math.inf


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({-1: 3.0, 0: 5.0, 1: 4.0}, 0),
        ({-1: 5.0, 0: 5.0, 1: 5.0}, 0),  # a tie: the middle one
        ({-2: 1.0, -1: 5.0, 0: 5.0, 1: 2.0}, -1),
        ({-1: -9.0, 0: LOST, 1: LOST}, -1),
        ({-1: LOST, 0: LOST, 1: LOST}, None),
    ],
)
def test_the_best_rate(scores, best):
    assert best_step(scores) == best


def test_the_grid_goes_on_for_all_methods_until_each_best_is_inside():
    """Over a made-up landscape: the optimum of each method, and the step from which on it diverges."""

    def searched(*landscapes):
        low, high = -3, 3
        while True:
            tried = [
                {step: LOST if step >= end else -abs(step - optimum) for step in range(low, high + 1)}
                for optimum, end in landscapes
            ]
            if widened(tried) == (low, high):
                return low, high, [best_step(scores) for scores in tried]
            low, high = widened(tried)

    assert searched((0, 9), (1, 3)) == (-3, 3, [0, 1])
    assert searched((0, 9), (4, 9)) == (-3, 5, [0, 4])
    assert searched((-5, 9), (5, 6)) == (-6, 6, [-5, 5])
    assert searched((7, 4)) == (-3, 4, [3])  # the next rate diverges
    assert searched((0, -3)) == (-5, 3, [-4])  # all seven diverge
    assert searched((99, 999)) == (-3, FURTHEST, [FURTHEST])
    assert searched((0, -99)) == (-FURTHEST, 3, [None])


def test_the_weight_decay_of_highest_score():
    assert best_factor({0.2: 1.0, 1.0: 2.0, 5.0: 3.0}) == 5
    assert best_factor({0.2: 3.0, 1.0: 3.0, 5.0: 3.0}) == 1
    assert best_factor({0.2: 3.0, 1.0: 2.0, 5.0: 3.0}) == 0.2
    assert best_factor({0.2: 3.0, 1.0: LOST, 5.0: LOST}) == 0.2


def test_settings_of_trials():
    coupled = Method("sgd", {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4})
    rates = [coupled.setting(step).rate for step in range(-3, 4)]
    assert rates == [0.00316, 0.01, 0.0316, 0.1, 0.316, 1, 3.16]
    assert {coupled.setting(step).decay for step in range(-3, 4)} == {5e-4}
    assert [coupled.setting(2, factor).decay for factor in (0.2, 5)] == [1e-4, 2.5e-3]

    decoupled = Method("adam", {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}, decoupled=True)
    for step in range(-6, 7):
        for factor in (0.2, 1, 5):
            setting = decoupled.setting(step, factor)
            assert setting.rate * setting.decay == pytest.approx(factor * 1e-3, rel=0.01)
    assert Method("sgd", {"name": "sgd", "lr": 0.1, "weight_decay": 0.0}).setting(1).decay is None

    setting = coupled.setting(-1)
    assert setting.name == "lr0.0316_wd0.0005"
    overrides = ["row=sgd", coupled.override(decoupled.setting(6))]
    optimizer = load_settings("classification", COMPARISONS / "digits.yaml", overrides).optimizer
    assert optimizer.settings == {"lr": 10.0, "momentum": 0.9, "weight_decay": 1e-4}


def test_the_lines_and_configs_that_come_with_the_repository():
    for task in sorted(set(TASKS.values())):
        path = CONFIGS / "search" / f"{task}.yaml"
        methods = {method.row: method for method in read_methods(path, ["sgd", "adam", "radam", "apollo"])}
        has_decay = task != "language_model"
        assert {bool(method.decay) for method in methods.values()} == {has_decay}
        assert [row for row, method in methods.items() if method.decoupled] == ["adam", "radam"] * has_decay
    for path in COMPARISONS.glob("*.yaml"):
        stand_in = ["row=sgd", "optimizer={name: sgd, lr: 1}"]
        task = task_of(path, stand_in)
        settings = load_settings(task, path, stand_in)
        assert settings.table == path.stem
        assert settings.schedule.name != "constant"
        assert TASKS.get(path.stem, task) == task


def test_a_class_without_a_line_begins_with_the_rate_and_the_decay_of_adam():
    path = CONFIGS / "search/classification.yaml"
    adam, adamax, adamw, rprop = read_methods(
        path, ["adam", "torch.optim.Adamax", "torch.optim.AdamW", "torch.optim.Rprop"]
    )
    assert adamax.row == "Adamax"
    assert adamax.optimizer == {"name": "torch.optim.Adamax", "lr": 0.01, "weight_decay": 5e-4}
    assert (adamax.decoupled, adamw.decoupled, adam.decoupled) == (False, True, True)
    assert rprop.decay is None


COUPLED = {"sgd", "apollo", "schedule_free_sgd", "sam", "lbfgs"}  # whose decay, if any, is added to the gradient


@needs_muon
@pytest.mark.parametrize("table", ["digits", "pydoc_topics", "pydoc_topics_transformer", "grammar"])
def test_every_line_makes_its_optimizer_for_the_models_that_it_is_tried_on(table):
    pytest.importorskip("pytorch_optimizer")
    pytest.importorskip("schedulefree")
    task = TASKS[table]
    path = CONFIGS / "search" / f"{task}.yaml"
    methods = read_methods(path, list(load_config(Lines, path).root))
    assert {method.row for method in methods if method.decay and not method.decoupled} <= COUPLED
    assert not {method.row for method in methods if method.decoupled} & COUPLED
    for method in methods:
        setting = method.setting(2, 5.0)
        overrides = [f"row={method.row}", method.override(setting)]
        config = load_settings(task, COMPARISONS / f"{table}.yaml", overrides)
        model = meta_model(task, config)
        optimizer = create_grouped_optimizer(model, config.optimizer, "cpu")
        assert {group["lr"] for group in optimizer.param_groups} >= {setting.rate}
        assert {group.get("weight_decay") or None for group in optimizer.param_groups} >= {setting.decay}


def lines_of(tmp_path, **optimizers):
    path = tmp_path / "lines.yaml"
    path.write_text(json.dumps(optimizers))
    return read_methods(path, list(optimizers))


@needs_muon
def test_rates_and_decays_of_groups_change_in_proportion(tmp_path):
    muon = {"match": 2, "name": "torch.optim.Muon", "lr": 0.02}
    groups = [muon, {"match": 1, "weight_decay": 0}, {"match": "conv1", "lr": 0.006}]
    (method,) = lines_of(tmp_path, mixed={"name": "adamw", "lr": 0.003, "weight_decay": 0.2, "groups": groups})
    assert method.decoupled
    written = method.override(method.setting(2, 5.0)).removeprefix("optimizer=")
    of_muon, of_vectors, of_first = json.loads(written)["groups"]
    assert json.loads(written) | {"groups": []} == {"name": "adamw", "lr": 0.03, "weight_decay": 0.1, "groups": []}
    assert of_muon == muon | {"lr": 0.2, "weight_decay": 0.05}  # by default torch's Muon has 0.1
    assert of_vectors == {"match": 1, "weight_decay": 0}
    assert of_first == {"match": "conv1", "lr": 0.06}


def test_what_an_optimizer_needs_stays_in_its_trials(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    sam = {"name": "pytorch_optimizer.SAM", "base_optimizer": "sgd", "lr": 0.1, "needs": "closure"}
    decay_without_rate = {"name": "pytorch_optimizer.Lion", "lr": 0.1, "weight_decay": 0.1, "fixed_decay": True}
    adan = {"name": "pytorch_optimizer.Adan", "lr": 0.1, "weight_decay": 0.1}
    soap = {"name": "pytorch_optimizer.SOAP", "lr": 0.003}
    sam, lion, adan, soap = lines_of(tmp_path, sam=sam, lion=decay_without_rate, adan=adan, soap=soap)
    assert json.loads(sam.override(sam.setting(0)).removeprefix("optimizer="))["needs"] == "closure"
    assert (sam.decoupled, lion.decoupled, adan.decoupled, soap.decoupled) == (False, False, True, True)
    assert soap.decay == 0.01  # its default is tuned as any other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"needs": "closures"}, "needs"),
        ({"groups": [{"match": 2, "name": "sgd", "momentums": 0.9}]}, "no setting 'momentums'"),
        ({"groups": [{"match": 2, "name": "sgd", "lr": 1, "weight_decay": 0.1}]}, "one factor cannot tune"),
        ({"weight_decay": 0, "groups": [{"match": 2, "weight_decay": 0.1}]}, "one factor cannot tune"),
    ],
)
def test_lines_that_cannot_be_tuned_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        lines_of(tmp_path, mine={"name": "adamw", "lr": 0.01, "weight_decay": 0.1, **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "digit"], "there is no 'digit' .did you mean 'digits'"),
        (["--task", "digits", "--methods", "sgd adamm"], "has no 'adamm' .did you mean 'adam'.*dotted name"),
        (["--task", "digits", "--methods", "torch.optim.Adamm"], "cannot be imported"),
        (["--task", "digits", "--methods", "sgd torch.optim.SGD torch.optim.sgd.SGD"], "two are called SGD"),
        (["--task", "digits", "--seeds", "1 8191"], "8191 is the seed of the trials"),
        (["--task", "digits", "--rates", "4"], "an odd number"),
        (["--task", "digits", "optimizer.lr=1"], "optimizer.lr= cannot be set"),
        (["--task", "digits", "epoch=3"], "unknown key 'epoch'"),
        (["--config", "configs/nowhere.yaml"], "nowhere.yaml: no such config"),
        ([], "one of the arguments --task --config is required"),
    ],
)
def test_refusals_come_before_any_training(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([*arguments, "--runs", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_several_gpus_divide_every_run_and_it_is_said(tmp_path, capsys):
    comparison = read_comparison(parse(["--task", "digits", "--gpus", "2", "--runs", str(tmp_path)]))
    assert {"batch=32", "passes=2"} <= set(comparison.overrides)
    assert "BatchNorm sees 32 instead of 64" in capsys.readouterr().err


def test_only_a_run_that_diverged_is_given_the_worst_value(tmp_path):
    def turn(name, error):
        (tmp_path / name).mkdir()
        job = Job("nmt", "config.yaml", (), str(tmp_path / name), 1, "update")
        return Turn(job, State.FAILED, status=2, error=error)

    diverged = turn("diverged", "error: the training loss is nan at update 7: the run has diverged; lower optimizer.lr")
    failed = turn("failed", "error: no space left on device")
    accept_diverged([diverged, failed], "ppl")
    assert (diverged.state, diverged.status, failed.state, failed.status) == (State.COMPLETE, 0, State.FAILED, 2)
    assert diverged.job.complete
    assert not failed.job.complete


EXPLODING = """
import torch

class Exploding(torch.optim.SGD):
    def step(self):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"] if group["lr"] > 0.02 else ():
                parameter.data.mul_(1e30)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the trainings in /proc")
def test_a_comparison_killed_twice_ends_in_the_same_table(tmp_path):
    (tmp_path / "exploding.py").write_text(EXPLODING)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", tmp_path)))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    small = ["epochs=1", "schedule={name: cosine}", "data.validation=0.6", "device=cpu"]
    command = [sys.executable, "tests/forked_compare.py", "--task", "digits", "--methods", "sgd exploding.Exploding"]
    command += ["--rates", "3", "--seeds", "1 2", "--jobs", "2", *small, "--runs"]

    def compare(runs):
        ended = subprocess.run([*command, str(runs)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.replace(str(runs), "RUNS")

    whole = compare(tmp_path / "whole")
    killed = tmp_path / "killed"
    for reached in (
        lambda: list(killed.glob("digits/search/*/*/checkpoint.pt")),  # in a trial
        lambda: list(killed.glob("digits/*_cosine/seed1/metrics.jsonl")),  # in a final run
    ):
        with process([*command, str(killed)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as running:
            while not reached():
                assert running.poll() is None
                time.sleep(0.01)
            for pid in (running.pid, *children(running.pid)):
                os.kill(pid, signal.SIGKILL)
    assert compare(killed) == whole

    header, *lines = whole.splitlines()[:3]
    assert header.split() == "method rate weight decay trials validation test top1: mean (std) n".split()
    sgd, exploding = (re.split("  +", line) for line in lines)
    assert (sgd[0], exploding[0]) == ("sgd", "Exploding")
    # The same number of trials, of which none and those above 0.02 diverged.
    trials = sorted(tmp_path.glob("whole/digits/search/Exploding/*"))
    folders = [folder for folder in trials if folder.is_dir()]
    lost = [folder for folder in folders if json.loads((folder / "result.json").read_text()).get("diverged")]
    assert (
        {folder.name for folder in lost} == {folder.name for folder in folders if float(rate(folder)) > 0.02} != set()
    )
    assert sgd[3] == str(len(folders))
    assert exploding[3] == f"{len(folders)}, {len(lost)} diverged"
    assert float(exploding[1]) < 0.02
    # The choice is the best on the validation images, and the last columns are of the test images, of fresh seeds.
    chosen = json.loads((tmp_path / f"whole/digits/search/sgd/lr{sgd[1]}_wd{sgd[2]}/result.json").read_text())
    values = [
        json.loads(path.read_text())["validation"] for path in tmp_path.glob("whole/digits/search/sgd/*/result.json")
    ]
    assert chosen["validation"] == max(values)
    assert float(sgd[4]) == pytest.approx(max(values), abs=0.005)
    finals = [json.loads(path.read_text()) for path in tmp_path.glob("whole/digits/sgd_cosine/*/result.json")]
    assert {result["seed"] for result in finals} == {1, 2}
    assert sgd[5].split()[0] == f"{sum(result['final'] for result in finals) / 2:.2f}"


def rate(folder):
    return re.match("lr([^_]+)", folder.name)[1]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
