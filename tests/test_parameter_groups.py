"""Groups of parameters by name: several optimizers behind one, alone and through the three training commands."""

import copy
import json
import signal
from pathlib import Path

import pytest
import torch
from meta_models import needs_muon
from nmt_cell import make_cell
from torch import nn
from training_runs import Cell, assert_same_end, recipe, saved

from engine.config import OptimizerConfig, RunConfig, dump_config, load_config
from engine.errors import UserError
from engine.parameter_groups import create_grouped_optimizer, describe_groups, divide_parameters
from engine.precision import Precision
from optim.lr_scheduler import create_schedule

pytestmark = needs_muon
MUON = "{name: torch.optim.Muon, lr: 0.02, weight_decay: 0.1, match: %s}"
DIGITS = """
table: digits
row: muon
epochs: 1
batch: 72
passes: 2
data: {name: digits}
model: {name: resnet, depth: 8}
optimizer: {name: adamw, lr: 1.0e-3, groups: [{match: 1, weight_decay: 0}, %s]}
schedule: {name: cosine, warmup_updates: 4}
log_every: 1
checkpoint: {minutes: 60}
"""
TOPICS = """
table: pydoc_topics
row: muon
epochs: 1
batch: 64
passes: 2
data: {name: pydoc_topics}
model: {name: lstm, embedding: 16, hidden: 24, layers: 2, dropout: 0.1, cutoffs: [300, 1000]}
optimizer: {name: apollo, lr: 1.0, groups: [{match: '^rnn.*(?=bias)', lr: 0.5}, %s]}
log_every: 1
checkpoint: {minutes: 60}
"""
GRAMMAR = (
    "optimizer={name: adamw, lr: 1.0e-3, groups: [{match: embedding, lr: 2.0e-3}, %s, {match: 1, weight_decay: 0}]}"
)


def optimizer_config(**keys) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": "adamw", "lr": 0.01, **keys})


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"embedding": nn.Embedding(7, 4), "hidden": nn.Linear(4, 5), "norm": nn.LayerNorm(5)})


def give_gradients(*models: nn.Module) -> None:
    torch.manual_seed(1)
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        gradient = torch.randn_like(parameters[0])
        for parameter in parameters:
            parameter.grad = gradient.clone()


def test_the_first_group_that_matches_a_parameter_has_it(model):
    groups = optimizer_config(groups=[{"match": "norm"}, {"match": 1}, {"match": "e"}]).groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [[names[parameter] for parameter in part] for part in divide_parameters(model, groups)]
    assert found == [[], ["norm.weight", "norm.bias"], ["hidden.bias"], ["embedding.weight", "hidden.weight"]]


def test_it_steps_as_the_optimizers_by_themselves(model):
    twin = copy.deepcopy(model)
    config = optimizer_config(
        weight_decay=0.1,
        groups=[
            {"match": "hidden.weight", "name": "torch.optim.Muon", "lr": 0.02},
            {"match": 1, "weight_decay": 0, "lr": 0.001},
        ],
    )
    optimizer = create_grouped_optimizer(model, config, "cpu")
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.001, 0.02]
    small = [parameter for parameter in twin.parameters() if parameter.dim() == 1]
    alone = [
        torch.optim.AdamW([twin["embedding"].weight], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(small, lr=0.001, weight_decay=0),
        torch.optim.Muon([twin["hidden"].weight], lr=0.02),
    ]
    for _ in range(3):
        give_gradients(model, twin)
        for one in (optimizer, *alone):
            one.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [line["parameters"] for line in describe_groups(model, config)] == [28, 20, 15]


def test_a_schedule_scales_each_groups_own_rate(model):
    muon = {"match": "hidden.weight", "name": "torch.optim.Muon", "lr": 0.1}
    optimizer = create_grouped_optimizer(model, optimizer_config(groups=[muon]), "cpu")
    schedule = create_schedule(optimizer, "cosine", total=4, warmup_updates=2, init_lr=0.002, last_lr=0.001)
    for expected in (0.002, 0.006, None, None, 0.001):
        first, other = (group["lr"] for group in optimizer.param_groups)
        assert other == pytest.approx(10 * first) and (expected is None or first == pytest.approx(expected))
        optimizer.step()
        schedule.step()


def test_loaded_it_goes_on_alike(model):
    """The schedule still reaches the groups, which loading replaces."""
    config = optimizer_config(groups=[{"match": "hidden.weight", "name": "torch.optim.Muon", "lr": 0.1}])
    optimizer = create_grouped_optimizer(model, config, "cpu")
    give_gradients(model)
    optimizer.step()
    twin = copy.deepcopy(model)
    loaded = create_grouped_optimizer(twin, config, "cpu")
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, loaded):
        for group in one.param_groups:
            group["lr"] *= 0.5
    give_gradients(model, twin)
    optimizer.step()
    loaded.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(ValueError):
        loaded.load_state_dict({"optimizers": optimizer.state_dict()["optimizers"][:1]})


