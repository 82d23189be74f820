"""The cells of the ImageNet table have the published settings; numbers kept apart from configs/ on purpose.

Source: the README of the authors' code of October 2020; last_lr from their task README of that time.
"""

from pathlib import Path

import pytest

from scripts.tables import load_cell, published

ROOT = Path(__file__).parent.parent
ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8}
OPTIMIZERS = {
    "sgd": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 2e-4},
    "adam": {"name": "adamw", **ADAM, "weight_decay": 2e-4},
    "radam": {"name": "radam", **ADAM, "weight_decay": 2e-4, "decoupled_weight_decay": True},
    "adam_adj": {"name": "adamw", **ADAM, "weight_decay": 0.1},
    "radam_adj": {"name": "radam", **ADAM, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "apollo": {"name": "apollo", "lr": 0.5, "beta": 0.9, "eps": 1e-4, "sigma": 1.0, "weight_decay": 2e-4},
}
LAST_LR = {"sgd": 1e-4, "apollo": 1e-3}
TOP1 = {
    "sgd": {"milestone": [77.19, 0.07], "cosine": [78.17, 0.06]},
    "adam": {"milestone": [71.72, 0.13], "cosine": [71.19, 0.10]},
    "radam": {"milestone": [72.37, 0.08], "cosine": [71.64, 0.14]},
    "adam_adj": {"milestone": [76.86, 0.06], "cosine": [77.54, 0.16]},
    "radam_adj": {"milestone": [76.91, 0.07], "cosine": [77.68, 0.08]},
    "apollo": {"milestone": [77.90, 0.06], "cosine": [78.54, 0.09]},
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("schedule", ["milestone", "cosine"])
@pytest.mark.parametrize("row", TOP1)
def test_cell_has_the_published_settings(row, schedule):
    path = Path(f"configs/imagenet/{row}_{schedule}.yaml")
    config = load_cell("imagenet", path)
    assert (config.table, config.row, config.data.name) == ("imagenet", row, "imagenet")
    assert (config.model.name, config.epochs, config.global_batch) == ("resnext50_32x4d", 120, 256)
    assert (config.data.size, config.data.resize, config.precision, config.sync_batchnorm) == (224, 256, "fp32", False)
    assert config.optimizer.model_dump() == OPTIMIZERS[row]
    expected = {"milestones": [40, 80], "decay_rate": 0.1} if schedule == "milestone" else {}
    expected |= {"last_lr": LAST_LR.get(row, 1e-6)} if schedule == "cosine" else {}
    expected |= {"warmup_updates": 100, "init_lr": 0.01} if row == "apollo" else {}
    assert config.schedule.model_dump() == {"name": schedule, **expected}
    mean, std = TOP1[row][schedule]
    assert f"#   published  {mean:.2f} ({std:.2f}) % top-1" in path.read_text()
    assert f"scripts/imagenet_{row}.sh" in path.read_text() and Path(f"scripts/imagenet_{row}.sh").exists()


def test_published_table_is_the_published_one():
    facts = published("imagenet")
    assert facts["cells"] == TOP1
    assert (facts["runs"], facts["batchnorm_batch"], facts["metric"]) == (5, 32, "top1")
    cells = {path.stem for path in Path("configs/imagenet").glob("*.yaml")} - {"base", "published"}
    assert cells == {f"{row}_{schedule}" for row in TOP1 for schedule in ("milestone", "cosine")}
