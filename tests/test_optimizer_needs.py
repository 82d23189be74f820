"""Optimizers whose step needs a closure, or gradients with a graph: through the training commands, in this process."""

import json
import math
import signal
from collections import deque
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from nmt_cell import make_cell
from training_runs import Cell, assert_same_end, losses, result

from engine.config import load_config
from engine.distributed import setup
from engine.errors import UserError

ROOT = Path(__file__).parent.parent
DIGITS = """
table: digits
row: others
epochs: 1
batch: 72
data: {name: digits}
model: {name: resnet, depth: 8}
optimizer: {name: sgd, lr: 0.1}
log_every: 1
device: cpu
"""
TOPICS = """
table: pydoc_topics
row: others
epochs: 1
batch: 64
sequence_length: 200
data: {name: pydoc_topics}
model: {name: lstm, embedding: 16, hidden: 24, layers: 2, dropout: 0.3, cutoffs: [300, 1000]}
optimizer: {name: sgd, lr: 1.0}
gradient_clip: 0.3
log_every: 1
device: cpu
"""
SAM = "name: pytorch_optimizer.SAM, base_optimizer: sgd, lr: 0.1"
ADAHESSIAN = "name: pytorch_optimizer.AdaHessian, lr: 0.15, weight_decay: 1.0e-3, eps: 1.0e-2"
NEEDING = "optimizer={name: sgd, lr: 0.1, needs: %s}"


class Repeating(torch.optim.SGD):
    """Asks for the gradients again where they were taken: they are the same. Then, elsewhere: they are others."""

    repeated = 0

    @torch.no_grad()
    def step(self, closure):
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad.clone() for parameter in parameters]
        with torch.enable_grad():
            first = closure()
        assert all(torch.equal(old, p.grad) for old, p in zip(gradients, parameters, strict=True))
        super().step()
        with torch.enable_grad():
            assert closure() != first
        type(self).repeated += 1


class Remembering(torch.optim.SGD):
    """Keeps in its state what weights_only=True does not read."""

    def step(self):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["seen"] = deque([1, 2])


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("needs")
    (folder / "digits.yaml").write_text(DIGITS)
    (folder / "topics.yaml").write_text(TOPICS)
    make_cell(folder)
    return {
        "classification": folder / "digits.yaml",
        "language_model": folder / "topics.yaml",
        "nmt": folder / "cell.yaml",
    }


def train(config: Path, run_dir: Path, *overrides: str, task: str = "classification") -> Path:
    command = import_module(f"{task}.train")
    loaded = load_config(command.Config, config, [f"run_dir={run_dir}", "device=cpu", *overrides])
    assert command.train(loaded, setup("cpu")) == 0
    return run_dir


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("classification", ["batch=240", "passes=2"]),
        ("language_model", ["batch=32", "passes=2"]),
        ("nmt", ["updates=3", "schedule={name: constant}", "checkpoint.minutes=60"]),
    ],
)
def test_a_closure_takes_the_very_same_update(configs, task, overrides, tmp_path):
    """Its augmentation, dropout, carried state and clipping; it asserts this itself. What is recorded does not change.

    The first losses are those of a run without a closure; BatchNorm's running statistics are those of the first passes.
    """
    before = Repeating.repeated
    ours = train(
        configs[task], tmp_path / "ours", *overrides, f"optimizer={{name: {__name__}.Repeating, lr: 0.1}}", task=task
    )
    plain = train(configs[task], tmp_path / "plain", *overrides, "optimizer={name: sgd, lr: 0.1}", task=task)
    assert Repeating.repeated == before + len(losses(ours)) > before + 1
    assert losses(ours) == losses(plain)
    states = [torch.load(run_dir / "checkpoint.pt", weights_only=True) for run_dir in (ours, plain)]
    assert all(torch.equal(value, states[1]["model"][name]) for name, value in states[0]["model"].items())
    assert result(ours)["final"] == result(plain)["final"]


def test_sharpness_aware_minimization(configs, tmp_path):
    """Its first loss is that of its base, and the others are not."""
    pytest.importorskip("pytorch_optimizer")
    cell = Cell("classification.train", configs["classification"])
    ours = f"optimizer={{{SAM}, rho: 0.5, needs: closure}}", "batch=360"
    plain = train(configs["classification"], tmp_path / "plain", "batch=360")
    sam = cell.complete(tmp_path / "sam", *ours)
    assert losses(sam)[0] == losses(plain)[0] and losses(sam)[1] != losses(plain)[1]


