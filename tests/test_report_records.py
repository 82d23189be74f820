"""Records that stand for runs, documents generated from them, a run beside a record, and what a release gets."""

import hashlib
import json
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from report_runs import METHODS, write_run, write_search
from safetensors.torch import load_file, safe_open

from engine.averaging import average_weights, keep_weights
from engine.checkpoint import write_checkpoint
from engine.errors import UserError
from scripts.report import main, read
from scripts.reporting.pictures import pictures
from scripts.reporting.records import MOST_POINTS, read_record, updated, write_record
from scripts.reporting.tables import render
from scripts.runs import read_runs
from scripts.tables import load_settings

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("records")
    for table, metric in (("images", "top1"), ("words", "ppl")):
        for row, rate in METHODS.items():
            write_search(top, table, row, metric)
            for seed in (1, 101, 8191):
                write_run(top / table / f"{row}_milestone/seed{seed}", table, row, seed, rate, metric)
    return top


@pytest.fixture(scope="module")
def record(runs_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "results/all.json"
    assert write_record(path, read_runs(runs_folder)[0]) == 2 * 4 * (9 + 3)
    return path


def output(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def test_record_reads_as_the_runs_that_it_was_written_from(runs_folder, record, capsys, tmp_path):
    tables = [output(capsys, source)[1] for source in (runs_folder, record)]
    assert tables[0] == tables[1]
    panels = [pictures(read([source])[0]) for source in (runs_folder, record)]
    assert [panel.name for panel in panels[0]] == [panel.name for panel in panels[1]]
    for of_runs, of_record in zip(*panels, strict=True):
        if of_runs.picture in ("sensitivity", "budget"):
            assert of_runs == of_record
        for ours, theirs in zip(of_runs.curves, of_record.curves, strict=True):
            if of_runs.picture == "curves":  # which are recorded with six digits
                assert (ours.x, ours.y) == (pytest.approx(theirs.x, rel=1e-5), pytest.approx(theirs.y, rel=1e-5))
    again = tmp_path / "again.json"
    write_record(again, read_record(record))
    assert again.read_text() == record.read_text()


def test_record_is_small_and_names_no_folder_of_the_machine(runs_folder, record):
    text = record.read_text()
    assert str(runs_folder) not in text
    assert "run_dir" not in text
    assert len(text) < 100_000
    curves = [run.get("curves") for run in json.loads(text)["runs"]]
    assert all(len(columns["update"]) == 12 for columns in curves if columns)
    assert sum(columns is not None for columns in curves) == 2 * 4 * 3


def test_long_curves_are_thinned_and_keep_their_end(tmp_path):
    write_run(tmp_path / "run", "own", "sgd", 1, 0.1, epochs=1001)
    write_record(tmp_path / "long.json", read_runs(tmp_path / "run")[0])
    (run,) = read_record(tmp_path / "long.json")
    epochs = [line["epoch"] for line in run.evaluations]
    assert len(epochs) <= MOST_POINTS
    assert epochs[-1] == 1001
    assert len({after - before for before, after in zip(epochs, epochs[1:], strict=False)}) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "configs": [], "environments": [], "runs": []}',
        '{"format": 1, "runs": 5}',
        "\xff",
    ],
)
def test_other_files_are_no_records(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"other\.json: (not )?a record") as caught:
        main([str(path)])
    assert "\n" not in str(caught.value)


def test_nothing_complete_is_nothing_to_record(tmp_path):
    write_run(tmp_path / "run", "own", "sgd", 1, 0.1)
    (tmp_path / "run/result.json").unlink()
    with pytest.raises(UserError, match="no run is complete"):
        main([str(tmp_path / "run"), "--record", str(tmp_path / "own.json")])
    assert not (tmp_path / "own.json").exists()


def test_marked_tables_are_written_anew_and_the_rest_is_left(record, tmp_path, capsys):
    document = record.parent.parent / "page.md"
    kinds = ("results", "comparison")
    parts = [f"<!-- table results/all.json {kind} -->\nold\n<!-- end of table -->" for kind in kinds]
    document.write_text("# Title\n\n" + "\n\nbetween\n\n".join(parts) + "\n\nend\n")
    assert updated(document, document.read_text(), render) != document.read_text()
    output(capsys, "--update", document)
    text = document.read_text()
    assert updated(document, text, render) == text
    assert "\nold\n" not in text
    assert text.startswith("# Title\n\n<!-- table results/all.json results -->\nimages: ")
    assert text.endswith("<!-- end of table -->\n\nend\n")
    assert text.count("| apollo | milestone |") == 4
    changed = text.replace("| apollo | milestone | 9", "| apollo | milestone | 8")
    assert changed != text
    assert updated(document, changed, render) == text
    document.write_text(parts[0].replace(" results -->", " everything -->"))
    with pytest.raises(UserError, match="table of kind 'everything'; valid: results, comparison, searched, rates"):
        main(["--update", str(document)])


