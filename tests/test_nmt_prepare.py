"""From parallel text to prepared data: the data holds what the text holds, and every error is noticed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.files import hold
from nmt.codec import Codec
from nmt.prepare import raw_text, stages
from nmt.prepare.command import main, prepare, prepare_grammar, verify
from nmt.prepare.raw_text import scan, scan_pair
from nmt.prepare.recipes import GRAMMAR, WMT14, Recipe
from nmt.prepare.toy_text import generate
from nmt.prepared import finished
from nmt.text import moses

SIZES = {"train": 400, "valid": 30, "test": 30}
RECIPE = Recipe("own", ("train",), "valid", "test", merges=200, ratio=2.0)


def write(path, lines):
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


@pytest.fixture
def text(tmp_path):
    pairs = iter(generate(sum(SIZES.values())))
    for split, size in SIZES.items():
        for language, lines in zip(("en", "de"), zip(*(next(pairs) for _ in range(size)), strict=True), strict=True):
            write(tmp_path / f"{split}.{language}", lines)
    return tmp_path


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(raw_text, "CHUNK", 32)
    monkeypatch.setattr(stages, "CHUNK", 32)


def lines_of(folder, split, language, codec):
    """The tokens of each sentence, read from the arrays without the package's readers."""
    entry = json.loads((folder / "manifest.json").read_text())["splits"][split][language]
    ids = np.fromfile(folder / f"{split}.{language}.bin", f"<u{entry['token_bytes']}")
    offsets = np.fromfile(folder / f"{split}.{language}.offsets", "<i8")
    assert offsets[0] == 0 and offsets[-1] == len(ids) == entry["tokens"]
    return [codec.decode_tokens(ids[begin:end]) for begin, end in zip(offsets, offsets[1:], strict=False)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def command(text, out, *more):
    prefixes = [word for split in SIZES for word in (f"--{split}", str(text / split))]
    arguments = ["files", str(out), "--name", "own", "--merges", "200", *prefixes, *more]
    return [sys.executable, "-m", "nmt.prepare", *arguments]


def test_what_comes_out_is_what_went_in(text, small_chunks):
    prepare(RECIPE, text, text / "out")
    codec = Codec.load(text / "out")
    manifest = finished(text / "out")
    for split, size in SIZES.items():
        for language in ("en", "de"):
            raw = (text / f"{split}.{language}").read_text(encoding="utf-8").splitlines()
            kept = lines_of(text / "out", split, language, codec)
            assert kept == [moses(language).tokenize(line) for line in raw] and len(kept) == size
            if split != "train":
                assert (text / "out" / f"{split}.{language}.txt").read_text(encoding="utf-8").splitlines() == raw
        assert manifest["splits"][split]["lines"]["read"] == manifest["splits"][split]["pairs"] == size
    assert manifest["recipe"] == "own" and manifest["vocabulary"] == codec.size and manifest["codec"] == codec.digest
    assert list(manifest["inputs"]["train"][0]) == ["train.en", "train.de"]
    assert not (text / "out" / "work").exists()
    assert verify(text / "out") == []


def test_neither_chunks_nor_processes_change_the_outcome(text, monkeypatch):
    prepare(RECIPE, text, text / "whole")
    prepare(RECIPE, text, text / "parallel", workers=2)
    monkeypatch.setattr(raw_text, "CHUNK", 32)
    monkeypatch.setattr(stages, "CHUNK", 32)
    prepare(RECIPE, text, text / "chunks")
    assert files_of(text / "whole") == files_of(text / "parallel") == files_of(text / "chunks")


def test_filters(text):
    """They count pieces. The BPE is learned on all pairs, also on those that the filters leave out."""
    letters = "".join(random.Random(0).choices("adehinrst", k=900))  # one word, and too many pieces
    single = "xyxy"  # occurs in pairs alone that are left out: the BPE has a piece for it
    more = [
        ("", "Leer."), ("Empty.", ""), ("", ""), (" \t ", "\u3000"), ("a " * 251, "b " * 251), (letters, "Wort"),
        *[("", f"{single} {single}")] * 9, ("a b", "a a a b b"), ("a a a b b", "a b"), ("a", "a b"),
    ]  # fmt: skip
    fine = [("a a", "a b b"), ("a " * 250, "b " * 250)]
    ratio = Recipe("own", ("train",), "valid", "test", merges=200, ratio=1.5)
    pairs = [("a dog", "a dog")] * 50 + more + fine
    for language, lines in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
        write(text / f"train.{language}", lines)
    prepare(ratio, text, text / "out")
    entry = finished(text / "out")["splits"]["train"]
    assert entry["lines"] == {"read": 70, "not_empty": 57, "within_length": 55, "within_ratio": 52}
    assert entry["pairs"] == 52
    codec = Codec.load(text / "out")
    assert lines_of(text / "out", "train", "de", codec)[50:] == ["a b b", " ".join("b" * 250)]
    assert len(codec.encode_lines([single])[0]) == 1 and len(codec.encode_lines([letters])[0]) > 250


def test_lines_end_with_a_newline_and_nothing_else(text):
    """Common Crawl holds other separators inside sentences. They must not put the two sides out of step."""
    inside = "one\rtwo\x0cthree\x85four\u2028five\x1csix"
    write(text / "test.en", [inside, "Windows.\r"])
    (text / "test.de").write_bytes(b"eins zwei drei vier f\xc3\xbcnf sechs\nOhne Ende.")
    prepare(RECIPE, text, text / "out")
    assert finished(text / "out")["splits"]["test"]["pairs"] == 2
    assert (text / "out" / "test.en.txt").read_bytes().decode() == f"{inside}\nWindows.\n"
    assert (text / "out" / "test.de.txt").read_bytes().decode().endswith("\nOhne Ende.\n")


def test_empty_lines_are_kept_where_they_are_evaluated(text):
    write(text / "valid.en", ["", "A dog.", "Two."])
    write(text / "valid.de", ["Leer.", "", "Winter."])
    prepare(RECIPE, text, text / "out")
    codec = Codec.load(text / "out")
    assert lines_of(text / "out", "valid", "de", codec) == ["Leer .", "", "Winter ."]
    assert (text / "out" / "valid.en.txt").read_text() == "\nA dog.\nTwo.\n"


@pytest.mark.parametrize("lines", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("end", ["", "\n"])
def test_chunks_are_the_file(tmp_path, small_chunks, monkeypatch, lines, end):
    monkeypatch.setattr(raw_text, "BLOCK", 7)
    content = [f"Zeile {number} ä" * (number % 5) for number in range(lines - 1)] + ["ende"]
    (tmp_path / "file").write_bytes(("\n".join(content) + end).encode())
    file = scan(tmp_path / "file")
    assert file.lines == lines and file.chunks == -(-lines // 32)
    assert [line for chunk in range(file.chunks) for line in file.read(chunk)] == content


def fails(recipe, text, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(recipe, text, text / "out")
    assert "\n" not in str(error.value)


def test_sides_of_different_length(text):
    write(text / "train.de", ["nur eine Zeile"])
    fails(RECIPE, text, r"train\.en has 400 lines and train\.de 1: the two sides must match line by line")


def test_not_utf_8(text, small_chunks):
    lines = (text / "train.de").read_bytes().split(b"\n")
    lines[76] = "größer".encode("latin-1")
    (text / "train.de").write_bytes(b"\n".join(lines))
    fails(RECIPE, text, r"train\.de, line 77 is not UTF-8 \(byte 0xf6\): convert the file")


def test_missing_and_empty_files(text):
    (text / "valid.de").unlink()
    fails(RECIPE, text, r"no valid\.de in .*: looked for valid\.de; what is there: valid\.en")
    (text / "valid.de").touch()
    fails(RECIPE, text, r"valid\.de is empty")


def test_a_10000_word_line_is_no_sentence_to_evaluate_on(text):
    lines = (text / "valid.en").read_text().splitlines()
    write(text / "valid.en", [*lines[:-1], " ".join(["word"] * 10_000)])
    fails(RECIPE, text, r"valid\.en, line 30: 10,000 words on one side are no sentence to evaluate on")
    write(text / "valid.en", [*lines[:-1], "hd" * 2500])
    fails(RECIPE, text, r"unfinished preparation of other data")
    (text / "out" / "work" / "task.json").unlink()
    fails(RECIPE, text, r"valid\.en, line 30: \d,\d+ pieces on one side")


def test_nothing_left(text):
    for language in ("en", "de"):
        write(text / f"train.{language}", ["", " "])
    fails(RECIPE, text, "the training files hold no text: every line is empty")
    write(text / "train.en", ["", "One."])
    write(text / "train.de", ["Eins.", ""])
    (text / "out" / "work" / "task.json").unlink()
    fails(RECIPE, text, "no pair of train is left after the filter: are these the two sides")


def test_languages_without_rules(text):
    fails(Recipe("own", ("train",), "valid", "test", 200, 2.0, target="fr"), text, "no tokenization rules .* 'fr'")


def test_the_filtered_newstest_is_told_from_the_full_one(tmp_path):
    for language in ("en", "de"):
        write(tmp_path / f"newstest2014.{language}", ["line"] * 2737)
    with pytest.raises(UserError, match=r"2,737 lines, not the 3,003 .* that is the filtered test set"):
        scan_pair([tmp_path / f"newstest2014.{side}" for side in ("en", "de")], WMT14.lines["newstest2014"])


def test_wmt14_demands_its_own_line_counts(text):
    names = {"train": WMT14.train[0], "valid": WMT14.valid, "test": WMT14.test}
    for split, name in names.items():
        for language in ("en", "de"):
            (text / f"{split}.{language}").rename(text / f"{name}.{language}")
    for name in WMT14.train[1:]:
        for language in ("en", "de"):
            write(text / f"{name}.{language}", ["line"])
    fails(WMT14, text, r"newstest2014\.en has 30 lines, not the 3,003 of the published file")


def test_a_name_of_ours_is_refused(text):
    with pytest.raises(UserError, match="--name grammar is the name of a recipe"):
        main([*command(text, text / "out")[3:], "--name", "grammar"])


def test_a_finished_preparation_is_left_alone(text):
    prepare(RECIPE, text, text / "out")
    before = {path: path.stat().st_mtime_ns for path in (text / "out").iterdir() if path.name != ".lock"}
    prepare(RECIPE, text, text / "out")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    fails(
        Recipe("own", ("train",), "valid", "test", 100, 2.0),
        text,
        "already holds other data, or data of other settings",
    )
    write(text / "test.en", ["Other text."] * 30)
    fails(RECIPE, text, "already holds other data")


def test_an_edit_of_equal_length_is_noticed(text):
    prepare(RECIPE, text, text / "out")
    file = text / "train.en"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(file.read_bytes().replace(b"the", b"teh", 1))
    os.utime(file, ns=times)
    fails(RECIPE, text, "already holds other data")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the files' names in /proc")
def test_a_file_is_on_the_disk_before_another_says_that_it_is_whole(text, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace

    def noted_sync(file):
        events.append(f"on disk: {os.path.basename(os.readlink(f'/proc/self/fd/{file}'))}")
        sync(file)

    def noted_replace(temporary, path):
        events.append(f"named: {os.path.basename(path)}")
        replace(temporary, path)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    prepare(RECIPE, text, text / "out")
    for split, entry in finished(text / "out")["splits"].items():
        for name in entry["sha256"]:
            assert events.index(f"on disk: {name}") < events.index("named: manifest.json")
        for language in ("en", "de"):
            tokens = f"on disk: {split}.00000.{language}"
            assert events.index(tokens) < events.index(f"named: {split}.00000.json")


def test_verify_names_what_is_damaged(text):
    out = text / "out"
    prepare(RECIPE, text, out)
    content = bytearray((out / "train.de.bin").read_bytes())
    content[100] ^= 1
    (out / "train.de.bin").write_bytes(content)
    (out / "valid.en.txt").unlink()
    assert verify(out) == [f"{out}/train.de.bin has changed", f"{out}/valid.en.txt is missing"]
    assert main(["verify", str(out)]) == 1
    (out / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        verify(out)
    with pytest.raises(UserError, match="no finished preparation"):
        verify(text)


def test_the_command_prints_one_line_and_returns_2(text):
    write(text / "test.de", ["Zu wenig."])
    done = subprocess.run(command(text, text / "out"), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "30 lines and test.de 1" in errors[0]


def prepare_until(moment, text):
    """Prepare in a process that kills itself at the call of the given number."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = iter(range(moment))

    def counted(function):
        def call(*arguments, **settings):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)

        return call

    os.replace, Path.write_text = counted(os.replace), counted(Path.write_text)
    stages.encode_chunk = counted(stages.encode_chunk)
    prepare(RECIPE, text, text / "out")
    os._exit(0)


def test_killed_again_and_again_it_ends_with_the_same(text, small_chunks):
    """Killed at every stage: before the tokens, their counts and the codec, between the ids, before the manifest."""
    prepare(RECIPE, text, text / "whole")
    statuses, chunks = [], []
    while not statuses or statuses[-1]:
        assert finished(text / "out") is None if statuses else True
        statuses.append(prepare_until(8 + len(statuses), text))
        chunks.append(len(list((text / "out" / "work").glob("*.json"))))
    assert statuses[:-1] == [-signal.SIGKILL] * (len(statuses) - 1) and len(statuses) > 6
    assert chunks[0] < chunks[1] < chunks[2]
    assert files_of(text / "out") == files_of(text / "whole")


def test_killed_at_any_time_it_continues_and_leaves_nobody_behind(text):
    write(text / "train.en", [f"Dog {number}" for number in range(12_000)])  # two chunks
    write(text / "train.de", [f"Hund {number}" for number in range(12_000)])
    out = text / "out"
    process = subprocess.Popen(command(text, out, "--workers", "2"), stderr=subprocess.DEVNULL)
    while not list((out / "work").glob("train.*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    with pytest.raises(UserError, match="another process is preparing data there"):
        prepare(RECIPE, text, out)
    process.kill()
    process.wait()
    assert finished(out) is None
    prepare(RECIPE, text, out)
    assert verify(out) == []
    prepare(RECIPE, text, text / "whole")
    assert files_of(out) == files_of(text / "whole")
    deadline = time.monotonic() + 10
    while alive := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, f"{alive} live on"
        time.sleep(0.05)


def test_an_unfinished_preparation_of_other_data_is_not_continued(text, small_chunks):
    assert prepare_until(8, text) == -signal.SIGKILL
    write(text / "test.en", ["Other text."] * 30)
    fails(RECIPE, text, "unfinished preparation of other data or settings: delete it to begin anew")


def test_two_at_once(text):
    """The second one is refused, or waits if it asks to wait."""
    (text / "out").mkdir()
    reader, writer = os.pipe()
    if not (child := os.fork()):
        with hold(text / "out", "preparing data"):
            os.write(writer, b"!")
            time.sleep(0.5)
        os._exit(0)
    os.read(reader, 1)
    fails(RECIPE, text, "another process is preparing data there")
    prepare(RECIPE, text, text / "out", wait=True)
    os.waitpid(child, 0)
    assert verify(text / "out") == []


def test_the_default_data_is_the_same_everywhere(tmp_path):
    prepare_grammar(tmp_path / "grammar")
    manifest = finished(tmp_path / "grammar")
    assert manifest["recipe"] == GRAMMAR.name
    assert [manifest["splits"][name]["pairs"] for name in ("train", "valid", "test")] == [8000, 500, 500]
    digests = {name: entry["sha256"] for pair in manifest["inputs"]["train"] for name, entry in pair.items()}
    assert {name: digest[:16] for name, digest in digests.items()} == {
        "train.en": "56511ebab0bc4ba2",
        "train.de": "674fd7991c8ac06a",
    }
    splits = [set((tmp_path / "grammar" / "text" / f"{name}.en").read_text().splitlines()) for name in SIZES]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 9000
    assert manifest["splits"]["test"]["de"]["unknown"] == 0
