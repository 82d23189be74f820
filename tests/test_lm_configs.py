"""The cells of the One Billion Words table have the published settings; numbers kept apart from configs/ on purpose.

Source: the README of the authors' code of October 2020, and the task README of that time.
"""

from pathlib import Path

import pytest

from scripts.tables import load_cell, published

ROOT = Path(__file__).parent.parent
ADAM = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
OPTIMIZERS = {
    "adam": {"name": "adam", **ADAM},
    "radam": {"name": "radam", **ADAM},
    "apollo": {"name": "apollo", "lr": 10.0, "beta": 0.9, "eps": 1e-4, "sigma": 1.0, "weight_decay": 0.0},
}
WARMUP = {"apollo": {"warmup_updates": 400, "init_lr": 0.01}}
PERPLEXITY = {"adam": [36.68, 0.21], "radam": [36.20, 0.38], "apollo": [32.21, 0.13]}
MODEL = {
    "name": "lstm",
    "embedding": 300,
    "hidden": 2048,
    "layers": 2,
    "dropout": 0.1,
    "cutoffs": [60_000, 100_000, 640_000],
    "div_value": 4.0,
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("row", OPTIMIZERS)
def test_cell_has_the_published_settings(row):
    path = Path(f"configs/one_billion_words/{row}.yaml")
    config = load_cell("one_billion_words", path)
    assert (config.table, config.row, config.data.name) == ("one_billion_words", row, "prepared")
    assert config.model.model_dump() == MODEL
    assert (config.epochs, config.global_batch, config.sequence_length, config.accumulation) == (20, 128, 20, 1)
    assert (config.gradient_clip, config.gradient_clip_norm, config.precision) == (1.0, "total", "fp32")
    assert config.log_every == 1000
    assert config.optimizer.model_dump() == OPTIMIZERS[row]
    milestones = {"name": "milestone", "milestones": [12, 18], "decay_rate": 0.1}
    assert config.schedule.model_dump() == milestones | WARMUP.get(row, {})
    mean, std = PERPLEXITY[row]
    assert f"#   published  {mean:.2f} ({std:.2f}) test perplexity" in path.read_text()
    assert f"scripts/lm_{row}.sh" in path.read_text() and Path(f"scripts/lm_{row}.sh").exists()


def test_published_table_is_the_published_one():
    facts = published("one_billion_words")
    assert facts["cells"] == {row: {"milestone": value} for row, value in PERPLEXITY.items()}
    assert (facts["runs"], facts["metric"], facts["lower_is_better"]) == (5, "ppl", True)
    cells = {path.stem for path in Path("configs/one_billion_words").glob("*.yaml")} - {"base", "published"}
    assert cells == set(OPTIMIZERS)


def test_methods_of_the_small_table_differ_in_optimizer_and_warmup_alone():
    cells = {row: load_cell("pydoc_topics", Path(f"configs/pydoc_topics/{row}.yaml")) for row in OPTIMIZERS}
    for row, config in cells.items():
        assert (config.row, config.optimizer.name) == (row, row)
        same, other = (cell.model_dump(exclude={"row", "optimizer", "schedule"}) for cell in (config, cells["adam"]))
        assert same == other
        assert config.schedule.settings["milestones"] == cells["adam"].schedule.settings["milestones"]
