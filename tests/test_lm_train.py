"""The language model's commands: killed and resumed, on two ranks, in other precisions and cells, with bad input."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from lm_corpus import HELD_OUT, TEST_FILES, make_corpus
from training_runs import Cell, assert_same_end, losses, metrics, recipe, result, saved

from engine.config import load_config
from engine.distributed import setup
from engine.errors import UserError
from engine.run_record import RunRecord
from language_model import evaluate as evaluate_command
from language_model import train as train_command
from language_model.prepare import build
from language_model.train import Config
from scripts.reporting.bundle import write_bundle

CONFIG = """
table: pydoc_topics
row: apollo
epochs: 2
batch: 64
data: {name: pydoc_topics}
model: {name: lstm, embedding: 16, hidden: 24, layers: 2, dropout: 0.1, cutoffs: [300, 1000]}
log_every: 1
gradient_clip: 0.3      # some updates are clipped
optimizer: {name: apollo, lr: 10.0, eps: 1.0e-4}
schedule: {name: milestone, milestones: [1], decay_rate: 0.1, warmup_updates: 50, init_lr: 0.01}
checkpoint: {minutes: 0, keep: 2}      # a checkpoint after every update: a kill often hits the middle of one
"""


@pytest.fixture(scope="module")
def cell(tmp_path_factory) -> Cell:
    path = tmp_path_factory.mktemp("config") / "cell.yaml"
    path.write_text(CONFIG)
    return Cell("language_model.train", path)


@pytest.fixture(scope="module")
def uninterrupted(cell, tmp_path_factory) -> Path:
    return cell.complete(tmp_path_factory.mktemp("uninterrupted") / "run")


def test_a_whole_run(uninterrupted):
    outcome, all_lines = result(uninterrupted), metrics(uninterrupted)
    updates = len(losses(uninterrupted))
    assert outcome["complete"] and outcome["epochs"] == 2 and outcome["metric"] == "ppl" and outcome["seed"] == 1
    assert outcome["parameters"] == sum(tensor.numel() for tensor in saved(uninterrupted)["model"].values())
    assert outcome["best"] <= outcome["final"] < 0.2 * outcome["vocabulary"]  # chance is the whole vocabulary
    assert outcome["test_files"] == ["pydoc_data/topics.py"] and outcome["evaluated"] > 5000
    clipped = [line["clipped"] for line in all_lines if line["kind"] == "train"]
    assert set(clipped) == {0.0, 1.0}  # of one update each
    epochs = [line for line in all_lines if line["kind"] == "epoch"]
    assert [line["update"] for line in epochs] == [updates // 2, updates]
    assert epochs[1]["test_ppl"] == outcome["final"] == pytest.approx(math.exp(epochs[1]["test_loss"]))
    of_epoch = losses(uninterrupted)[updates // 2 :]
    assert epochs[1]["train_loss"] == pytest.approx(sum(of_epoch) / len(of_epoch))
    assert epochs[1]["train_ppl"] == pytest.approx(math.exp(epochs[1]["train_loss"]))
    rates = [line["lr"] for line in all_lines if line["kind"] == "train"]
    assert rates[0] == 0.01 and rates[50] == 10 and rates[-1] == pytest.approx(1)
    assert saved(uninterrupted)["extra"]["state"].abs().max() > 0
    facts = recipe(uninterrupted)
    assert facts["updates_per_epoch"] == updates // 2 and len(facts["data"]["text"]["sha256"]) == 64


def test_killed_again_and_again_it_ends_the_same(cell, uninterrupted, tmp_path):
    half = len(losses(uninterrupted)) // 2
    for at_update in (half // 2, half + 20):
        killed = cell.interrupt(tmp_path / "run", at_update=at_update, number=signal.SIGKILL)
        assert killed.status == -signal.SIGKILL and not (tmp_path / "run/result.json").exists()
    ended = cell.run(tmp_path / "run")
    assert ended.status == 0 and "resuming at epoch 2" in ended.stderr, ended.stderr
    assert_same_end(uninterrupted, tmp_path / "run")


def test_asked_to_stop_it_saves_first(cell, uninterrupted, tmp_path):
    """Without timed checkpoints, the signal alone causes one."""
    run_dir = tmp_path / "run"
    stopped = cell.interrupt(run_dir, "checkpoint.minutes=60", at_update=5, number=signal.SIGTERM)
    assert stopped.status == 128 + signal.SIGTERM
    checkpoint = saved(run_dir)
    assert checkpoint["progress"]["update_in_epoch"] == len(losses(run_dir)) >= 5
    assert checkpoint["extra"]["state"].shape == (2, 2, 64, 24) and checkpoint["extra"]["state"].abs().max() > 0
    assert_same_end(uninterrupted, cell.complete(run_dir))


FOUR_PASSES = ("batch=16", "passes=4", "epochs=1", "checkpoint.minutes=60")


@pytest.fixture(scope="module")
def one_rank(cell, tmp_path_factory) -> Path:
    return cell.complete(tmp_path_factory.mktemp("one_rank") / "run", *FOUR_PASSES)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_number_of_ranks_changes_nothing(cell, one_rank, tmp_path, ranks):
    """With dropout, too: the loss curves agree to rounding, and so do the states."""
    several = cell.complete(tmp_path / "several", *FOUR_PASSES, ranks=ranks)
    assert len(losses(one_rank)) > 50
    assert losses(several) == pytest.approx(losses(one_rank), rel=1e-4)
    assert result(several)["final"] == pytest.approx(result(one_rank)["final"], rel=1e-3)
    states = [saved(run_dir)["extra"]["state"] for run_dir in (several, one_rank)]
    torch.testing.assert_close(*states, atol=1e-2, rtol=0)
    assert result(several)["evaluated"] == result(one_rank)["evaluated"]
    facts = recipe(several)
    assert (facts["world_size"], facts["batch"], facts["passes"]) == (ranks, 16, 4)


def test_held_out_sentences_are_evaluated_beside_the_test_text(cell, uninterrupted, tmp_path):
    run_dir = cell.complete(tmp_path / "run", "data.validation=0.1", "epochs=1", "checkpoint.minutes=60")
    outcome, last = result(run_dir), metrics(run_dir, "epoch")[-1]
    assert outcome["validation"] == last["valid_ppl"] != outcome["final"] == last["test_ppl"]
    assert len(losses(run_dir)) < len(losses(uninterrupted)) // 2
    assert "validation" not in result(uninterrupted)


def test_two_ranks_stopped_and_resumed_by_one(cell, one_rank, tmp_path):
    """The rows' states are saved whole, so that another number of ranks can go on with them."""
    cell.interrupt(tmp_path / "run", *FOUR_PASSES, at_update=12, number=signal.SIGTERM, ranks=2)
    at = saved(tmp_path / "run")["progress"]["update"]
    assert at % 5 == 0 and not (tmp_path / "run/result.json").exists()
    run_dir = cell.complete(tmp_path / "run", *FOUR_PASSES)
    assert len(losses(run_dir)) == len(losses(one_rank)) > at
    assert losses(run_dir) == pytest.approx(losses(one_rank), rel=1e-4)


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16"],
        ["precision=bf16", "batch=32", "passes=2"],
        ["precision=fp16", "model.name=gru", "optimizer={name: adam, lr: 0.01}"],
        ["model.name=rnn", "optimizer={name: sgd, lr: 1.0}", "gradient_clip=null"],
    ],
)
def test_other_precisions_cells_and_optimizers_learn(cell, tmp_path, overrides):
    run_dir = cell.complete(tmp_path / "run", "epochs=1", "checkpoint.minutes=60", *overrides)
    assert result(run_dir)["final"] < 0.25 * result(run_dir)["vocabulary"]
    assert saved(run_dir)["extra"]["state"].dtype == torch.float32


