"""Optimizers with modes, and averages of weights, in all three tasks: against loops and sums written by hand, stopped
and resumed, and evaluated anew from their run folders."""

import copy
import math
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from nmt_cell import make_cell
from torch import nn
from torch.nn.functional import cross_entropy
from training_runs import Cell, assert_same_end, metrics, result, saved

from classification import evaluate, train
from classification.data import DataConfig, load_data
from classification.models import MODELS, create_model
from engine.config import ConfigError, load_config
from engine.errors import UserError
from engine.evaluated import has_modes
from engine.seed import seed_step
from engine.weights import read_bundled
from nmt import evaluate as evaluate_translation
from scripts.report import main as report
from scripts.reporting.bundle import write_bundle

schedulefree = pytest.importorskip("schedulefree")

IMAGES = """
table: mine
row: sf
epochs: 2
batch: 64
data: {name: digits}
model: {name: resnet, depth: 8}
log_every: 1
bn_update_batches: 5
optimizer: {name: schedulefree.AdamWScheduleFree, lr: 2.0e-3, warmup_steps: 5, weight_decay: 1.0e-3}
checkpoint: {minutes: 60}
"""
TEXT = """
table: mine
row: sf
epochs: 1
batch: 64
data: {name: pydoc_topics}
model: {name: lstm, embedding: 16, hidden: 24, layers: 1, dropout: 0.1, cutoffs: [300, 1000]}
log_every: 1
optimizer: {name: schedulefree.AdamWScheduleFree, lr: 3.0e-3}
checkpoint: {minutes: 60}
"""
UPDATES = 1442 // 64  # of an epoch of IMAGES
TRANSLATION = ("optimizer={name: schedulefree.AdamWScheduleFree, lr: 3.0e-3}", "schedule={name: constant}")
SGD = "optimizer={name: sgd, lr: 0.02, momentum: 0.9}"


