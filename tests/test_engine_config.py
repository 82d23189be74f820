"""Strict configs: what is accepted, what is refused, and the one-line errors."""

from pathlib import Path

import pytest
import yaml

from engine.config import ConfigError, RunConfig, Strict, differences, load_config, save_config
from engine.core_yaml import read_yaml


class Data(Strict):
    name: str
    root: str = "data"


class Config(RunConfig):
    epochs: int
    data: Data


BASE = """
table: t
row: r
epochs: 3
batch: 8
data: {name: digits}
optimizer: {name: sgd, lr: 0.1, momentum: 0.9}
"""
CELL = """
base: base.yaml
epochs: 5
optimizer: {name: apollo, lr: 5e-1, eps: 1e-4}
"""


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "cell.yaml").write_text(CELL)
    return tmp_path / "cell.yaml"


def test_a_cell_over_its_base(cell):
    config = load_config(Config, cell, ["data.root=elsewhere", "seed=7"])
    assert (config.epochs, config.seed, config.data.name, config.data.root) == (5, 7, "digits", "elsewhere")
    assert config.optimizer.name == "apollo"
    assert config.optimizer.settings == {"lr": 0.5, "eps": 1e-4}  # momentum is not inherited; 5e-1 is a number
    assert config.folder == Path("runs/t/r_constant/seed7")


def test_overrides_reach_into_the_optimizer_and_can_replace_it(cell):
    assert load_config(Config, cell, ["optimizer.lr=1e-2"]).optimizer.settings == {"lr": 0.01, "eps": 1e-4}
    assert load_config(Config, cell, ["optimizer={name: adamw, lr: 1}"]).optimizer.settings == {"lr": 1}


def test_a_saved_config_reads_back_the_same(cell, tmp_path):
    config = load_config(Config, cell, ["optimizer.eps=1e-8"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Config, tmp_path / "saved.yaml") == config
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["optimizer"]["eps"] == 1e-8  # a float for any reader


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epoch=3", ["command line", "unknown key 'epoch'", "did you mean 'epochs'", "valid keys: table, row"]),
        ("global_batch=128", ["command line", "unknown key 'global_batch': an update is passes x batch"]),
        ("accumulation=2", ["command line", "unknown key 'accumulation': passes is the number"]),
        ("data.rot=x", ["command line", "unknown key 'data.rot'", "did you mean 'root'", "valid keys: name, root"]),
        ("epochs=many", ["command line", "epochs", "valid integer", "not 'many'"]),
        ("epochs=1.5", ["command line", "epochs", "not 1.5"]),
        ("data=7", ["command line", "data", "not 7"]),
        ("data.name.x=7", ["command line", "data.name has no keys of its own"]),
        ("batch=0", ["command line", "batch", "greater than 0", "not 0"]),
        ("optimizer.lr=.inf", ["optimizer", "lr must be a finite number, not inf"]),
        ("precision=fp8", ["command line", "precision", "'fp32', 'tf32', 'bf16'", "not 'fp8'"]),
        ("epochs", ["command line", "key=value"]),
        ("epochs={", ["command line", "epochs"]),
    ],
)
def test_bad_overrides(cell, override, words):
    with pytest.raises(ConfigError) as error:
        load_config(Config, cell, [override])
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: base.yaml\nepocs: 3\n", ["bad.yaml", "unknown key 'epocs'", "did you mean 'epochs'"]),
        ("base: base.yaml\nepochs: 3\nepochs: 4\n", ["bad.yaml", "'epochs' is given twice"]),
        ("base: base.yaml\nschedule: {name: x, lr:0,1}\n", ["bad.yaml", "the key 1 is not text: quote it"]),
        ("base: nowhere.yaml\n", ["nowhere.yaml", "No such file"]),
        ("base: bad.yaml\n", ["bad.yaml", "comes back"]),
        ("base: 3\n", ["bad.yaml", "base must be the name of a file"]),
        ("- a\n- b\n", ["bad.yaml", "mapping"]),
        ("a: [1, 2\n", ["bad.yaml", "not valid YAML"]),
        ("table: t\n", ["bad.yaml", "is missing"]),
    ],
)
def test_bad_files(cell, text, words):
    bad = cell.parent / "bad.yaml"
    bad.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(Config, bad)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("5e-4", 5e-4),
        ("+.5", 0.5),
        ("yes", "yes"),
        ("off", "off"),
        ("TRUE", True),
        ("2020-01-01", "2020-01-01"),
        ("", None),
        ("~", None),
        ("{a: &a {b: 1, c: 2}, d: {<<: *a, b: 3}}", {"a": {"b": 1, "c": 2}, "d": {"b": 3, "c": 2}}),
        ("{a: &a {b: 1}, c: &c {<<: *a, b: 2}, d: {<<: *c}}", {"a": {"b": 1}, "c": {"b": 2}, "d": {"b": 2}}),
    ],
)
def test_the_core_schema_of_yaml_is_read(text, value):
    found = read_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["!!binary aGk=", "!!int x", "9" * 5000, "[" * 5000, "&a [*a]", "{a: 1, a: 2}", "a: b: c"]
)
def test_yaml_that_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)


def test_what_an_alias_repeats_is_changed_in_one_place_alone():
    found = read_yaml("{a: &a {b: {c: 1}}, d: *a, e: {<<: *a}}")
    found["d"]["b"]["c"] = 2
    assert found["a"] == found["e"] == {"b": {"c": 1}}


def test_aliases_of_aliases_are_refused_before_they_fill_the_memory():
    lists = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]\n" for n in range(1, 12))
    with pytest.raises(yaml.YAMLError, match="stand for more than"):
        read_yaml(f"k0: &k0 [x]\n{lists}")


def test_any_reader_of_yaml_reads_a_saved_config_alike(cell, tmp_path):
    texts = ["010", "5e-4", "0o17", "1:30", "yes", "null", "<<", "2020-01-01", "1_000", "plain"]
    config = load_config(Config, cell, [f"optimizer={{name: x, texts: [{', '.join(map(repr, texts))}]}}"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Config, tmp_path / "saved.yaml").optimizer.settings["texts"] == texts
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["optimizer"]["texts"] == texts


def test_a_config_with_a_byte_order_mark(cell):
    cell.write_bytes(b"\xef\xbb\xbf" + cell.read_bytes())
    assert load_config(Config, cell).epochs == 5


def test_the_error_names_the_file_that_gave_the_value(cell):
    (cell.parent / "base.yaml").write_text(BASE.replace("epochs: 3", "epochs: 3\nlog_every: often"))
    with pytest.raises(ConfigError, match=r"base\.yaml: log_every"):
        load_config(Config, cell)


def test_differences_name_the_dotted_keys():
    ours = {"a": 1, "b": {"c": 2, "d": 3}, "e": {"f": 1}}
    theirs = {"a": 1, "b": {"c": 5}, "e": {"f": 2}, "g": 0}
    assert differences(ours, theirs, ignore=["e"]) == ["b.c", "b.d", "g"]
