"""The whole training command on generated sentences: killed and resumed, on two ranks, and with bad input."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from nmt_cell import command, complete, make_cell, one_line_error, result, run, train_here

from engine.config import load_config
from engine.distributed import World
from engine.errors import UserError
from nmt.codec import Codec
from nmt.data import load_data, train_batches
from nmt.train import Config, prepare

# What may differ between two equal runs.
TIMES = ("tokens_per_s", "wall_s", "optimizer_ms_per_step", "peak_memory_mb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_cell(tmp_path_factory.mktemp("nmt"))


def interrupt(folder: Path, name: str, *overrides: str, at_update: int, number: signal.Signals, ranks: int = 1) -> int:
    """Send the signal once the run has logged `at_update` updates; returns the exit status."""
    process = subprocess.Popen(command(folder, name, *overrides, ranks=ranks), stderr=subprocess.DEVNULL)
    log, deadline = folder / name / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and f'"train", "update": {at_update},' in log.read_text():
            break
        time.sleep(0.005)
    process.send_signal(number)
    return process.wait(timeout=60)


def metrics(run_dir: Path, kind: str | None = None) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in lines
        if kind in (None, line["kind"])
    ]


def tensors(value, prefix="") -> dict[str, torch.Tensor]:
    """All tensors of a nested state, by their path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = {prefix: value} if isinstance(value, torch.Tensor) else {}
    for key, child in items:
        found |= tensors(child, f"{prefix}/{key}")
    return found