def test_table_of_optimizers_that_were_tuned(tmp_path, capsys):
    for table, metric, rows in (("grammar", "fairseq_bleu", ["sgd"]), ("digits", "top1", ["apollo", "sgd"])):
        for row in rows:
            write_search(tmp_path / "runs", table, row, metric)
            for seed in (1, 101, 201):
                rate = METHODS[row] * (1 if table == "digits" else 2)
                write_run(tmp_path / f"runs/{table}/{row}_milestone/seed{seed}", table, row, seed, rate, metric)
    record, document = tmp_path / "tuned.json", tmp_path / "page.md"
    document.write_text("<!-- table tuned.json searched -->\n<!-- end of table -->\n")
    output(capsys, tmp_path / "runs", "--record", record, "--update", document)
    runs = read_record(record)
    assert render(runs, "searched") in document.read_text()
    header, rule, sgd, apollo, *about = (
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in render(runs, "searched").splitlines()
    )
    assert header == ["optimizer", "command", "digits (top1)", "grammar (fairseq_bleu)"]
    assert (sgd[0], apollo[0], apollo[3]) == ("sgd", "apollo", "-")
    finals = [run.result.final for run in runs if (run.table, run.row, run.trial) == ("digits", "sgd", None)]
    assert sgd[2] == f"{mean(finals):.2f} ({stdev(finals):.2f}, 3); 0.1 of 9"
    assert sgd[3].endswith("3); 0.2 of 9")
    # The command makes a config with the settings of the run.
    path, *overrides = shlex.split(sgd[1].strip("`").partition("classification.train ")[2])
    config = load_settings("classification", path, [text for text in overrides if text != "data.name=synthetic"])
    assert (config.row, config.batch, config.optimizer.settings) == ("sgd", 128, {"lr": 0.1, "weight_decay": 0.0005})
    assert config.schedule.settings == {"milestones": [8, 10], "decay_rate": 0.1}


def test_table_of_rates_has_a_line_for_each_recipe(tmp_path):
    for row in ("sgd", "apollo"):
        write_search(tmp_path / "usual", "words", row, "ppl")
    write_run(tmp_path / "long/words/search/sgd/trial0", "words", "sgd", 7, METHODS["sgd"], "ppl", epochs=24)
    runs, _ = read_runs(tmp_path / "usual", tmp_path / "long")
    write_record(tmp_path / "record.json", sorted(runs, key=lambda run: len(run.folder.parts), reverse=True))
    text = render(read_record(tmp_path / "record.json"), "rates")
    header, rule, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:5])
    assert header == ["trials", "0.003", "0.01", "0.03", "0.1", "0.3", "1", "3", "10"]
    assert [line[0] for line in lines] == ["words: sgd", "words: sgd, epochs=24", "words: apollo"]
    of_line = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    trials = [run for run in runs if run.row == "sgd" and run.config["epochs"] == 12 and run.rate == METHODS["sgd"]]
    assert len(trials) == 3  # three weight decays
    assert of_line["words: sgd"]["0.1"] == f"{min(run.result.validation for run in trials):.2f}"
    assert [key for key, value in of_line["words: sgd, epochs=24"].items() if value][1:] == ["0.1"]
    assert of_line["words: sgd"]["3"] == "×"
    assert of_line["words: sgd"]["10"] == ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_in_the_documents_are_those_of_their_records(document):
    text = document.read_text()
    command = f"python -m scripts.report --update {document.relative_to(ROOT)}"
    assert updated(document, text, render) == text, f"a table is not that of its record: {command}"
    assert text.count("\n<!-- table ") == text.count("\n<!-- end of table -->")


