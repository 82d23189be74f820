"""The report on run folders of all kinds: complete, unfinished, of another recipe, damaged."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
from report_runs import write_run, write_search

from engine.config import save_config
from engine.errors import UserError
from scripts.jobs import plan
from scripts.report import main
from scripts.reporting.recipes import apart
from scripts.reporting.records import read_record, write_record
from scripts.reporting.statistics import spread
from scripts.reporting.tables import comparison, optimizer_share, report
from scripts.runs import Result, read_runs
from scripts.tables import TASKS, cells, is_same_update, load_settings
from scripts.text_table import format_table

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def make_run(runs, row, seed, final=None, epochs=3, overrides=(), batchnorm_batch=128):
    """A run folder as train.py leaves it."""
    config = load_settings(TASKS["cifar10"], cells("cifar10", row)["milestone"], (f"seed={seed}", *overrides))
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


def test_a_row_stands_beside_the_value_of_its_own_table(tmp_path):
    for row, final in (("sgd", 94.0), ("adam", 91.0), ("apollow", 94.4)):
        make_run(tmp_path, row, 1, final)
    _, _, *lines, _, note = report("cifar10", read_runs(tmp_path)[0]).splitlines()
    found = {line.split()[0]: line.split()[5:] for line in lines}
    assert found == {
        "sgd": ["93.91", "(0.07)", "+0.09"],
        "adam": ["91.41", "(0.30)", "-0.41"],
        "apollow": ["94.34", "(0.12)", "+0.06"],
    }
    code = "README of the authors' code for arXiv 2009.13586, as of"
    assert note == (
        f"published: {code} October 2020; for apollow: {code} November 2021; it changed sgd milestone to 93.94 (0.07)"
    )


def test_the_later_rows_have_a_line_where_one_of_them_was_trained(tmp_path, capsys):
    make_run(tmp_path, "apollo", 1, 94.3)
    main([str(tmp_path)])
    assert "sgd  " in (first := capsys.readouterr().out) and "adabelief" not in first
    make_run(tmp_path, "adabelief", 1, 94.3)
    main([str(tmp_path)])
    assert "adabelief  milestone" in capsys.readouterr().out


def make_translation(runs, seed, scores, updates):
    """A run folder of the WMT14 Apollo cell, with a log line every 100 updates and one validation."""
    config = load_settings(TASKS["wmt14_en_de"], cells("wmt14_en_de", "apollo")["milestone"], (f"seed={seed}",))
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
    write_record(tmp_path / "record.json", read_runs(tmp_path)[0])
    assert report("wmt14_en_de", read_record(tmp_path / "record.json")) == report("wmt14_en_de", read_runs(tmp_path)[0])


def test_a_run_is_held_against_the_authors_log(tmp_path, capsys):
    """Our log lines, in bits, at the updates of the published ones."""
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


def test_the_scripts_that_plan_and_report_start_in_a_moment():
    """What takes a second or more to import is imported where it is used."""
    code = "import sys, scripts.reproduce; print(*{'torch', 'matplotlib', 'plotly', 'scipy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


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
        (["batch=64", "passes=2"], 64, "batch=64, passes=2, batchnorm_batch=64"),
        (["batch=256", "passes=1"], 256, "batch=256, batchnorm_batch=256"),
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
        assert marks[0].startswith(f"apollo #2 milestone, seed 101: not the published recipe: {expected}")


def test_runs_of_different_recipes_are_not_averaged_together(tmp_path):
    make_run(tmp_path, "apollo", 1, 90.0, overrides=["epochs=1"])
    make_run(tmp_path, "apollo", 11, 91.0, overrides=["epochs=1"])
    make_run(tmp_path, "apollo", 101, 94.0)
    runs = apart(read_runs(tmp_path)[0])
    lines = [line.split() for line in report("cifar10", runs).splitlines() if line.startswith("apollo")]
    assert lines[0][:5] == ["apollo", "milestone", "94.00", "94.50", "1"]
    assert lines[1][:6] == ["apollo", "#2", "milestone", "90.50", "(0.71)", "91.00"]
    assert {run.seed: run.label for run in runs} == {1: "apollo #2", 11: "apollo #2", 101: "apollo"}
    assert apart(runs) == runs


def test_recipe_that_no_complete_run_follows_has_no_line(tmp_path):
    for folder, rate in (("a", 0.2), ("b", 0.2), ("c", 0.1)):
        write_run(tmp_path / folder, "own", "sgd", 1, rate)
    for folder in "ab":
        (tmp_path / folder / "result.json").unlink()
    _, _, line, _, *notes = report("own", read_runs(tmp_path)[0]).splitlines()
    assert line.split()[:2] == ["sgd", "milestone"] and line.split()[-1] == "1"
    assert notes == [f"unfinished: {tmp_path / folder}, epoch 12 of 12" for folder in "ab"]


def test_unpublished_cell_names_what_its_smaller_recipe_changes(tmp_path):
    for seed, epochs in ((1, 4), (2, 4), (3, 5)):
        write_run(tmp_path / f"{seed}", "own", "sgd", seed, 0.1, epochs=epochs)
    notes = [line for line in report("own", read_runs(tmp_path)[0]).splitlines() if "another" in line]
    assert notes == ["sgd #2 milestone, seed 3: another recipe than sgd's: epochs=5"]


def test_diverged_run_counts_with_the_worst_value(tmp_path):
    for table, metric, shown in (("own", "top1", "45.0"), ("text", "ppl", "inf")):
        finals = [
            write_run(tmp_path / table / f"{rate}", table, "sgd", 1, rate, metric)["final"] for rate in (0.1, 3.2)
        ]
        assert finals[1] is None
        runs, problems = read_runs(tmp_path / table)
        assert [run.result.diverged for run in runs] == [False, True]
        assert problems == []
        text = report(table, [replace(run, config=runs[0].config) for run in runs])
        assert text.splitlines()[2].split()[2].startswith(shown if table == "text" else f"{finals[0] / 2:.2f}")
        assert "sgd milestone, seed 1: diverged, and counted with the worst value that there is" in text


def test_trials_of_a_search_are_told_by_their_place_and_stay_out_of_the_table(tmp_path, monkeypatch):
    write_run(tmp_path / "own/sgd_milestone/seed1", "own", "sgd", 1, 0.1)
    write_search(tmp_path, "own", "sgd")
    runs, _ = read_runs(tmp_path)
    assert [run.trial for run in runs if not run.trial] == [None]
    assert sorted(run.trial for run in runs if run.trial) == [f"trial{number}" for number in range(9)]
    assert report("own", runs).splitlines()[2].split()[-1] == "1"
    monkeypatch.chdir(tmp_path / "own/search/sgd/trial3")
    assert [run.trial for run in read_runs(Path("."))[0]] == ["trial3"]


def test_another_division_of_the_same_update_is_the_same_recipe():
    for table, row, same, other in (
        ("imagenet", "sgd", ["batch=256", "passes=1", "batchnorm_group=32"], ["batch=64", "passes=4"]),
        ("one_billion_words", "adam", ["batch=32", "passes=4"], ["batch=64"]),
        ("wmt14_en_de", "adam", [], ["batch=16384", "passes=4"]),
    ):
        config = next(iter(cells(table, row).values()))
        published, one, another = (
            load_settings(TASKS[table], config, overrides).model_dump(mode="json") for overrides in ([], same, other)
        )
        assert is_same_update(TASKS[table], published, one) and not is_same_update(TASKS[table], published, another)


@pytest.mark.parametrize(
    ("name", "content", "counted"),
    [
        ("result.json", '{"final": 94', False),
        ("result.json", '{"final": "high", "best": 94.0, "complete": true}', False),
        ("result.json", '{"final": Infinity, "best": 94.0, "complete": true}', False),
        ("result.json", "[]", False),
        ("result.json", "[" * 100_000, False),
        ("environment.json", "\0\0\0", True),
        ("config.yaml", "table: [", False),
        ("config.yaml", "table: cifar10\n", False),
        ("config.yaml", "", False),
        ("config.yaml", b"\xff\xfe\x00", False),
        ("config.yaml", None, False),
    ],
)
def test_damaged_file_costs_its_run_at_most(tmp_path, capsys, name, content, counted):
    make_run(tmp_path, "apollo", 1, 94.0)
    folder = make_run(tmp_path, "apollo", 101, 94.0)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (skipped,) = [line for line in lines if line.startswith("skipped: ")]
    assert str(folder) in skipped
    apollo = next(line for line in lines if line.startswith("apollo     milestone"))
    assert (" 2  " if counted else " 1  ") in apollo


def test_damaged_line_of_a_curve_is_left_out_and_named(tmp_path, capsys):
    folder = make_run(tmp_path, "apollo", 1, 94.0)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("\0\n{}\n" + text)
    runs, problems = read_runs(tmp_path)
    assert [line["epoch"] for line in runs[0].evaluations] == [1, 2, 3]
    assert problems == [f"{folder / 'metrics.jsonl'}: line 1 cannot be read (2 such lines); left out"]


def test_foreign_folder_changes_nothing_but_the_list(tmp_path, capsys):
    make_run(tmp_path, "apollo", 1, 94.0)
    main([str(tmp_path)])
    before = capsys.readouterr().out
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text("defaults: [model: vit]\n")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/metrics.jsonl").write_text("")
    main([str(tmp_path)])
    added = capsys.readouterr().out.removeprefix(before).splitlines()
    assert [line.partition(": ")[0] for line in added] == ["skipped", "skipped"]
    assert str(tmp_path / "half") in added[0]
    assert str(tmp_path / "theirs/config.yaml") in added[1]


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
    table = [line for line in lines[: lines.index("", 2)] if line.startswith("|")]
    assert len(table) == 2 + 12
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
    with pytest.raises(UserError, match="other settings: epochs .*--runs"):
        plan("cifar10", config, 1, tmp_path, ["epochs=1"])


def test_comparison_has_the_test_the_interval_and_the_costs(tmp_path):
    values = {"sgd": (90.0, 90.5, 91.5), "apollo": (92.0, 92.5, 92.75)}
    for row, finals in values.items():
        for seed, final in enumerate(finals):
            folder = tmp_path / row / f"seed{seed}"
            write_run(folder, "own", row, seed, 0.1)
            result = json.loads((folder / "result.json").read_text()) | {"final": final}
            (folder / "result.json").write_text(json.dumps(result))
    header, sgd, apollo = comparison(read_runs(tmp_path)[0]).splitlines()[:3]
    test = scipy.stats.ttest_ind(values["apollo"], values["sgd"], equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert f"+1.75 ({low:+.2f} to {high:+.2f})  {test.pvalue:.2g} (3, 3)" in sgd
    low, high = scipy.stats.t.interval(0.95, 2, 90 + 2 / 3, scipy.stats.sem(values["sgd"]))
    assert sgd.startswith(f"sgd     milestone  {low:.2f} to {high:.2f}")
    assert sgd.split()[-6:] == ["2", "min", "812", "MiB", "4.5", "%"]  # 4.5 of 100 ms
    assert "apollo − row" in header
    assert apollo.split()[:2] == ["apollo", "milestone"]
    assert "(3, 3)" not in apollo


def test_comparison_is_silent_on_what_no_run_tells(tmp_path, capsys):
    write_run(tmp_path / "own", "own", "apollo", 1, 0.5)
    assert main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "time a run" in printed and "memory" in printed
    assert not any(words in printed for words in ("95 %", "apollo − row", "p (n)", "Welch"))


@pytest.mark.parametrize(
    ("config", "speeds", "share"),
    [
        ({"batch": 50, "passes": 2}, {"examples_per_s": 1000}, 0.05),
        ({"batch": 5, "passes": 2, "sequence_length": 20}, {"tokens_per_s": 2000}, 0.05),
        ({"batch": 4096, "passes": 1}, {"tokens_per_s": 1000, "updates": 5}, 0.05),  # 500 tokens were trained on in all
        ({"batch": 50, "passes": 2}, {}, None),
    ],
)
def test_optimizer_share_is_of_the_time_of_an_update(tmp_path, config, speeds, share):
    write_run(tmp_path / "run", "own", "sgd", 1, 0.1)
    (run,), _ = read_runs(tmp_path)
    result = Result(final=1.0, best=1.0, complete=True, optimizer_ms_per_step=5.0, **speeds)
    found = replace(run, config=config, result=result, read_lines=lambda kinds: [{"update": 5, "tokens": 500}])
    assert optimizer_share(found) == (share and pytest.approx(share))


def test_columns_are_aligned():
    assert format_table(["a", "bb"], [["long", "x"], ["", "y"]]) == ["a     bb", "long  x", "      y"]
    assert format_table(["a", "bb"], [["long", "x"]], markdown=True) == [
        "| a    | bb |",
        "| ---- | -- |",
        "| long | x  |",
    ]
