"""Every config loads strictly and trains; every cell of a published table has the published settings."""

from pathlib import Path

import pytest
import torch
import yaml

from optim import create_optimizer
from optim.lr_scheduler import create_schedule
from scripts.jobs import plan
from scripts.tables import TASKS, load_cell, published

ROOT = Path(__file__).parent.parent
CELLS = sorted(
    path.relative_to(ROOT) for path in ROOT.glob("configs/*/*.yaml") if path.stem not in ("base", "published")
)
CIFAR10 = yaml.safe_load((ROOT / "tests/published_settings.yaml").read_text())["cifar10"]
CIFAR10_CELLS = [(row, schedule) for row in CIFAR10["rows"] for schedule in CIFAR10["schedules"]]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_no_cell_is_missing_or_unknown():
    expected = {f"configs/cifar10/{row}_{schedule}.yaml" for row, schedule in CIFAR10_CELLS}
    assert {str(path) for path in CELLS if path.parent.name == "cifar10"} == expected


@pytest.mark.parametrize("path", CELLS, ids=str)
def test_config_loads_and_its_optimizer_and_schedule_accept_their_settings(path):
    config = load_cell(path.parent.name, path)
    assert config.table == path.parent.name
    assert path.stem in (config.row, f"{config.row}_{config.schedule.name}")
    optimizer = create_optimizer(
        config.optimizer.name, [torch.nn.Parameter(torch.ones(2))], **config.optimizer.settings
    )
    length = plan(path.parent.name, path, 1, Path("runs")).length
    create_schedule(optimizer, config.schedule.name, updates_per_unit=390, total=length, **config.schedule.settings)


@pytest.mark.parametrize("path", CELLS, ids=str)
def test_header_names_the_command_of_this_file(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"python -m {TASKS[path.parent.name]}.train {path}" in line for line in header)


@pytest.mark.parametrize(("row", "schedule"), CIFAR10_CELLS)
def test_cifar10_cell_has_the_published_settings(row, schedule):
    config = load_cell("cifar10", Path(f"configs/cifar10/{row}_{schedule}.yaml"))
    facts, unit = CIFAR10["rows"][row], CIFAR10["schedules"][schedule]
    assert (config.row, config.schedule.name, config.data.name) == (row, schedule, "cifar10")
    assert config.model.model_dump() == CIFAR10["model"]
    assert (config.global_batch, config.accumulation) == (CIFAR10["global_batch"], 1)
    assert (config.precision, config.epochs) == (CIFAR10["precision"], unit["epochs"])

    optimizer = {key: facts[key] for key in facts if key in ("lr", "weight_decay", "betas", "eps", "beta", "sigma")}
    optimizer |= {key: facts[key] for key in ("momentum", "nesterov") if key in facts}
    names = {"sgd": "sgd", "adam": "adamw", "adam_adj": "adamw", "radam": "radam", "radam_adj": "radam"}
    if names.get(row) == "radam":
        optimizer["decoupled_weight_decay"] = facts["decoupled"]
    assert config.optimizer.model_dump() == {"name": names.get(row, row), **optimizer}
    assert facts["decoupled"] == (names.get(row) in ("adamw", "radam"))

    expected = {key: facts[key] for key in ("warmup_updates", "init_lr") if key in facts}
    expected |= {key: unit[key] for key in unit if key != "epochs"} if schedule == "milestone" else {}
    expected |= {"last_lr": facts["last_lr"]} if schedule == "cosine" else {}
    assert config.schedule.model_dump() == {"name": schedule, **expected}


@pytest.mark.parametrize(("row", "schedule"), CIFAR10_CELLS)
def test_published_values_agree_in_all_places(row, schedule):
    mean, std = CIFAR10["rows"][row][schedule]
    assert published("cifar10")["cells"][row][schedule] == [mean, std]
    header = Path(f"configs/cifar10/{row}_{schedule}.yaml").read_text()
    assert f"#   published  {mean:.2f} ({std:.2f}) % top-1" in header


def test_published_table_has_nothing_more():
    facts = published("cifar10")
    assert facts["runs"] == CIFAR10["runs"]
    assert {(row, name) for row, values in facts["cells"].items() for name in values} == set(CIFAR10_CELLS)