def test_the_scaler_unscales_and_skips_all_of_them(model):
    config = optimizer_config(groups=[{"match": "hidden.weight", "name": "sgd", "lr": 1.0}], name="sgd", lr=1.0)
    optimizer, precision = create_grouped_optimizer(model, config, "cpu"), Precision("fp16", torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    precision.backward(sum(parameter.sum() for parameter in model.parameters()))
    precision.clip(optimizer, model.parameters(), 1e9)
    assert precision.step(optimizer)
    after = [parameter.detach().clone() for parameter in model.parameters()]
    assert all(torch.allclose(old - 1, new) for old, new in zip(before, after, strict=True))
    optimizer.zero_grad()
    precision.backward(float("inf") * model["norm"].bias.sum() + model["hidden"].weight.sum())
    assert not precision.step(optimizer)
    assert all(torch.equal(old, new) for old, new in zip(after, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (
            [{"match": "hiden.weight"}],
            "'hiden.weight' has nothing to train: it matches no parameter (did you mean 'hid",
        ),
        ([{"match": 3}], "3 has nothing to train"),
        ([{"match": "hidden"}, {"match": "hidden.bias"}], "a group before it has all that it matches"),
        ([{"match": "hidden", "weigth_decay": 0}], "no setting 'weigth_decay'; did you mean 'weight_decay'?"),
        ([{"match": "hidden", "lr": -1.0}], "optimizer.groups: 'hidden': optimizer 'adamw': Invalid learning rate"),
        ([{"match": 1, "name": "torch.optim.Muon"}], "Muon only supports 2D parameters"),
        ([{"match": "", "name": "sgd", "lr": 1.0}], "the groups leave no parameter for adamw"),
    ],
)
def test_groups_that_cannot_be_are_refused(model, groups, words):
    with pytest.raises(UserError) as refused:
        create_grouped_optimizer(model, optimizer_config(groups=groups), "cpu")
    assert words in str(refused.value)


def test_what_the_config_says_of_them(tmp_path):
    (tmp_path / "c.yaml").write_text("{table: t, row: r, batch: 8, optimizer: {name: sgd, lr: 0.1}}")
    plain = load_config(RunConfig, tmp_path / "c.yaml")
    assert plain.model_dump()["optimizer"] == {"name": "sgd", "lr": 0.1}
    grouped = load_config(RunConfig, tmp_path / "c.yaml", ["optimizer.groups=[{match: 1, lr: 0.2}]"])
    (tmp_path / "again.yaml").write_text(dump_config(grouped))
    assert load_config(RunConfig, tmp_path / "again.yaml") == grouped
    for wrong in ("[{lr: 1}]", "[{match: '('}]", "[{match: -1}]", "[{match: 1, lr: .nan}]", "[1]"):
        with pytest.raises(UserError, match="^command line: .*optimizer.groups"):
            load_config(RunConfig, tmp_path / "c.yaml", [f"optimizer.groups={wrong}"])


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, tuple[Cell, tuple[str, ...]]]:
    """For each model a command with Muon for some matrices, and its overrides."""
    folder = tmp_path_factory.mktemp("cells")
    (folder / "resnet.yaml").write_text(DIGITS % (MUON % "fc"))
    (folder / "lstm.yaml").write_text(TOPICS % (MUON % "'rnn.*weight_[hi]h'"))
    make_cell(folder)
    small = ("batch=256", "passes=2", "checkpoint.minutes=60", "updates=20", GRAMMAR % (MUON % 2))
    return {
        "resnet": (Cell("classification.train", folder / "resnet.yaml"), ()),
        "lstm": (Cell("language_model.train", folder / "lstm.yaml"), ()),
        "transformer": (Cell("nmt.train", folder / "cell.yaml"), small),
    }


@pytest.mark.parametrize("name", ["resnet", "lstm", "transformer"])
def test_stopped_and_resumed_it_ends_the_same(cells, name, tmp_path):
    """And the state of a run that two ranks began, and one ended, is that of the same tensors."""
    cell, ours = cells[name]
    whole = cell.complete(tmp_path / "whole", *ours)
    assert cell.interrupt(tmp_path / "stopped", *ours, at_update=4, number=signal.SIGTERM).status == 143
    assert_same_end(cell.complete(tmp_path / "stopped", *ours), whole)
    assert sum(group["parameters"] for group in recipe(whole)["groups"]) == parameter_count(saved(whole))

    moved = tmp_path / "moved"
    cell.interrupt(moved, *ours, at_update=3, number=signal.SIGTERM, ranks=2)
    at_two = saved(moved)["optimizer"]
    cell.complete(moved, *ours)
    shapes = [shapes_of(one) for one in (at_two, saved(moved)["optimizer"], saved(whole)["optimizer"])]
    assert shapes[0] == shapes[1] == shapes[2]
    close = directions(moved, whole)
    assert min(close) > 0.9, close


def test_the_share_of_clamped_entries_is_logged_where_apollo_is_one_of_several(cells, tmp_path):
    apollo = f"optimizer={{name: apollo, lr: 0.1, groups: [{MUON % 2}]}}"
    run = cells["resnet"][0].complete(tmp_path / "run", apollo, "data.validation=0.8")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["clamped"] for line in lines if line["kind"] == "train"]
    assert shares and all(0 < share <= 1 for share in shares)


def parameter_count(checkpoint: dict) -> int:
    state = checkpoint["model"]
    return sum(tensor.numel() for name, tensor in state.items() if "running_" not in name and "num_batches" not in name)


def shapes_of(state: dict) -> list:
    return [
        {number: {key: tuple(value.shape) for key, value in held.items() if isinstance(value, torch.Tensor)}
         for number, held in one["state"].items()}
        for one in state["optimizers"]
    ]  # fmt: skip


def directions(run_dir: Path, other: Path) -> list[float]:
    """The cosines between the averages of gradients, or of their squares, that two runs hold of each tensor.

    Left out are those of rounding errors alone: an attention's bias of keys has no gradient.
    """
    cosines = []
    for mine, theirs in zip(*(saved(folder)["optimizer"]["optimizers"] for folder in (run_dir, other)), strict=True):
        for number, held in mine["state"].items():
            for key in held.keys() & {"exp_avg_sq", "momentum_buffer"}:
                pair = held[key].flatten().double(), theirs["state"][number][key].flatten().double()
                if pair[1].norm() > 1e-12:
                    cosines.append(float(torch.cosine_similarity(*pair, dim=0, eps=0)))
    return cosines
