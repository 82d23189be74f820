"""The report on run folders as they are found: complete, unfinished, of another recipe, damaged."""

import json
from pathlib import Path

import pytest

from engine.config import save_config
from engine.errors import UserError
from scripts.jobs import plan
from scripts.report import format_table, main, report, spread
from scripts.runs import read_runs
from scripts.tables import cells, load_cell

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def make_run(runs, row, seed, final=None, epochs=3, overrides=(), batchnorm_batch=128):
    """A run folder as train.py leaves it: complete with a `final` value, unfinished without."""
    config = load_cell("cifar10", cells("cifar10", row)["milestone"], (f"seed={seed}", *overrides))
    folder = runs / f"cifar10/{row}_milestone/seed{seed}"
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    (folder / "environment.json").write_text(json.dumps({"recipe": {"batchnorm_batch": batchnorm_batch}}))
    with open(folder / "metrics.jsonl", "w") as file:
        for epoch in range(1, epochs + 1):
            file.write(json.dumps({"kind": "train", "epoch": epoch, "update": epoch, "loss": 1.0}) + "\n")
            line = {"kind": "epoch", "epoch": epoch, "update": epoch, "train_loss": 1 / epoch, "test_top1": 80 + epoch}
            file.write(json.dumps(line) + "\n")
    if final is not None:
        (folder / "result.json").write_text(json.dumps({"final": final, "best": final + 0.5, "complete": True}))
    return folder


def test_cell_is_mean_and_sample_deviation_beside_the_published_value(tmp_path):
    for seed, final in ((1, 94.0), (101, 94.2), (8191, 94.7)):
        make_run(tmp_path, "apollo", seed, final)
    runs, problems = read_runs(tmp_path)
    header, line = report("cifar10", runs).splitlines()[1:]
    assert header.split() == ["row", "schedule", "final", "best", "n", "published", "difference"]
    assert " ".join(line.split()) == "apollo milestone 94.30 (0.36) 94.80 (0.36) 3 94.20 (0.12) +0.10"
    assert line.index("94.30") == header.index("final")
    assert line.index("94.20") == header.index("published")
    assert problems == []


def test_spread_needs_two_values_for_a_deviation():
    assert [spread([]), spread([1.0]), spread([1.0, 2.0])] == ["", "1.00", "1.50 (0.71)"]


def test_unfinished_run_is_listed_and_not_counted(tmp_path):
    make_run(tmp_path, "sgd", 1, 93.0)
    folder = make_run(tmp_path, "sgd", 101, epochs=2)
    text = report("cifar10", read_runs(tmp_path)[0])
    assert text.splitlines()[2].split()[:4] == ["sgd", "milestone", "93.00", "93.50"]
    assert f"unfinished: {folder}, epoch 2 of 164" in text.splitlines()


@pytest.mark.parametrize(
    ("overrides", "batch", "expected"),
    [
        (["epochs=1", "data.name=folder", "optimizer.lr=0.3"], 128, "optimizer.lr=0.3, epochs=1, data.name=folder"),
        (
            ["optimizer={name: apollo, lr: 0.5}"],
            128,
            "optimizer.beta=unset, optimizer.eps=unset, optimizer.sigma=unset",
        ),
        (["precision=bf16"], 128, "precision=bf16"),
        ([], 64, "batchnorm_batch=64"),
        (["device=cpu", "data.root=elsewhere", "compile=true", "log_every=7"], 128, None),
    ],
)
def test_other_recipes_are_marked_with_what_they_change(tmp_path, overrides, batch, expected):
    make_run(tmp_path, "apollo", 1, 94.0)
    make_run(tmp_path, "apollo", 101, 94.0, overrides=overrides, batchnorm_batch=batch)
    marks = [line for line in report("cifar10", read_runs(tmp_path)[0]).splitlines() if "not the published" in line]
    if expected is None:
        assert marks == []
    else:
        assert len(marks) == 1
        assert marks[0].startswith(f"apollo milestone, seed 101: not the published recipe: {expected}")


@pytest.mark.parametrize(
    ("name", "content", "counted"),
    [
        ("result.json", '{"final": 94', False),
        ("result.json", '{"final": "high", "best": 94.0, "complete": true}', False),
        ("result.json", "[]", False),
        ("environment.json", "\0\0\0", True),
        ("metrics.jsonl", "\0\n{}\n", True),
        ("config.yaml", "table: [", False),
        ("config.yaml", "table: cifar10\n", False),
        ("config.yaml", b"\xff\xfe\x00", False),
    ],
)
def test_damaged_file_costs_its_run_at_most(tmp_path, capsys, name, content, counted):
    make_run(tmp_path, "apollo", 1, 94.0)
    folder = make_run(tmp_path, "apollo", 101, 94.0)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    (damaged,) = [line for line in lines if line.startswith("damaged: ")]
    assert str(folder / name) in damaged
    (apollo,) = [line for line in lines if line.startswith("apollo     milestone")]
    assert (" 2  " if counted else " 1  ") in apollo


def test_half_a_last_line_is_a_run_being_written(tmp_path):
    folder = make_run(tmp_path, "apollo", 1)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epoch", "epo')
    runs, problems = read_runs(tmp_path)
    assert [epoch["epoch"] for epoch in runs[0].evaluations] == [1, 2, 3]
    assert problems == []


def test_command_prints_the_whole_table_and_draws_it(tmp_path, capsys):
    make_run(tmp_path, "apollo", 1, 94.0)
    make_run(tmp_path, "sgd", 1, epochs=1)
    picture = tmp_path / "pictures/curves.png"
    main([str(tmp_path), "--markdown", "--plot", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 12  # every published cell, whether run or not
    assert len({len(line) for line in table}) == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "no runs below this folder"),
        (["{empty}/nowhere"], "no runs below this folder"),
        (["{runs}", "--plot", "{empty}/curves.docx"], "docx"),
        (["{runs}", "--plots", "x"], "unrecognized arguments"),
        ([], "required: folder"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, arguments, message):
    make_run(tmp_path / "runs", "apollo", 1, 94.0)
    (tmp_path / "empty").mkdir()
    places = {"runs": tmp_path / "runs", "empty": tmp_path / "empty"}
    with pytest.raises(UserError, match=message) as caught:
        main([argument.format(**places) for argument in arguments])
    assert "\n" not in str(caught.value)


def test_planning_refuses_a_folder_with_other_settings(tmp_path):
    make_run(tmp_path, "apollo", 1, 94.0)
    config = cells("cifar10", "apollo")["milestone"]
    assert plan("cifar10", config, 1, tmp_path).complete
    assert plan("cifar10", config, 1, tmp_path, ["log_every=1"]).complete
    with pytest.raises(UserError, match=r"other settings \(epochs\).*--runs"):
        plan("cifar10", config, 1, tmp_path, ["epochs=1"])


def test_columns_are_aligned():
    assert format_table(["a", "bb"], [["long", "x"], ["", "y"]]) == ["a     bb", "long  x", "      y"]
    assert format_table(["a", "bb"], [["long", "x"]], markdown=True) == [
        "| a    | bb |",
        "| ---- | -- |",
        "| long | x  |",
    ]
