"""The report's statistics against scipy and against counting out every case, and the numbers behind its pictures."""

import csv
import json
import math
import random
import re
from io import StringIO
from itertools import permutations
from pathlib import Path
from statistics import mean

import pytest
import scipy.stats
from report_runs import EPOCHS, METHODS, UPDATES_PER_EPOCH, write_run, write_search

from scripts.protocol import rounded
from scripts.report import main, read
from scripts.reporting.drawing import draw_all
from scripts.reporting.pictures import grid_of, pictures, styles
from scripts.reporting.statistics import expected_best, interval, welch
from scripts.runs import read_runs

ROOT = Path(__file__).parent.parent
SEEDS = (1, 101, 8191)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Two tables, of accuracy and of perplexity, each with a search and three final runs a method."""
    top = tmp_path_factory.mktemp("report")
    for table, metric in (("images", "top1"), ("words", "ppl")):
        for row, rate in METHODS.items():
            write_search(top, table, row, metric)
            for seed in SEEDS:
                write_run(top / table / f"{row}_milestone/seed{seed}", table, row, seed, rate, metric)
    return top


@pytest.fixture(scope="module")
def panels(runs_folder):
    return pictures(read([runs_folder])[0])


def find(panels, place, picture, **values):
    (panel,) = [
        panel
        for panel in panels
        if (panel.place, panel.picture) == (place, picture) and all(getattr(panel, k) == v for k, v in values.items())
    ]
    return panel


def of(panel, method):
    return next(curve for curve in panel.curves if curve.method == method)


@pytest.mark.parametrize("seed", range(20))
def test_intervals_and_welch_agree_with_scipy_on_random_data(seed):
    draw = random.Random(seed)
    a, b = ([draw.gauss(draw.uniform(-3, 3), 2) for _ in range(draw.randint(2, 12))] for _ in range(2))
    expected = scipy.stats.t.interval(0.95, len(a) - 1, mean(a), scipy.stats.sem(a))
    assert interval(a) == pytest.approx(expected, rel=1e-9)
    wider = scipy.stats.t.interval(0.99, len(a) - 1, mean(a), scipy.stats.tstd(a) * math.sqrt(1 + 1 / len(a)))
    assert interval(a, 0.99, more=1) == pytest.approx(wider, rel=1e-9)
    test = scipy.stats.ttest_ind(a, b, equal_var=False)
    ends = test.confidence_interval(0.95)
    assert welch(a, b) == pytest.approx((mean(a) - mean(b), ends.low, ends.high, test.pvalue), rel=1e-9)


def test_too_few_or_infinite_values_have_no_interval_and_no_test():
    assert interval([1.0]) is None
    assert interval([1.0, math.inf]) is None
    assert welch([1.0, 2.0], [1.0]) is None
    assert welch([1.0, 1.0], [2.0, 2.0]) is None


@pytest.mark.parametrize("lower_is_better", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_expected_best_is_the_mean_over_all_orders_of_the_trials(seed, lower_is_better):
    draw = random.Random(seed)
    trials = [(draw.randint(0, 4), draw.random()) for _ in range(6)]  # so few values that some tie
    choose = min if lower_is_better else max
    best = [0.0] * 6
    for order in permutations(trials):
        for k in range(1, 7):
            first = choose(value for value, _ in order[:k])
            # Among trials that tie, the search takes the one that it came to first.
            best[k - 1] += next(test for value, test in order[:k] if value == first) / math.factorial(6)
    assert expected_best(trials, lower_is_better) == pytest.approx(best)
    alone = expected_best([(value, value) for value, _ in trials], lower_is_better)
    assert alone[0] == pytest.approx(mean(value for value, _ in trials))
    assert alone[-1] == choose(value for value, _ in trials)


def test_sensitivity_is_over_the_chosen_rate_with_diverged_trials_as_crosses(runs_folder, panels):
    panel = find(panels, "images", "sensitivity")
    trials = read_runs(runs_folder / "images/search/apollo")[0]
    grid, others = (curve for curve in panel.curves if curve.method == "apollo")
    assert grid.x == pytest.approx([10 ** (step / 2) for step in range(-3, 4)])
    by_rate = {trial.rate: trial.result.validation for trial in grid_of(trials) if not trial.result.diverged}
    assert grid.y == [by_rate.get(rate) for rate in sorted(trial.rate for trial in grid_of(trials))]
    assert [index for index, value in enumerate(grid.y) if value is None] == [6]
    assert [x for x, _ in grid.crosses] == [grid.x[6]]
    assert all(y < min(value for value in grid.y if value is not None) for _, y in grid.crosses)
    assert others.points
    assert others.x == [1.0, 1.0]  # the two that vary the decay, at the chosen rate
    worse = find(panels, "words", "sensitivity")
    assert all(y > max(v for v in curve.y if v is not None) for curve in worse.curves for _, y in curve.crosses)


def test_grid_may_keep_the_product_of_rate_and_decay(tmp_path):
    """Up to the three digits to which scripts/protocol.py rounds both."""
    rates = [rounded(0.01 * 10 ** (step / 2)) for step in range(-2, 3)]
    for rate in rates:
        write_run(tmp_path / "own/search/sgd" / f"{rate:g}", "own", "sgd", 7, rate, decay=rounded(5e-6 / rate))
    for decay in (1e-4, 2.5e-3):
        write_run(tmp_path / "own/search/sgd" / f"decay{decay}", "own", "sgd", 7, 0.01, decay=decay)
    grid = grid_of(read_runs(tmp_path)[0])
    assert sorted(trial.rate for trial in grid) == pytest.approx(rates)
    assert all(not trial.trial.startswith("decay") for trial in grid)


def test_budget_starts_at_the_mean_and_ends_at_the_best_trial(runs_folder, panels):
    trials = read_runs(runs_folder / "images/search/adam")[0]
    values = [trial.result.validation for trial in trials]
    best = of(find(panels, "images", "budget", y_label="expected best validation accuracy (%)"), "adam")
    assert best.x == list(range(1, 10))
    assert best.y[0] == pytest.approx(mean(values))
    assert best.y[-1] == max(values)
    tested = of(find(panels, "images", "budget", y_label="expected test accuracy (%) of that choice"), "adam")
    assert tested.y[-1] == max(trials, key=lambda trial: trial.result.validation).result.final
    perplexity = of(find(panels, "words", "budget", y_label="expected best validation perplexity"), "adam")
    assert perplexity.y[0] is None  # the one trial may be the diverged one
    assert perplexity.y[1] is not None


@pytest.mark.parametrize(("place", "key", "better"), [("images", "test_top1", max), ("words", "test_ppl", min)])
@pytest.mark.parametrize(("by", "column"), [("updates", "update"), ("seconds", "wall_s")])
def test_levels_are_reached_when_every_seed_has_reached_them(runs_folder, panels, place, key, better, by, column):
    curve = of(find(panels, place, "levels", by=by), "radam")
    runs = read_runs(runs_folder / place / "radam_milestone")[0]
    assert len(runs) == len(SEEDS)
    for level, time, low, high in zip(curve.x, curve.y, curve.low, curve.high, strict=True):
        firsts = [
            next((line[column] for line in run.evaluations if better(line[key], level) == line[key]), None)
            for run in runs
        ]
        if None in firsts:
            assert (time, low, high) == (None, None, None)
        else:
            assert time == pytest.approx(mean(firsts))
            ends = interval(firsts)
            assert (low, high) == pytest.approx((max(ends[0], 0), ends[1]))
    assert None in curve.y  # the best level of another method or seed
    first = curve.y.index(None)
    assert curve.notes[first].startswith("never by ")
    assert [x for x, _ in curve.crosses] == [curve.x[first]]


def test_curves_are_means_in_a_band_from_lowest_to_highest(runs_folder, panels):
    runs = read_runs(runs_folder / "words/sgd_milestone")[0]
    curve = of(find(panels, "words", "curves", y_label="test perplexity", by="updates"), "sgd")
    assert curve.x == [UPDATES_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
    at_end = [run.evaluations[-1]["test_ppl"] for run in runs]
    assert (curve.y[-1], curve.low[-1], curve.high[-1]) == pytest.approx((mean(at_end), min(at_end), max(at_end)))
    over_time = of(find(panels, "words", "curves", y_label="test perplexity", by="seconds"), "sgd")
    assert over_time.x == [line["wall_s"] for line in runs[0].evaluations]
    assert over_time.y == curve.y


def test_methods_look_alike_in_all_panels(panels):
    look = styles(panels)
    assert look["apollo"].name == "Apollo"
    assert len({style.colour for style in look.values()}) == len(METHODS)


def test_csv_has_every_number(panels):
    panel = find(panels, "images", "levels", by="updates")
    rows = list(csv.DictReader(StringIO(panel.csv())))
    assert len(rows) == sum(len(curve.x) for curve in panel.curves)
    curve = panel.curves[0]
    assert [row["updates"] for row in rows[: len(curve.x)]] == ["" if y is None else str(y) for y in curve.y]
    assert [float(row["test accuracy (%)"]) for row in rows[: len(curve.x)]] == curve.x


def test_command_writes_pictures_tables_and_a_page_that_needs_no_network(runs_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "runs/theirs").mkdir(parents=True)
    (tmp_path / "runs/theirs/config.yaml").write_text("model: </script><b>\n")
    page, out = tmp_path / "pages/all.html", tmp_path / "out"
    assert main([str(runs_folder / "images"), str(tmp_path / "runs"), "--html", str(page), "--out", str(out)]) == 0
    for picture in ("curves", "levels", "sensitivity", "budget"):
        assert (out / f"images_{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"images_{picture}.pdf").read_bytes().startswith(b"%PDF")
        assert "</svg>" in (out / f"images_{picture}.svg").read_text()
    assert "| apollo | milestone |" in (out / "tables.md").read_text()
    assert len(list(out.glob("*.csv"))) == 9

    text = page.read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*\s(src|href)=|@import|\[\[\w+\]\]<", text)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    drawn = {panel["name"]: panel for panel in data["panels"]}
    for panel in pictures(read([runs_folder / "images"])[0]):
        assert [curve["y"] for curve in drawn[panel.name]["curves"]] == [curve.y for curve in panel.curves]
    assert text.count("<figure data-panel=") == len(drawn) == 9
    body = text[text.index("<main>") : text.index("</main>")]
    for part in ("<td>weight_decay=0.0025</td>", "a processor, 2 cores", "optimizer.lr", "theirs/config.yaml"):
        assert part in body


def test_drawing_twice_gives_the_same_files(panels, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        draw_all([find(panels, "words", "sensitivity")], folder)
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert len(first) == 4
    assert first == second
