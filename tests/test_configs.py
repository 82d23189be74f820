"""Every config loads strictly and trains; every row of a published table has the published settings."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from meta_models import meta_model, needs_muon

from engine.parameter_groups import create_grouped_optimizer
from optim.lr_scheduler import create_schedule
from scripts.jobs import plan
from scripts.reporting.recipes import published_cells
from scripts.tables import TASKS, cells, load_settings, published, seeds_of

ROOT = Path(__file__).parent.parent
CELLS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.glob("configs/*/*.yaml")
    if path.stem not in ("base", "published") and path.parent.name not in ("comparison", "search")  # test_compare.py
)
TABLES = yaml.safe_load((ROOT / "tests/published_settings.yaml").read_text())
ROWS = {
    (table, row): of_row
    for table, facts in TABLES.items()
    for row, of_row in (facts["rows"] | facts["later"]["rows"]).items()
}
DECOUPLED = ("decoupled_weight_decay", "weight_decouple", "weight_decay_type")  # as classes call it
OF_SCHEDULE = ("warmup_updates", "init_lr")
PUBLISHED = sorted(ROOT.glob("configs/*/published.yaml"))


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[needs_muon] * path.stem.startswith("muon")) for path in CELLS], ids=str
)
def test_config_loads_and_its_optimizer_and_schedule_accept_their_settings(path):
    config = load_settings(TASKS[path.parent.name], path)
    assert config.table == path.parent.name
    assert path.stem in (config.row, f"{config.row}_{config.schedule.name}")
    if config.optimizer.name.startswith("pytorch_optimizer."):
        pytest.importorskip("pytorch_optimizer")
    model = meta_model(TASKS[path.parent.name], config)
    optimizer = create_grouped_optimizer(model, config.optimizer, "cpu")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in model.parameters()}
    length = plan(path.parent.name, path, 1, Path("runs")).length
    create_schedule(optimizer, config.schedule.name, updates_per_unit=390, total=length, **config.schedule.settings)


@pytest.mark.parametrize("path", CELLS, ids=str)
def test_header_names_the_command_of_this_file(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"python -m {TASKS[path.parent.name]}.train {path}" in line for line in header)


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_row_has_the_published_settings(table, row):
    facts, of_row = TABLES[table], numbers(ROWS[table, row])
    assert set(cells(table, row)) == set(of_row["results"])
    for schedule, path in cells(table, row).items():
        config = load_settings(TASKS[table], path).model_dump(mode="json")
        assert config["row"] == row
        for key, (value, _, _) in facts["shared"].items():
            assert looked_up(config, key) == value, key
        assert_published_update(config, facts["batch"])

        not_optimizers = ("optimizer", "decoupled", "last_lr", "results", *OF_SCHEDULE)
        settings = {key: value for key, value in of_row.items() if key not in not_optimizers}
        given = [config["optimizer"].pop(key) for key in DECOUPLED if key in config["optimizer"]]
        decoupled = given in ([True], ["decoupled"]) or of_row["optimizer"] == "adamw"
        needs = {"needs": "create_graph"} if row == "adahessian" else {}
        assert config["optimizer"] == {"name": of_row["optimizer"], **settings, **needs}
        assert decoupled == of_row.get("decoupled", decoupled)

        of_schedule = {key: of_row[key] for key in OF_SCHEDULE if key in of_row}
        of_schedule |= {"last_lr": of_row["last_lr"]} if schedule == "cosine" else {}
        for key, value in facts["schedules"][schedule].items():
            if key in ("epochs", "updates"):
                assert config[key] == value
            elif key != "in":
                of_schedule[key] = value
        assert config["schedule"] == {"name": schedule, **of_schedule}


def assert_published_update(config: dict[str, Any], batch: dict[str, Any]) -> None:
    assert (config["batch"], config["passes"]) == (batch["is"], batch["gpus"])
    assert config.get("batchnorm_group") is None  # BatchNorm sees a pass


def looked_up(config: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def numbers(value: Any) -> Any:
    """Numbers in texts too: YAML reads 5e-4 as text."""
    if isinstance(value, dict):
        return {key: numbers(item) for key, item in value.items()}
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def test_published_settings_agree_with_what_was_printed():
    for facts in TABLES.values():
        batch = facts["batch"]
        (printed,) = re.findall(r"\d+", batch["printed"])
        assert int(printed) == batch["is"] * (batch["gpus"] if batch["of"] == "all GPUs" else 1)
        for key, (value, printed, _) in facts["shared"].items():
            found = [float(text) for text in re.findall(r"\d+(?:\.\d+)?", printed)]
            wanted = value if isinstance(value, list) else [value]
            assert isinstance(value, bool | str) or set(wanted) <= set(found), key
        for generation in (facts, facts["later"]):
            for of_row in generation["rows"].values():
                assert {*of_row} - {"optimizer"} <= {*generation["in"]}


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_published_results_agree_in_all_places(table, row):
    for schedule, result in ROWS[table, row]["results"].items():
        assert published_cells(table)[row, schedule] == mean_and_std(result)
        header = cells(table, row)[schedule].read_text()
        assert f"#   published  {result} " in header
        (script,) = re.findall(r"bash (scripts/\w+\.sh)", header)
        assert Path(script).exists() and script.endswith(f"_{row}.sh")


def mean_and_std(text: str) -> list[float]:
    return [float(part) for part in re.fullmatch(r"(\d+\.\d\d) \((\d+\.\d\d)\)", text).groups()]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_nothing_more(table):
    facts, later, batch = published(table), TABLES[table]["later"], TABLES[table]["batch"]
    changed = later.get("changed", {})
    assert set(facts["cells"]) == set(TABLES[table]["rows"])
    assert set(facts["later"]["cells"]) == {*later["rows"], *changed}
    for row, results in changed.items():
        assert facts["later"]["cells"][row] == {name: mean_and_std(result) for name, result in results.items()}
    assert {path for path in CELLS if path.parent.name == table} == {
        path for of_table, row in ROWS if of_table == table for path in cells(table, row).values()
    }
    assert facts["runs"] == 5 and facts.get("batchnorm_batch", batch["is"]) == batch["is"]
    assert facts.get("lower_is_better", False) == (facts["metric"] == "ppl")


@pytest.mark.parametrize("table", ["digits", "pydoc_topics", "grammar", "pydoc_topics_transformer", "news_transformer"])
def test_methods_of_a_small_table_differ_in_the_optimizer_alone(table):
    configs = {path.stem: load_settings(TASKS[table], path) for path in CELLS if path.parent.name == table}
    least = {"adamw", "muon_adamw", "apollo"} if table.endswith("_transformer") else {"adam", "radam", "apollo"}
    assert {config.row for config in configs.values()} == set(configs) >= least
    shared = [config.model_dump(exclude={"row", "optimizer"}) for config in configs.values()]
    assert all(settings == shared[0] for settings in shared)
    assert shared[0]["passes"] == 1  # nobody who tries them out waits for passes


def test_the_published_seeds_are_the_default_ones():
    assert seeds_of("cifar10") == [1, 101, 8191, 65537, 131071]
    assert seeds_of("wmt14_en_de") == [1, 11, 101, 65537, 524287]
    assert all(len(seeds_of(path.parent.name)) == published(path.parent.name)["runs"] for path in PUBLISHED)
