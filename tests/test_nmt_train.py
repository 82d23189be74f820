"""The whole training command on generated sentences: killed and resumed, on two ranks, and with bad input."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from nmt_cell import make_cell
from training_runs import Cell, assert_same_end, losses, metrics, recipe, result, saved

from engine.config import load_config
from engine.distributed import World
from engine.errors import UserError
from nmt.codec import Codec
from nmt.data import load_data, train_batches
from nmt.scoring import all_scores, translate_split
from nmt.train import Config, prepare
from nmt.trained import open_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_cell(tmp_path_factory.mktemp("nmt"))


@pytest.fixture(scope="module")
def cell(folder) -> Cell:
    return Cell("nmt.train", folder / "cell.yaml")


@pytest.fixture(scope="module")
def uninterrupted(folder, cell) -> Path:
    return cell.complete(folder / "uninterrupted")


def test_a_whole_run(uninterrupted, folder, cell):
    outcome = result(uninterrupted)
    assert outcome["complete"] and outcome["metric"] == "fairseq_bleu" and outcome["updates"] == 24
    assert outcome["evaluated"] == 50 and outcome["averaged_updates"] == [16, 20, 24]
    assert outcome["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert len((uninterrupted / "test.de.txt").read_text().splitlines()) == 50
    assert Codec.load(uninterrupted).digest == Codec.load(folder / "data").digest
    kept = sorted(path.name for path in (uninterrupted / "averaging").iterdir())
    assert kept == ["00000016", "00000020", "00000024"]

    train = metrics(uninterrupted, "train")
    assert [line["update"] for line in train] == list(range(1, 25))
    assert train[-1]["nll"] < 0.85 * train[0]["nll"] and all(line["loss"] > line["nll"] for line in train[-5:])
    assert [line["clipped"] for line in train] == [float(line["gradient_norm"] > 1.0) for line in train]
    assert {line["clipped"] for line in train} == {0.0, 1.0}
    rates = [line["lr"] for line in train]
    assert rates[0] == pytest.approx(0.01) and rates[10] == 5.0 and rates[-1] == pytest.approx(0.5)
    validations = metrics(uninterrupted, "validation")
    assert [line["update"] for line in validations] == [10, 20, 24]
    last = validations[-1]
    assert last["valid_ppl"] == pytest.approx(torch.tensor(last["valid_nll"]).exp().item(), rel=1e-5)
    split = load_data("small", folder / "data").train
    words = [batch.tokens for ((_, batch),) in train_batches(split, 512, 1, 1, 0)][:24]
    assert last["tokens"] == sum(words)
    weighted = sum(line["loss"] * n for line, n in zip(train[20:], words[20:], strict=True)) / sum(words[20:])
    assert last["train_loss"] == pytest.approx(weighted, rel=1e-6)
    assert "nothing to do" in cell.run(uninterrupted).stderr


def test_the_validation_score_is_that_of_the_averaged_weights(uninterrupted):
    config, codec, model, _, world = open_run(uninterrupted, ["device=cpu"])
    valid = load_data("small", config.data.root).valid
    scores = all_scores(
        translate_split(model, valid, config.decoding, config.eval_batch, world), valid.references, codec
    )
    assert result(uninterrupted)["validation"] == pytest.approx(scores[result(uninterrupted)["metric"]])


def test_killed_again_and_again_it_ends_the_same(cell, uninterrupted, tmp_path):
    for at_update in (3, 21):
        killed = cell.interrupt(tmp_path / "run", at_update=at_update, number=signal.SIGKILL)
        assert killed.status == -signal.SIGKILL and not (tmp_path / "run/result.json").exists()
    assert_same_end(cell.complete(tmp_path / "run"), uninterrupted)


def test_asked_to_stop_it_saves_first(cell, uninterrupted, tmp_path):
    """Without timed checkpoints, the signal alone causes one."""
    run_dir, ours = tmp_path / "run", "checkpoint.minutes=60"
    assert cell.interrupt(run_dir, ours, at_update=6, number=signal.SIGTERM).status == 128 + signal.SIGTERM
    assert saved(run_dir)["progress"]["update"] == len(losses(run_dir)) >= 6
    assert_same_end(cell.complete(run_dir, ours), uninterrupted)


def test_the_number_of_ranks_changes_nothing(cell, tmp_path):
    """8 passes an update on 1, 2 and 4 ranks, with dropout, past the end of an epoch: 20 updates agree to rounding."""
    ours = ("batch=160", "passes=8", "updates=20", "validate_every=20", "average.every=20", "checkpoint.minutes=60")
    runs = [cell.complete(tmp_path / f"ranks_{n}", *ours, ranks=n) for n in (1, 2, 4)]
    recipes = [recipe(run_dir) for run_dir in runs]
    assert [facts["world_size"] for facts in recipes] == [1, 2, 4]
    assert all((facts["batch"], facts["passes"]) == (160, 8) for facts in recipes)
    assert recipes[0]["updates_per_epoch"] < 20  # the update of what was left of the epoch is among them
    for name in ("loss", "nll", "gradient_norm"):
        series = [[line[name] for line in metrics(run_dir, "train")] for run_dir in runs]
        assert len(series[0]) == 20
        for several in series[1:]:
            assert several == pytest.approx(series[0], rel=1e-5)
    for name in ("valid_loss", "valid_nll", "tokens"):
        values = [metrics(run_dir, "validation")[0][name] for run_dir in runs]
        assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-5)
    assert all(result(run_dir)["evaluated"] == 50 for run_dir in runs)


def test_two_ranks_stopped_and_resumed(cell, tmp_path):
    stopped, ours = tmp_path / "stopped", ("batch=256", "passes=2", "checkpoint.minutes=60", "updates=30")
    cell.interrupt(stopped, *ours, at_update=12, number=signal.SIGTERM, ranks=2)
    assert saved(stopped)["progress"]["update"] % 5 == 0 and not (stopped / "result.json").exists()
    whole = cell.complete(tmp_path / "whole", *ours, ranks=2)
    assert_same_end(cell.complete(stopped, *ours, ranks=2), whole)


def test_ranks_that_cannot_divide_the_passes_are_refused(folder):
    config = load_config(Config, folder / "cell.yaml", ["passes=8"])
    with pytest.raises(UserError, match="^passes=8 cannot be divided among 3 ranks"):
        prepare(config, World(0, 3, 0, torch.device("cpu")), record=None)


def test_the_weights_at_the_ends_of_epochs_are_averaged(cell, tmp_path):
    ours = ("average={last: 2}", "batch=2048", "validate_every=50", "checkpoint.minutes=60")
    run_dir = cell.complete(tmp_path / "by_epoch", *ours, "updates=30")
    of_epoch = recipe(run_dir)["updates_per_epoch"]
    assert of_epoch == 9  # so that the last three updates are of an epoch that is not whole
    assert result(run_dir)["averaged_updates"] == [18, 27]
    assert result(cell.complete(tmp_path / "no_epoch", *ours, "updates=3"))["averaged_updates"] == [3]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_learns_in_half_precision(cell, tmp_path, precision):
    ours = (f"precision={precision}", "updates=60", "validate_every=60", "average.every=60", "checkpoint.minutes=60")
    optimizer = "optimizer={name: adamw, lr: 3.0e-3, betas: [0.9, 0.98]}"
    run_dir = cell.complete(tmp_path / "run", *ours, optimizer, "schedule={name: constant}")
    assert losses(run_dir)[-1] < 0.85 * losses(run_dir)[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["update=3"], ["unknown key 'update'", "'updates'"]),
        (["data.name=multi30k"], ["small", "multi30k", "data.name"]),
        (["data={name: multi30k, root: nowhere}"], ["nowhere", "nmt.prepare"]),
        (["label_smoothing=1.0"], ["label_smoothing"]),
        (["optimizer.betas=[0.9, 0.999]"], ["optimizer", "betas", "'beta'"]),
        (["schedule={name: inverse_sqrt}"], ["schedule", "warmup_updates"]),
        (["batch=9"], ["does not fit batch=9"]),
        (["global_batch=512"], ["unknown key 'global_batch'", "passes x batch"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(cell, tmp_path, overrides, words):
    message = cell.refusal(tmp_path / "run", *overrides)
    assert all(word in message for word in words), message


def test_a_run_that_diverges_says_so(cell, tmp_path):
    ours = ("optimizer={name: sgd, lr: 1.0e+30}", "gradient_clip=1.0e+30")
    message = cell.refusal(tmp_path / "seen", *ours)
    assert message.startswith("error: the training loss is nan at update ") and "lower optimizer.lr" in message
    rarely = ("log_every=1000", "average.every=2", "checkpoint.minutes=60", "schedule={name: constant}")
    message = cell.refusal(tmp_path / "unseen", *ours, *rarely)
    assert message.startswith("error: the training loss is nan at update 2:")
    assert not (tmp_path / "unseen/averaging").exists()


def test_a_run_is_not_continued_with_another_vocabulary(folder, cell, tmp_path):
    """Two words of the vocabulary have changed places."""
    run_dir = tmp_path / "run"
    assert cell.interrupt(run_dir, at_update=3, number=signal.SIGTERM).status == 128 + signal.SIGTERM
    data = shutil.copytree(folder / "data", tmp_path / "data")
    codec = Codec.load(data)
    codec.pieces[-1], codec.pieces[-2] = codec.pieces[-2], codec.pieces[-1]
    other = Codec(codec.source, codec.target, codec.pieces, codec.merges)
    other.save(data)
    manifest = (data / "manifest.json").read_text()
    assert codec.digest in manifest
    (data / "manifest.json").write_text(manifest.replace(codec.digest, other.digest))
    message = cell.refusal(run_dir, f"data.root={data}")
    assert "was trained with another vocabulary" in message and "data.root" in message