def test_two_ranks_take_the_closures_of_one(configs, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    cell = Cell("classification.train", configs["classification"])
    ours = f"optimizer={{{SAM}, needs: closure}}", "batch=144", "passes=2", "model.depth=8"
    one, two = (cell.complete(tmp_path / str(ranks), *ours, ranks=ranks) for ranks in (1, 2))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)


def test_lbfgs_trains_digits(configs, tmp_path):
    """torch's class cannot do without a closure, so `needs` is not asked for. Stopped and resumed, it ends alike."""
    cell = Cell("classification.train", configs["classification"])
    ours = (
        "optimizer={name: torch.optim.LBFGS, lr: 0.5, max_iter: 3, history_size: 5}",
        "data.validation=0.8",
        "batch=72",
        "channels_last=false",
    )
    whole = cell.complete(tmp_path / "whole", *ours)
    assert len(losses(whole)) == 4 and min(losses(whole)[1:]) < losses(whole)[0] < math.inf
    cell.interrupt(tmp_path / "stopped", *ours, at_update=1, number=signal.SIGTERM)
    assert_same_end(cell.complete(tmp_path / "stopped", *ours), whole)


def test_adahessian_trains_digits(configs, tmp_path):
    """With the settings of the CIFAR-10 row."""
    pytest.importorskip("pytorch_optimizer")
    row = yaml.safe_load((ROOT / "configs/cifar10/adahessian_milestone.yaml").read_text())
    run_dir = train(configs["classification"], tmp_path / "run", f"optimizer={json.dumps(row['optimizer'])}")
    assert result(run_dir)["final"] > 15 and losses(run_dir)[-1] < losses(run_dir)[0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([NEEDING % "clossure"], "optimizer.needs"),
        ([NEEDING % "closure", "precision=fp16"], "sgd needs closure, which does not go together with precision=fp16"),
        ([NEEDING % "create_graph", "precision=fp16"], "does not go together with precision=fp16"),
        ([NEEDING % "create_graph", "compile=true"], "does not go together with compile=true"),
        (["optimizer={name: torch.optim.LBFGS}", "precision=fp16"], "LBFGS needs closure, which does not go together"),
        (
            ["optimizer={name: sgd, lr: 0.1, needs: closure, groups: [{match: 1, name: adam, lr: 0.1}]}"],
            "sgd needs closure, which does not go together with an optimizer of another name in optimizer.groups",
        ),
        ([f"optimizer={{{SAM}}}"], "SAM failed in update 1: NoClosureError"),
        ([f"optimizer={{{SAM}}}"], "set optimizer.needs=closure"),
        ([f"optimizer={{{ADAHESSIAN}}}"], "set optimizer.needs=create_graph"),
        (["optimizer={name: torch.optim.LBFGS}", "batch=480"], "set channels_last=false"),
        (["optimizer={name: pytorch_optimizer.Lookahead}"], "is made from the optimizer, not from parameters"),
        ([f"optimizer={{name: {__name__}.Remembering, lr: 0.1}}"], "give back that its state.state.0.seen is a deque"),
        (["optimizer={name: torch.nn.ParameterList}"], "is not a class or function that makes an optimizer"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_leaves_no_folder(configs, overrides, words, tmp_path):
    if "pytorch_optimizer" in overrides[0]:
        pytest.importorskip("pytorch_optimizer")
    with pytest.raises(UserError) as refused:
        train(configs["classification"], tmp_path / "runs/here", *overrides)
    assert words in str(refused.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("task", ["language_model", "nmt"])
def test_a_model_without_second_derivatives_is_refused(configs, task, tmp_path):
    with pytest.raises(UserError, match="this task's models, whose own loss has no second derivative"):
        train(configs[task], tmp_path / "run", NEEDING % "create_graph", task=task)


def test_ranks_cannot_average_gradients_with_a_graph(configs, tmp_path):
    cell = Cell("classification.train", configs["classification"])
    ended = cell.run(tmp_path / "run", NEEDING % "create_graph", "batch=36", "passes=2", ranks=2)
    assert ended.status == 2 and "2 ranks, whose averaging of gradients cannot be differentiated" in ended.stderr