def test_number_of_test_rows_hardly_matters(cell, tmp_path, uninterrupted):
    """The state starts from zero once a row, which concerns few tokens."""
    settings = load_config(Config, cell.config, [f"run_dir={tmp_path}"])
    run = train_command.prepare(settings, setup("cpu"), RunRecord(settings, settings.folder, setup("cpu")))
    run.model.load_state_dict(saved(uninterrupted)["model"])
    found = {}
    for rows in (1, 32):
        run.config = settings.model_copy(update={"eval_rows": rows})
        found[rows] = train_command.evaluate(run)["test_ppl"]
    assert found[32] == pytest.approx(result(uninterrupted)["final"], rel=1e-6)
    assert found[1] != found[32] and found[1] == pytest.approx(found[32], rel=0.01)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    build(make_corpus(out / "text"), out / "corpus", tests=["all"])
    return out


def test_a_prepared_corpus_is_trained_on_and_a_file_scored(cell, prepared, tmp_path, capsys):
    data = f"data={{name: prepared, root: {prepared}/corpus}}"
    run_dir = cell.complete(tmp_path / "run", data, "epochs=1", "checkpoint.minutes=60")
    outcome = result(run_dir)
    assert outcome["test_files"] == [TEST_FILES[0]]
    capsys.readouterr()
    held_out = prepared / "text" / HELD_OUT / TEST_FILES[0]
    assert evaluate_command.main([str(run_dir), str(held_out)]) == 0
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    number = {name.strip(): float(value.replace(",", "")) for name, value in printed.items()}
    manifest = json.loads((prepared / "corpus/manifest.json").read_text())
    words = len(held_out.read_text().split())
    assert number["tokens"] == outcome["evaluated"] == words + 2 * 200
    assert (number["words"], number["sentences"]) == (words, 200)
    unknown = sum(shard["unknown"] for shard in manifest["shards"] if shard["file"] == TEST_FILES[0])
    assert number["out of vocabulary"] == unknown
    loss = math.log(outcome["final"]) * outcome["evaluated"]
    by_denominator = {"both marks": words + 400, "end mark": words + 200, "words": words}
    for (name, tokens), key in zip(by_denominator.items(), ("ppl", "ppl_with_end_mark", "ppl_per_word"), strict=True):
        assert number[f"perplexity, {name}"] == pytest.approx(math.exp(loss / tokens), abs=0.01)
        assert outcome[key] == pytest.approx(math.exp(loss / tokens), rel=1e-6)
    bundle = write_bundle(run_dir, tmp_path / "bundles")
    capsys.readouterr()
    assert evaluate_command.main([str(bundle), str(held_out)]) == 0
    assert dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()) == printed
    assert "trained with another vocabulary" in not_scored(bundle, held_out, "data={name: pydoc_topics}")