class InTrainMode(schedulefree.AdamWScheduleFree):
    """As a version would be that begins in train mode."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.train()


def plain_network(num_classes: int) -> nn.Module:
    """A network without BatchNorm."""
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * 7 * 7, num_classes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("evaluated")


@pytest.fixture(scope="module")
def images(folder) -> Cell:
    (folder / "images.yaml").write_text(IMAGES)
    return Cell("classification.train", folder / "images.yaml")


@pytest.fixture(scope="module")
def text(folder) -> Cell:
    (folder / "text.yaml").write_text(TEXT)
    return Cell("language_model.train", folder / "text.yaml")


@pytest.fixture(scope="module")
def translation(folder) -> Cell:
    make_cell(folder)
    return Cell("nmt.train", folder / "cell.yaml")


@pytest.fixture(scope="module")
def trained(images, folder) -> Path:
    return images.complete(folder / "trained")


@pytest.fixture(scope="module")
def kept_each(images, folder) -> Path:
    """A run of one epoch that has kept its weights after every update, and averages them."""
    return images.complete(folder / "kept_each", "epochs=1", "average={every: 1, last: 30}")


def stopped_and_resumed(cell: Cell, run_dir: Path, *overrides: str, at_update: int) -> Path:
    stopped = cell.interrupt(run_dir, *overrides, at_update=at_update, number=signal.SIGTERM)
    assert stopped.status == 128 + signal.SIGTERM and not (run_dir / "result.json").exists()
    return cell.complete(run_dir, *overrides)


def by_hand(network: nn.Module, settings: dict, passes: int, epochs: int) -> tuple[list[dict], ...]:
    """Schedule-free training as the package's README and its example for CIFAR-10 have it.

    Returns, after each epoch: the scores, the weights of eval mode, and those of train mode. BatchNorm's statistics
    are taken anew for the evaluation, and are those of training again after it.
    """
    data = load_data(DataConfig(name="digits"), "cpu", seed=1)
    optimizer = schedulefree.AdamWScheduleFree(network.parameters(), **settings)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    scores, of_eval, of_train = [], [], []
    for epoch in range(epochs):
        network.train()
        optimizer.train()
        for ((_, (pixels, labels)),) in data.train_batches(epoch, 64):
            optimizer.zero_grad()
            cross_entropy(network(pixels), labels).backward()
            optimizer.step()

        in_training = [copy.deepcopy(norm.state_dict()) for norm in norms]
        optimizer.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
        with torch.no_grad():
            for ((_, (pixels, _)),) in islice(data.train_batches(epoch, 64), passes):
                network(pixels)
        network.eval()
        with torch.no_grad():
            ((pixels, labels),) = data.test_batches(1000)
            logits = network(pixels)
        right = (logits.argmax(1) == labels).double().mean().item()
        scores.append({"test_loss": cross_entropy(logits, labels).item(), "test_top1": 100 * right})
        of_eval.append(copy.deepcopy(network.state_dict()))
        optimizer.train()
        for norm, state in zip(norms, in_training, strict=True):
            norm.momentum = 0.1
            for name, buffer in norm.named_buffers():
                buffer.copy_(state[name])
        of_train.append(copy.deepcopy(network.state_dict()))
    return scores, of_eval, of_train


@pytest.mark.parametrize("model", ["resnet", "plain"])
def test_it_equals_a_loop_written_by_hand(images, trained, tmp_path, monkeypatch, model):
    monkeypatch.setitem(MODELS, "plain", plain_network)
    seed_step(1, "initialisation")
    network = create_model(model, 10, depth=8 if model == "resnet" else None)
    network.to(memory_format=torch.channels_last)
    settings = load_config(train.Config, images.config).optimizer.settings
    scores, of_eval, of_train = by_hand(network, settings, passes=5, epochs=2)

    run_dir = trained
    if model == "plain":
        run_dir = tmp_path / "run"
        assert train.main([str(images.config), f"run_dir={run_dir}", "model={name: plain}", "device=cpu"]) == 0
    lines = metrics(run_dir, "epoch")
    assert len(lines) == 2
    for line, expected, tolerance in zip(lines, scores, (1e-5, 1e-3), strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=tolerance)
    assert result(run_dir)["final"] == lines[-1]["test_top1"] > 50 and "final_unaveraged" not in result(run_dir)

    # The way to eval mode and back rounds the weights of the loop by hand, and a second epoch of 22 steps multiplies
    # what was rounded. It stays far below the distance between the two modes.
    before = torch.load(run_dir / "checkpoint.1.pt", weights_only=True)["model"]
    changing = [name for name in before if not name.endswith("num_batches_tracked")]
    apart = max((of_eval[1][name] - of_train[1][name]).abs().max().item() for name in changing)
    for found, expected, tolerance in (
        (before, of_train[0], 1e-5),
        (saved(run_dir)["model"], of_train[1], 0.1 * apart),
        (read_bundled(run_dir).state, of_eval[1], 0.1 * apart),
    ):
        assert found.keys() == expected.keys()
        for name in changing:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=tolerance, msg=name)
    assert saved(run_dir)["optimizer"]["param_groups"][0]["train_mode"]


def test_an_optimizer_that_begins_in_train_mode(images, trained, tmp_path):
    name, settings = f"{__name__}.InTrainMode", "lr: 2.0e-3, warmup_steps: 5, weight_decay: 1.0e-3"
    arguments = [f"run_dir={tmp_path / 'run'}", f"optimizer={{name: {name}, {settings}}}", "device=cpu"]
    assert train.main([str(images.config), *arguments]) == 0
    assert metrics(tmp_path / "run", "epoch")[-1]["test_loss"] == pytest.approx(
        metrics(trained, "epoch")[-1]["test_loss"], rel=1e-3
    )  # in this process torch has more threads than in the other


def test_an_optimizer_without_both_methods_has_no_modes():
    class Half(torch.optim.SGD):
        def eval(self):
            raise AssertionError

    weights = [torch.zeros(1)]
    assert not has_modes(torch.optim.SGD(weights)) and not has_modes(Half(weights))
    assert has_modes(schedulefree.SGDScheduleFree(weights))


def test_stopped_and_resumed_with_batch_norm(images, trained, tmp_path):
    run_dir = tmp_path / "run"
    stopped = images.interrupt(run_dir, at_update=3, number=signal.SIGTERM)
    assert stopped.status == 128 + signal.SIGTERM
    if not metrics(run_dir, "epoch"):
        with pytest.raises(UserError, match="holds the weights of the optimizer's train mode"):
            evaluate.main([str(run_dir)])
    assert_same_end(images.complete(run_dir), trained)
    assert_same_weights(run_dir, trained)


def assert_same_weights(one: Path, other: Path) -> None:
    """Assert that what two runs have written for evaluation is equal, bit for bit."""
    first, second = read_bundled(one), read_bundled(other)
    assert first.state.keys() == second.state.keys() and first[1:] == second[1:]
    assert all(torch.equal(tensor, second.state[name]) for name, tensor in first.state.items())


def test_killed_and_resumed(images, trained, tmp_path):
    run_dir, ours = tmp_path / "run", "checkpoint.minutes=0"
    for at_update in (4, UPDATES + 4):
        killed = images.interrupt(run_dir, ours, at_update=at_update, number=signal.SIGKILL)
        assert killed.status == -signal.SIGKILL
    assert_same_end(images.complete(run_dir, ours), trained)


def test_the_ranks_evaluate_the_same_weights(images, tmp_path):
    """Two passes on two ranks and on one: the average, its own statistics, and their scores agree to rounding."""
    ours = ("epochs=1", "batch=32", "passes=2", "average={decay: 0.9}", "optimizer.lr=2.0e-4")
    one, two = (images.complete(tmp_path / f"ranks_{n}", *ours, ranks=n) for n in (1, 2))
    for name in ("test_loss", "test_loss_average"):
        assert metrics(one, "epoch")[0][name] == pytest.approx(metrics(two, "epoch")[0][name], rel=1e-3)
    other = read_bundled(two).state
    for name, tensor in read_bundled(one).state.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_the_averages_equal_their_formulas(images, kept_each, tmp_path):
    """Of weights of eval mode: kept after each update by one run, from which both averages are computed literally."""
    kept = [
        torch.load(path, weights_only=True)["model"] for path in sorted(kept_each.glob("averaging/*/checkpoint.pt"))
    ]
    assert len(kept) == UPDATES
    ours = ("epochs=1", "average={decay: 0.9}")
    exponential = saved(images.complete(tmp_path / "run", *ours))
    mean = read_bundled(kept_each)
    assert exponential["average"]["n_averaged"] == UPDATES and mean.averaged == tuple(range(1, UPDATES + 1))
    names = [name for name in kept[0] if name.rpartition(".")[2] in ("weight", "bias")]
    for name in names:
        average = kept[0][name].double()
        for weights in kept[1:]:
            average = 0.9 * average + 0.1 * weights[name].double()
        torch.testing.assert_close(exponential["average"][f"module.{name}"], average.float(), msg=name)
        total = sum(weights[name].double() for weights in kept)
        torch.testing.assert_close(mean.state[name], (total / UPDATES).float(), msg=name)
    assert any(not torch.equal(exponential["model"][name], kept[-1][name]) for name in names)  # train mode, eval mode


@pytest.mark.parametrize("average", ["average={decay: 0.9}", "average={every: 5, last: 3}"])
def test_averages_of_images_resumed_and_scored(images, tmp_path, average, capsys):
    ours = (SGD, average, "data.validation=0.1", "row=averaged")
    whole = images.complete(tmp_path / "mine/whole", *ours)
    resumed = stopped_and_resumed(images, tmp_path / "resumed", *ours, at_update=UPDATES // 2)
    assert_same_end(resumed, whole)
    assert_same_weights(resumed, whole)

    outcome = result(whole)
    last = metrics(whole, "epoch")[-1] | (metrics(whole, "final") or [{}])[-1]
    assert outcome["final"] == last["test_top1_average"] and outcome["final_unaveraged"] == last["test_top1"]
    assert outcome["validation"] == last["valid_top1_average"]
    assert outcome["validation_unaveraged"] == last["valid_top1"]
    assert last["test_loss_average"] != last["test_loss"]
    for source in (whole, write_bundle(whole, tmp_path / "bundles")):
        capsys.readouterr()
        evaluate.main([str(source)])
        assert f"{last['test_loss_average']:.4f}" in capsys.readouterr().out
    report([str(tmp_path / "mine")])
    header, line = (text.split() for text in capsys.readouterr().out.splitlines()[1:3])
    assert header[:5] == ["row", "schedule", "final", "unaveraged", "best"]
    assert line[2:4] == [f"{outcome['final']:.2f}", f"{outcome['final_unaveraged']:.2f}"]


def test_an_average_without_modes_leaves_the_training_alone(images, tmp_path):
    with_it, without = (
        images.complete(tmp_path / name, SGD, "epochs=1", *average)
        for name, average in (("with", ["average={decay: 0.99}"]), ("without", []))
    )
    first, second = saved(with_it)["model"], saved(without)["model"]
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert not (without / "weights.safetensors").exists()


def test_text_with_modes_and_an_average(text, tmp_path):
    ours = "average={decay: 0.95}"
    whole = text.complete(tmp_path / "whole", ours)
    resumed = stopped_and_resumed(text, tmp_path / "resumed", ours, at_update=5)
    assert_same_end(resumed, whole)
    assert_same_weights(resumed, whole)
    last = metrics(whole, "epoch")[-1]
    assert last["test_ppl_average"] == result(whole)["final"] == pytest.approx(math.exp(last["test_loss_average"]))
    assert result(whole)["ppl"] == pytest.approx(result(whole)["final"])
    assert result(whole)["final_unaveraged"] == last["test_ppl"] != last["test_ppl_average"]


@pytest.mark.parametrize("average", ["average={every: 4, last: 3}", "average={decay: 0.9}"])
def test_translation_with_modes_and_its_averages(translation, tmp_path, average, capsys):
    ours = (*TRANSLATION, average, "updates=60", "validate_every=30", "checkpoint.minutes=60")
    whole = translation.complete(tmp_path / "whole", *ours)
    resumed = stopped_and_resumed(translation, tmp_path / "resumed", *ours, at_update=13)
    assert_same_end(resumed, whole)
    outcome, last = result(whole), metrics(whole, "final")[-1]
    assert outcome["final"] == outcome["fairseq_bleu"] == last["test_fairseq_bleu_average"]
    assert outcome["final_unaveraged"] == last["test_fairseq_bleu"]
    assert outcome.get("averaged_updates") == ([52, 56, 60] if "every" in average else None)
    assert ("valid_bleu_average" in metrics(whole, "validation")[0]) == ("decay" in average)
    for source in (whole, write_bundle(whole, tmp_path / "bundles")):
        capsys.readouterr()
        evaluate_translation.main([str(source), "device=cpu"])
        assert f"fairseq's BLEU       {outcome['final']:6.2f}" in capsys.readouterr().out


def test_evaluations_leave_no_trace_in_the_training(translation, tmp_path):
    ours = (*TRANSLATION, "updates=20", "checkpoint.minutes=60")
    often, once = (translation.complete(tmp_path / f"{n}", *ours, f"validate_every={n}") for n in (4, 20))
    first, second = saved(often), saved(once)
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in second["model"])
    assert [line["loss"] for line in metrics(often, "train")] == [line["loss"] for line in metrics(once, "train")]


@pytest.mark.parametrize("setting", ["average={decay: 1.0}", "average={decay: 0.9, every: 3}", "average.decy=0.5"])
def test_averages_that_cannot_be(images, setting):
    with pytest.raises(ConfigError, match=r"^command line: .*(less than 1|keeps no weights|nearest|'decay')"):
        load_config(train.Config, images.config, [setting])
