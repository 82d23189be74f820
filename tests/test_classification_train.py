"""The whole training command on scikit-learn's digits: killed and resumed, on two ranks, and with bad input."""

import json
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training_runs import (
    Cell,
    assert_same_end,
    logged_updates,
    losses,
    metrics,
    one_line_error,
    process,
    recipe,
    result,
    saved,
    wait_until,
)

from classification import evaluate, train
from classification.models import MODELS
from engine.errors import UserError
from scripts.reporting.bundle import write_bundle

CONFIG = """
table: digits
row: apollo
epochs: 2
batch: 64
data: {name: digits}
model: {name: resnet, depth: 8}
log_every: 1
optimizer: {name: apollo, lr: 0.5, eps: 1.0e-4, weight_decay: 5.0e-4}
schedule: {name: milestone, milestones: [1], decay_rate: 0.1, warmup_updates: 10, init_lr: 0.01}
checkpoint: {minutes: 0, keep: 2}      # a checkpoint after every update: a kill often hits the middle of one
"""
UPDATES = 2 * (1442 // 64)


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Cell:
    path = tmp_path_factory.mktemp("config") / "cell.yaml"
    path.write_text(CONFIG)
    return Cell("classification.train", path)


@pytest.fixture(scope="module")
def uninterrupted(cell, tmp_path_factory) -> Path:
    return cell.complete(tmp_path_factory.mktemp("uninterrupted") / "run")


def test_deterministic_runs_repeat_bit_for_bit(cell, tmp_path):
    one, other = (cell.complete(tmp_path / name, "deterministic=true", "epochs=1") for name in ("one", "other"))
    assert_same_end(one, other)
    assert json.loads((one / "environment.json").read_text())["deterministic"] is True


def printed_scores(capsys, *arguments: object) -> list[str]:
    capsys.readouterr()
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_run_and_its_bundle_are_scored_alike(uninterrupted, tmp_path, capsys):
    last = metrics(uninterrupted, "epoch")[-1]
    expected = [
        f"355 images, weights after {UPDATES} updates",
        f"top-1 accuracy, %  {last['test_top1']:8.2f}",
        f"loss               {last['test_loss']:8.4f}",
    ]
    assert printed_scores(capsys, uninterrupted, "eval_batch=100") == expected
    bundle = write_bundle(uninterrupted, tmp_path)
    assert printed_scores(capsys, bundle, "eval_batch=100") == expected


def test_weights_that_cannot_be_scored(uninterrupted, tmp_path):
    bundle = write_bundle(uninterrupted, tmp_path)
    with pytest.raises(UserError, match=r"another model \(\S+: "):
        evaluate.main([str(bundle), "model.depth=14"])
    path = bundle / "weights.safetensors"
    content = path.read_bytes()
    for damaged in (content[:1000], b"", b"\xff" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="weights.safetensors: damaged"):
            evaluate.main([str(bundle)])
    save_file({"weight": torch.zeros(1)}, path)  # of another program
    with pytest.raises(UserError, match="not written by scripts.report"):
        evaluate.main([str(bundle)])
    path.unlink()
    with pytest.raises(UserError, match="neither a checkpoint nor weights.safetensors there"):
        evaluate.main([str(bundle)])


def test_a_whole_run(uninterrupted, cell):
    outcome = result(uninterrupted)
    assert outcome["complete"] and outcome["epochs"] == 2 and outcome["evaluated"] == 355 and outcome["seed"] == 1
    assert outcome["parameters"] == 78042 and outcome["row"] == "apollo" and outcome["schedule"] == "milestone"
    assert outcome["best"] >= outcome["final"] > 15  # better than chance after two epochs
    lines = metrics(uninterrupted)
    assert [line["update"] for line in lines if line["kind"] == "train"] == list(range(1, UPDATES + 1))
    assert lines[-1]["kind"] == "epoch" and lines[-1]["test_top1"] == outcome["final"]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[0] == pytest.approx(0.01) and rates[10] == 0.5 and rates[-1] == pytest.approx(0.05)
    assert recipe(uninterrupted)["world_size"] == 1 and recipe(uninterrupted)["batchnorm_batch"] == 64
    again = cell.run(uninterrupted)
    assert again.status == 0 and "nothing to do" in again.stderr


def test_killed_again_and_again_it_ends_the_same(cell, uninterrupted, tmp_path):
    for at_update in (5, 17, 31):
        killed = cell.interrupt(tmp_path / "run", at_update=at_update, number=signal.SIGKILL)
        assert killed.status == -signal.SIGKILL and not (tmp_path / "run/result.json").exists()
    ended = cell.run(tmp_path / "run")
    assert ended.status == 0 and "resuming at epoch 2" in ended.stderr, ended.stderr
    assert_same_end(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_first(cell, uninterrupted, tmp_path, number, status):
    """Without timed checkpoints, the signal alone causes one."""
    run_dir = tmp_path / "run"
    stopped = cell.interrupt(run_dir, "checkpoint.minutes=60", at_update=3, number=number)
    assert stopped.status == status and "saved" in stopped.stderr
    progress = saved(run_dir)["progress"]
    assert progress["update_in_epoch"] == progress["update"] == logged_updates(run_dir) >= 3
    assert_same_end(uninterrupted, cell.complete(run_dir))


# A small learning rate: a larger one makes much of a difference in rounding within a few updates.
SLOW = (
    "epochs=1",
    "checkpoint.minutes=60",
    "optimizer={name: sgd, lr: 2.0e-3, momentum: 0.9}",
    "schedule={name: constant}",
)


def test_how_an_update_is_carried_out_changes_nothing(cell, tmp_path):
    """4 passes of 32 on 1, 2 and 4 ranks, and one pass in groups of 32: losses and statistics agree to rounding."""
    passes, groups = ("batch=32", "passes=4"), ("batch=128", "batchnorm_group=32")
    one = cell.complete(tmp_path / "one", *SLOW, *passes)
    others = [cell.complete(tmp_path / f"ranks_{n}", *SLOW, *passes, ranks=n) for n in (2, 4)]
    others.append(cell.complete(tmp_path / "groups", *SLOW, *groups))
    assert len(losses(one)) == 1442 // 128
    for other in others:
        assert losses(other) == pytest.approx(losses(one), rel=1e-4)
        assert result(other)["evaluated"] == 355 and recipe(other)["batchnorm_batch"] == 32
        for name, value in saved(one)["model"].items():
            torch.testing.assert_close(saved(other)["model"][name], value, rtol=1e-3, atol=1e-3, msg=name)
    assert [recipe(other)["world_size"] for other in others] == [2, 4, 1]
    assert saved(one)["model"]["bn1.num_batches_tracked"] == 1442 // 128  # the first pass of an update alone
    halves = cell.complete(tmp_path / "halves", *SLOW, "batch=64", "passes=2")  # the same images: another BatchNorm
    assert losses(halves)[0] != pytest.approx(losses(one)[0], rel=1e-4)


def test_held_out_images_are_evaluated_beside_the_test_images(cell, uninterrupted, tmp_path):
    run_dir = cell.complete(tmp_path / "run", "data.validation=0.2", "checkpoint.minutes=60")
    outcome, last = result(run_dir), metrics(run_dir, "epoch")[-1]
    assert outcome["validation"] == last["valid_top1"] != outcome["final"] == last["test_top1"]
    assert recipe(run_dir)["train_examples"] == 1442 - recipe(run_dir)["valid_examples"]
    assert "validation" not in result(uninterrupted) and "valid_top1" not in metrics(uninterrupted, "epoch")[-1]


class Viewing(torch.nn.Module):
    """Takes its images by `view`, which refuses channels-last tensors."""

    def __init__(self, num_classes):
        super().__init__()
        self.fc = torch.nn.Linear(3 * 32 * 32, num_classes)

    def forward(self, images):
        return self.fc(images.view(len(images), -1))


def test_without_channels_last_evaluation_too_gets_contiguous_images(cell, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "viewing", Viewing)
    ours = ["model={name: viewing}", "channels_last=false", "epochs=1", "data.validation=0.8", "device=cpu"]
    assert train.main([str(cell.config), f"run_dir={tmp_path / 'run'}", *ours]) == 0


def test_two_ranks_stopped_and_resumed_by_the_real_torchrun(cell, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    ours = ("batch=32", "passes=2", "checkpoint.minutes=60")
    with process(cell.command_line(stopped, *ours, ranks=2), stderr=subprocess.DEVNULL) as torchrun:
        wait_until(lambda: logged_updates(stopped) >= 12 or torchrun.poll() is not None)
        torchrun.send_signal(signal.SIGTERM)
    assert saved(stopped)["progress"]["update"] % 5 == 0
    assert not (stopped / "result.json").exists()
    assert_same_end(cell.complete(stopped, *ours, ranks=2), cell.complete(whole, *ours, ranks=2))


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
        (["batch=2000"], ["batch=2000", "1442"]),
        (["batchnorm_group=24"], ["batchnorm_group=24 does not divide batch=64"]),
        (["data={name: folder, root: nowhere}"], ["nowhere"]),
        (["optimizer={name: sgd, lr: 1.0e+30}"], ["loss is nan at update", "diverged", "optimizer.lr"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(cell, tmp_path, overrides, words):
    message = cell.refusal(tmp_path / "run", *overrides)
    assert all(word in message for word in words), message


def test_a_folder_of_another_run_is_left_alone(cell, uninterrupted):
    before = (uninterrupted / "config.yaml").read_bytes()
    message = cell.refusal(uninterrupted, "optimizer.lr=0.1", "model.depth=14")
    assert "optimizer.lr (0.5 there, 0.1 now)" in message and "model.depth" in message
    assert (uninterrupted / "config.yaml").read_bytes() == before


def test_one_folder_takes_one_run_at_a_time(cell, tmp_path):
    running = cell.start(tmp_path / "run")
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists())
    message = cell.refusal(tmp_path / "run")
    running.send(signal.SIGKILL)
    assert running.wait().status == -signal.SIGKILL
    assert "another process is training" in message


def test_a_disk_that_fills_up_loses_nothing(cell, uninterrupted, tmp_path):
    """A limit on the size of files acts as the full disk. The second half of the run's log does not fit."""
    run_dir = tmp_path / "run"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))  # noqa: E731
    cell.interrupt(run_dir, at_update=9, number=signal.SIGKILL)
    names = ("checkpoint.pt", "checkpoint.1.pt")
    before = {name: (run_dir / name).read_bytes() for name in names if (run_dir / name).exists()}
    command = cell.command_line(run_dir)
    message = one_line_error(subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit))
    assert "cannot save a checkpoint" in message and "File too large" in message
    assert {name: (run_dir / name).read_bytes() for name in before} == before
    assert_same_end(uninterrupted, cell.complete(run_dir))


def test_a_truncated_checkpoint_costs_one_checkpoint(cell, uninterrupted, tmp_path):
    cell.interrupt(tmp_path / "run", at_update=9, number=signal.SIGKILL)
    os.truncate(tmp_path / "run/checkpoint.pt", 1000)
    ended = cell.run(tmp_path / "run")
    assert ended.status == 0 and "checkpoint.pt is damaged" in ended.stderr and "checkpoint.1.pt" in ended.stderr
    assert_same_end(uninterrupted, tmp_path / "run")