def test_all_held_out_files_are_scored_at_the_end(cell, prepared, tmp_path, capsys):
    """result.json has their scores beside the first's, the run's metric."""
    data = f"data={{name: prepared, root: {prepared}/corpus}}"
    run_dir = cell.complete(tmp_path / "run", data, "epochs=1", "eval_rows=1", "checkpoint.minutes=60")
    found = result(run_dir)
    assert (len(found["test_files"]), found["all_files"]) == (1, 2) and found["ppl"] == pytest.approx(found["final"])
    both = "".join((prepared / "text" / HELD_OUT / name).read_text(encoding="utf-8") for name in TEST_FILES)
    (tmp_path / "both").write_text(both, encoding="utf-8")
    capsys.readouterr()
    evaluate_command.main([str(run_dir), str(tmp_path / "both")])
    printed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    per_word = float(printed["perplexity, words"].replace(",", ""))
    assert found["all_tokens"] == len(both.split()) + 2 * 400
    assert found["all_ppl_per_word"] == pytest.approx(per_word, abs=0.01)


def not_scored(*arguments: object) -> str:
    with pytest.raises(UserError) as error:
        evaluate_command.main([str(argument) for argument in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["epoch=3"], ["unknown key 'epoch'", "'epochs'"]),
        (["data.name=pydoc"], ["data.name", "pydoc"]),
        (
            ["data={name: prepared, root: nowhere}"],
            ["nowhere", "no finished corpus", "scripts/prepare.sh one_billion_words SOURCE nowhere"],
        ),
        (["model.cutoffs=[300, 60000]"], ["model: cutoffs=[300, 60000]", "words"]),
        (["model.name=lstn"], ["model.name", "lstn"]),
        (["model.dropout=1.0"], ["model.dropout", "1.0"]),
        (["passes=0"], ["passes", "greater than 0"]),
        (["batch=2000"], ["batch=2000", "sequence_length=20", "40,001"]),
        (["gradient_clip=-1"], ["gradient_clip", "-1"]),
        (["precision=fp16"], ["precision=fp16", "precision=fp32"]),
        (["compile=true"], ["compile=true", "leave it out"]),
        (["optimizer={name: sgd, lr: 1.0e+30}", "gradient_clip=null"], ["loss is", "at update", "diverged"]),
    ],
)
def test_bad_input_is_refused_in_one_line(cell, tmp_path, overrides, words):
    message = cell.refusal(tmp_path / "run", *overrides)
    assert all(word in message for word in words), message


def test_a_run_is_not_continued_or_scored_with_another_vocabulary(cell, prepared, tmp_path):
    vocabulary = (prepared / "corpus/vocabulary.txt").read_text().splitlines(keepends=True)
    vocabulary[5:] = reversed(vocabulary[5:])
    other = "".join(f"{line.split()[0]} {len(vocabulary) - number}\n" for number, line in enumerate(vocabulary))
    (tmp_path / "other.txt").write_text(other)
    build(prepared / "text", tmp_path / "other", vocabulary=tmp_path / "other.txt")
    data = f"data={{name: prepared, root: {prepared}/corpus}}"
    run_dir = cell.complete(tmp_path / "run", data, "epochs=1", "checkpoint.minutes=60")
    moved = f"data={{name: prepared, root: {tmp_path}/other}}"
    message = not_scored(run_dir, prepared / "text" / HELD_OUT / TEST_FILES[0], moved)
    assert "trained with another vocabulary" in message
    (run_dir / "result.json").unlink()
    assert "trained with another vocabulary" in cell.refusal(run_dir, "epochs=1", moved)


def test_a_text_that_cannot_be_scored_is_refused(uninterrupted, tmp_path):
    for content, words in ((b"\n \n", "no sentence"), (b"caf\xe9\n", "not UTF-8"), (None, "No such file")):
        if content is not None:
            (tmp_path / "text").write_bytes(content)
        name = "text" if content is not None else "nothing"
        assert words in not_scored(uninterrupted, tmp_path / name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text((uninterrupted / "config.yaml").read_text())
    assert "neither a checkpoint nor" in not_scored(tmp_path / "run", tmp_path / "text")