def saved(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the run folder: the checkpoint's, and those of the weights kept for averaging."""
    files = [run_dir / "checkpoint.pt", *sorted(run_dir.glob("averaging/*/checkpoint.pt"))]
    return tensors({str(file.relative_to(run_dir)): torch.load(file, weights_only=True) for file in files})


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, optimizer state, kept weights, metrics and translations are equal, bit for bit."""
    first, second = saved(one), saved(other)
    assert first.keys() == second.keys() and any("/optimizer/" in name for name in first)
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert metrics(one) == metrics(other)
    assert (one / "test.de.txt").read_text() == (other / "test.de.txt").read_text()
    results = [{key: value for key, value in result(path).items() if key not in TIMES} for path in (one, other)]
    assert results[0] == results[1]


@pytest.fixture(scope="module")
def uninterrupted(folder) -> Path:
    return complete(folder, "uninterrupted")


def test_a_whole_run(uninterrupted, folder):
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
    assert "nothing to do" in run(folder, "uninterrupted").stderr


def test_killed_again_and_again_it_ends_the_same(folder, uninterrupted):
    for at_update in (3, 21):
        assert interrupt(folder, "killed", at_update=at_update, number=signal.SIGKILL) == -signal.SIGKILL
        assert not (folder / "killed/result.json").exists()
    assert_same_end(complete(folder, "killed"), uninterrupted)


def test_asked_to_stop_it_saves_first(folder, uninterrupted):
    """Without timed checkpoints: what is there after the signal was saved because of it."""
    ours = "checkpoint.minutes=60"
    assert interrupt(folder, "stopped", ours, at_update=6, number=signal.SIGTERM) == 128 + signal.SIGTERM
    update = torch.load(folder / "stopped/checkpoint.pt", weights_only=True)["progress"]["update"]
    assert update == len(metrics(folder / "stopped", "train")) >= 6
    assert_same_end(complete(folder, "stopped", ours), uninterrupted)


def test_the_number_of_ranks_changes_nothing(folder):
    """8 passes an update on 1, 2 and 4 ranks, with dropout and over an epoch's end: 20 updates agree to rounding."""
    ours = ("batch=160", "passes=8", "updates=20", "validate_every=20", "average.every=20", "checkpoint.minutes=60")
    runs = [train_here(folder, "of_8", *ours), *(complete(folder, f"of_8_{n}", *ours, ranks=n) for n in (2, 4))]
    recipes = [json.loads((run_dir / "environment.json").read_text())["recipe"] for run_dir in runs]
    assert [recipe["world_size"] for recipe in recipes] == [1, 2, 4]
    assert all((recipe["batch"], recipe["passes"]) == (160, 8) for recipe in recipes)
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


def test_two_ranks_stopped_and_resumed(folder):
    ours = ("batch=256", "passes=2", "checkpoint.minutes=60", "updates=30")
    interrupt(folder, "two_stopped", *ours, at_update=12, number=signal.SIGTERM, ranks=2)
    assert not (folder / "two_stopped/result.json").exists()
    assert torch.load(folder / "two_stopped/checkpoint.pt", weights_only=True)["progress"]["update"] % 10 == 0
    assert_same_end(complete(folder, "two_stopped", *ours, ranks=2), complete(folder, "two_whole", *ours, ranks=2))


def test_ranks_that_cannot_divide_the_passes_are_refused(folder):
    config = load_config(Config, folder / "cell.yaml", ["passes=8"])
    with pytest.raises(UserError, match="^passes=8 cannot be divided among 3 ranks"):
        prepare(config, World(0, 3, 0, torch.device("cpu")), record=None)


def test_the_weights_at_the_ends_of_epochs_are_averaged(folder):
    ours = ("average={last: 2}", "batch=2048", "validate_every=50", "checkpoint.minutes=60")
    run_dir = train_here(folder, "by_epoch", *ours, "updates=30")
    of_epoch = json.loads((run_dir / "environment.json").read_text())["recipe"]["updates_per_epoch"]
    assert of_epoch == 9  # so that the last three updates are of an epoch that is not whole
    assert result(run_dir)["averaged_updates"] == [18, 27]
    assert result(train_here(folder, "no_epoch", *ours, "updates=3"))["averaged_updates"] == [3]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_it_learns_in_half_precision(folder, precision):
    ours = (f"precision={precision}", "updates=60", "validate_every=60", "average.every=60", "checkpoint.minutes=60")
    optimizer = "optimizer={name: adamw, lr: 3.0e-3, betas: [0.9, 0.98]}"
    run_dir = train_here(folder, precision, *ours, optimizer, "schedule={name: constant}")
    losses = [line["loss"] for line in metrics(run_dir, "train")]
    assert losses[-1] < 0.85 * losses[0]


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
        (["global_batch=512"], ["global_batch"]),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(folder, tmp_path, overrides, words):
    with pytest.raises(UserError) as error:
        train_here(folder, str(tmp_path / "run"), *overrides)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_run_that_diverges_says_so(folder):
    with pytest.raises(UserError, match=r"^the training loss is nan at update .* lower optimizer.lr[^\n]*$"):
        train_here(folder, "diverged", "optimizer={name: sgd, lr: 1.0e+30}", "gradient_clip=1.0e+30")
    rarely = ("log_every=1000", "average.every=2", "checkpoint.minutes=60", "schedule={name: constant}")
    with pytest.raises(UserError, match="^the training loss is nan at update 2:"):
        train_here(folder, "diverged_unseen", "optimizer={name: sgd, lr: 1.0e+30}", "gradient_clip=1.0e+30", *rarely)
    assert not (folder / "diverged_unseen/averaging").exists()


def test_a_run_is_not_continued_with_another_vocabulary(folder, tmp_path):
    """The data were prepared again, differently: as many words, but two of them have changed places."""
    assert interrupt(folder, "other_words", at_update=3, number=signal.SIGTERM) == 128 + signal.SIGTERM
    data = tmp_path / "data"
    data.mkdir()
    for file in (folder / "data").iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    codec = Codec.load(data)
    codec.pieces[-1], codec.pieces[-2] = codec.pieces[-2], codec.pieces[-1]
    other = Codec(codec.source, codec.target, codec.pieces, codec.merges)
    other.save(data)
    manifest = (data / "manifest.json").read_text()
    assert codec.digest in manifest
    (data / "manifest.json").write_text(manifest.replace(codec.digest, other.digest))
    message = one_line_error(run(folder, "other_words", f"data.root={data}"))
    assert "was trained with another vocabulary" in message and "data.root" in message
