"""The report on run folders of all kinds: complete, unfinished, of another recipe, damaged."""

import json
import math
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
    """A run folder as train.py leaves it. With `final` it is complete, without it is unfinished."""
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


def make_translation(runs, seed, scores, updates):
    """A run folder of the WMT14 Apollo cell, with a log line every 100 updates and one validation."""
    config = load_cell("wmt14_en_de", cells("wmt14_en_de", "apollo")["milestone"], (f"seed={seed}",))
    folder = runs / f"wmt14_en_de/apollo_milestone/seed{seed}"
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    result = {"final": scores["fairseq_bleu"], "best": 26.0, "complete": True, "signature": "nrefs:1|tok:13a", **scores}
    (folder / "result.json").write_text(json.dumps(result))
    lines = [
        {"kind": "train", "epoch": 1, "update": update, "loss": math.log(2) * (10 - update / 1000), "clipped": 0.25}
        for update in range(100, updates + 1, 100)
    ]
    lines.append({"kind": "validation", "epoch": 1, "update": updates, "train_loss": 5.0, "valid_bleu": 20.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_translation_row_compares_like_with_like(tmp_path):
    """The difference is that of fairseq's BLEU. The other scores stand beside it."""
    for seed, shift in ((1, 0.0), (11, 0.2)):
        scores = {"fairseq_bleu": 28.4, "sacrebleu": 27.6, "compound_split_bleu": 28.1, "tokenized_bleu": 27.5}
        make_translation(tmp_path, seed, {name: score + shift for name, score in scores.items()}, 500)
    title, header, line, _, note = report("wmt14_en_de", read_runs(tmp_path)[0]).splitlines()
    assert "test BLEU as fairseq's generation prints it" in title
    assert line.split()[2:4] == ["28.50", "(0.14)"]
    for name, value in (("published", "28.32 (0.12)"), ("difference", "+0.18"), ("sacreBLEU", "27.70 (0.14)"),
                        ("compound-split", "28.20 (0.14)"), ("whole words", "27.60 (0.14)")):  # fmt: skip
        assert line[header.index(name) :].startswith(value)
    assert note == "apollo milestone, sacreBLEU: nrefs:1|tok:13a"


def test_a_run_is_held_against_the_authors_log(tmp_path, capsys):
    """Our log lines, in bits, at the updates of the published ones. Cells after the run's end are blank."""
    make_translation(tmp_path, 1, {"fairseq_bleu": 28.4}, 6350)
    main([str(tmp_path), "--plot", str(tmp_path / "curves.png")])
    printed = capsys.readouterr().out
    table = printed[printed.index("wmt14_en_de: apollo milestone, training loss in bits") :].splitlines()
    assert [" ".join(line.split()) for line in table[1:7]] == [
        "update published seed 1 clipped",
        "500 10.13 9.50 25%",
        "2,400 7.05 7.60 25%",
        "4,400 5.63 5.60 25%",
        "6,300 4.93 3.70 25%",
        "8,600 4.68",
    ]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


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