def edit_metrics(folder, change):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "epoch":
            change(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_run_beside_a_record_says_where_it_leaves_the_band(record, tmp_path, capsys):
    folder = tmp_path / "run"
    write_run(folder, "images", "apollo", 5, METHODS["apollo"])
    status, text = output(capsys, folder, "--reference", record)
    assert status == 0
    assert f"{folder}: test_top1 within the band of the record's 3 seeds up to update 1200" in text

    def worse(line):
        if line["epoch"] >= 6 or line["epoch"] == 3:  # one evaluation alone is no departure
            line["test_top1"] -= 40

    edit_metrics(folder, worse)
    (folder / "result.json").unlink()
    out = tmp_path / "out"
    status, text = output(capsys, folder, "--reference", record, "--out", out)
    assert status == 1
    assert f"{folder}: test_top1 left the band at update 600: " in text
    assert f"{folder}: train_loss within the band" in text
    assert (out / "images_apollo-milestone_reference.png").exists()
    assert "seed 5" in (out / "images-apollo-milestone_reference_test-accuracy.csv").read_text()


def test_run_that_cannot_be_compared_says_why(record, tmp_path, capsys):
    write_run(tmp_path / "other", "elsewhere", "sgd", 1, 0.1)
    write_run(tmp_path / "rate", "images", "sgd", 1, 0.2)
    status, text = output(capsys, tmp_path, "--reference", record)
    assert f"{tmp_path / 'other'}: the record has no runs of elsewhere sgd milestone" in text
    assert f"{tmp_path / 'rate'}: other settings than the record's: optimizer.lr" in text
    single = tmp_path / "single.json"
    write_record(single, read_runs(tmp_path / "rate")[0])
    assert "one seed makes no band" in output(capsys, tmp_path / "rate", "--reference", single)[1]


def test_run_without_values_of_a_curve_is_drawn_without_it(record, tmp_path, capsys):
    write_run(tmp_path / "run", "images", "apollo", 5, METHODS["apollo"])
    edit_metrics(tmp_path / "run", lambda line: line.update(train_loss=None))
    drawn = tmp_path / "curves.png"
    text = output(capsys, tmp_path / "run", "--reference", record, "--plot", drawn, "--out", tmp_path / "out")[1]
    assert "train_loss cannot be compared with the record: no update in common" in text
    assert "test_top1 within the band" in text
    assert drawn.exists()


def make_trained(folder, average=False):
    """A complete run with a checkpoint; of translation, with weights kept for averaging and tied ones among them."""
    write_run(folder, "grammar", "sgd", 1, 0.1, "fairseq_bleu")
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "embedding": shared,
        "output": shared,
        "kernel": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
    }
    extra = {"vocabulary": "abc" if average else None}
    write_checkpoint(folder, {"model": state, "progress": {"update": 1200}, "extra": extra}, keep=1)
    if average:
        with open(folder / "config.yaml", "a") as file:
            file.write("average: {every: 10, last: 2}\n")
        (folder / "codec.json").write_text("{}")
        for update in (10, 20, 30):
            model = torch.nn.Linear(2, 2)
            keep_weights(folder, update, model, "abc", last=3)
    return state


@pytest.mark.parametrize("average", [False, True])
def test_bundle_has_the_weights_and_the_checksums(tmp_path, capsys, average):
    state = make_trained(tmp_path / "run", average)
    status, text = output(capsys, "--bundle", tmp_path / "run", "--out", tmp_path / "release")
    folder = tmp_path / "release/grammar_sgd_milestone_seed1"
    assert (status, text) == (0, f"bundle: {folder}\n")
    expected = average_weights(tmp_path / "run", 2, "abc")[0] if average else state
    weights = load_file(folder / "weights.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    with safe_open(folder / "weights.safetensors", "pt") as file:
        about = file.metadata()
    assert (about["row"], about["update"]) == ("sgd", "1200")
    assert about.get("averaged_updates") == ("20 30" if average else None)
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    copied = {"config.yaml", "environment.json", "metrics.jsonl", "result.json"} | (
        {"codec.json"} if average else set()
    )
    assert all((folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes() for name in copied)
    assert sums.keys() == copied | {"weights.safetensors"}
    assert (folder / "weights.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(UserError, match="exists already"):
        main(["--bundle", str(tmp_path / "run"), "--out", str(tmp_path / "release")])


@pytest.mark.parametrize(
    ("missing", "message"), [("result.json", "a run that has ended"), ("checkpoint.pt", "neither a checkpoint nor")]
)
def test_bundle_needs_a_complete_run_with_weights(tmp_path, missing, message):
    make_trained(tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    with pytest.raises(UserError, match=message):
        main(["--bundle", str(tmp_path / "run"), "--out", str(tmp_path / "release")])
    assert not (tmp_path / "release").exists()
