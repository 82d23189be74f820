"""Preparing a corpus: the published encoder's output, restarts after kills, and clear errors for bad input."""

import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_corpus import HELD_OUT, TEST_FILES, TRAIN, encode_line_by_line, make_corpus, make_vocabulary

from engine.errors import UserError
from language_model import benchmark, raw_text, vocabulary
from language_model.prepare import build, main
from language_model.prepared import open_corpus, token_dtype
from language_model.vocabulary import Vocabulary, count_words, counted_vocabulary, load_vocabulary, read_vocabulary

WORDS = ["<S>", "the", "a", "<UNK>", "of", "caf\u00e9", ".", "</S>"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    build(corpus, out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.json", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def sentences(shard) -> list[list[int]]:
    tokens, offsets = shard.read()
    return [tokens[start:stop].tolist() for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]


@given(
    st.lists(
        st.text(alphabet=" \t\r\n\0a.\u00a0\u2028\x1c\x0b\x85", max_size=8) | st.sampled_from([*WORDS, " ", "\n"]),
        max_size=30,
    ).map("".join)
)
def test_encoding_is_the_published_one(text):
    """Unicode's line separators, tabs, lines without words, no newline at the end."""
    words = Vocabulary(WORDS, range(len(WORDS)))
    tokens, lengths = words.encode(text)
    expected = encode_line_by_line(text, {word: index for index, word in enumerate(WORDS)})
    assert tokens.tolist() == [token for sentence in expected for token in sentence]
    assert lengths.tolist() == [len(sentence) for sentence in expected]


def test_shards_hold_the_files_sentence_by_sentence(corpus, prepared):
    words = load_vocabulary(prepared / "vocabulary.txt")
    ids = {word: index for index, word in enumerate(words.words)}
    found = open_corpus(prepared)
    assert len(found.train) == 5 and len(found.test) == 1
    files = [*sorted((corpus / TRAIN).iterdir()), corpus / HELD_OUT / TEST_FILES[0]]
    for file, shard in zip(files, [*found.train, *found.test], strict=True):
        assert sentences(shard) == encode_line_by_line(file.read_text(encoding="utf-8"), ids)
        assert (shard.sentences, shard.tokens) == (200, sum(map(len, sentences(shard))))


def test_manifest_counts_what_is_there(corpus, prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    text = (corpus / HELD_OUT / TEST_FILES[0]).read_text(encoding="utf-8").split()
    words = set(load_vocabulary(prepared / "vocabulary.txt").words)
    assert manifest["test"]["files"] == [TEST_FILES[0]] and len(manifest["train"]["files"]) == 5
    assert manifest["test"]["tokens"] == len(text) + 2 * 200
    assert manifest["test"]["oov_rate"] == pytest.approx(sum(word not in words for word in text) / len(text), abs=1e-6)
    assert manifest["vocabulary"]["words"] == len(words) and manifest["dtype"] == "<u2"
    on_disk = sum(path.stat().st_size for path in (prepared / "train").glob("*.tokens"))
    assert on_disk == 2 * manifest["train"]["tokens"]


def test_counted_vocabulary_is_that_of_the_training_text(corpus, prepared):
    counts = Counter(word for file in (corpus / TRAIN).iterdir() for word in file.read_text(encoding="utf-8").split())
    words = load_vocabulary(prepared / "vocabulary.txt")
    found = dict(zip(words.words, words.counts, strict=True))
    marks = {"<S>": 1000, "</S>": 1000, "<UNK>": sum(count for count in counts.values() if count < 3)}
    assert found == {word: count for word, count in counts.items() if count >= 3} | marks
    assert list(words.counts) == sorted(words.counts, reverse=True)


def test_counting_in_little_memory_counts_the_same(corpus, tmp_path, monkeypatch):
    texts = [file.read_text(encoding="utf-8") for file in sorted((corpus / TRAIN).iterdir())]
    whole = counted_vocabulary((count_words([text]) for text in texts), 2)
    monkeypatch.setattr(vocabulary, "COUNTED_AT_ONCE", 700)
    spilled = counted_vocabulary((count_words([text]) for text in texts), 2, tmp_path)
    assert spilled.dump() == whole.dump() and not list(tmp_path.iterdir())


def test_archive_gives_what_the_folder_gives(corpus, prepared, tmp_path):
    with tarfile.open(tmp_path / "benchmark.tar.gz", "w:gz") as tar:
        for name in (HELD_OUT, TRAIN):
            tar.add(corpus / name, f"benchmark/{name}")
    build(tmp_path / "benchmark.tar.gz", tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(prepared)


def test_large_files_become_several_shards(corpus, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(raw_text, "PART_BYTES", 9_000)
    monkeypatch.setattr(raw_text, "BLOCK_BYTES", 1_000)
    with tarfile.open(tmp_path / "benchmark.tar", "w") as tar:
        tar.add(corpus, "benchmark")
    for name, text in (("folder", corpus), ("archive", tmp_path / "benchmark.tar")):
        build(text, tmp_path / name)
    assert content(tmp_path / "folder") == content(tmp_path / "archive")
    cut, whole = open_corpus(tmp_path / "folder"), open_corpus(prepared)
    assert len(cut.train) > 2 * len(whole.train) and max(shard.tokens for shard in cut.train) < 9_000
    assert [s for shard in cut.train for s in sentences(shard)] == [
        s for shard in whole.train for s in sentences(shard)
    ]


def test_ids_take_two_bytes_where_the_vocabulary_allows(corpus, tmp_path):
    assert [token_dtype(words).itemsize for words in (65_536, 65_537)] == [2, 4]
    many = make_vocabulary(tmp_path / "many.txt", [f"w{number}" for number in range(70_000)] + ["the"])
    build(corpus, tmp_path / "out", vocabulary=many)
    shard = open_corpus(tmp_path / "out").train[0]
    assert shard.read()[0].dtype.itemsize == 4
    assert int(shard.read()[0].max()) == 70_003  # </S>, without a line of its own in the file, is the last word


def test_a_vocabulary_file_is_put_in_the_order_of_counts(tmp_path):
    (tmp_path / "words").write_text("rare 1\n<S> 7\nfrequent 9\n<UNK> 3\n", encoding="utf-8")
    words = read_vocabulary(tmp_path / "words")
    assert list(words.words) == ["frequent", "<S>", "<UNK>", "rare", "</S>"]
    assert list(words.counts) == [9, 7, 3, 1, 7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"<UNK> 5\nthe 3\n", ["no line for <S>"]),
        (b"<S> 5\n</S> 5\nthe 3\n", ["no line for <UNK>"]),
        (b"<S> 5\n<UNK> 4\nthe\n", ["line 3", "'the'", "word count"]),
        (b"<S> 5\n<UNK> 4\nt\xffe 3\n", ["byte 15", "UTF-8"]),
        (None, ["No such file"]),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(corpus, tmp_path, text, words):
    path = tmp_path / "words.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError) as error:
        build(corpus, tmp_path / "out", vocabulary=path)
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_a_word_that_stands_twice_is_named_and_taken_as_published(tmp_path, caplog):
    """The published code fills a dict: a word's first line gives its place among equal counts, its last the count."""
    (tmp_path / "words").write_text("<S> 9\na 5\nb 5\nc 5\n<UNK> 4\nb 1\nc 5\na 5\ngone 0\n", encoding="utf-8")
    words = read_vocabulary(tmp_path / "words")
    counts = {}
    for line in (tmp_path / "words").read_text(encoding="utf-8").splitlines():
        counts[line.split()[0]] = int(line.split()[1])
    published = sorted(((word, count) for word, count in counts.items() if count > 0), key=lambda t: t[1], reverse=True)
    assert list(words.words) == [word for word, _ in published] + ["</S>"] == ["<S>", "a", "c", "<UNK>", "b", "</S>"]
    assert list(words.counts) == [9, 5, 5, 4, 1, 9]
    assert "3 words are there twice, and taken with the last count: 'b', 'c', 'a'" in caplog.text


def test_byte_order_marks_are_no_part_of_a_word(corpus, prepared, tmp_path):
    for file in corpus.glob("*/*"):
        (tmp_path / "text" / file.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / file.parent.name / file.name).write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    build(tmp_path / "text", tmp_path / "out")
    assert content(tmp_path / "out") == content(prepared)
    (tmp_path / "words").write_bytes(b"\xef\xbb\xbf<S> 9\n<UNK> 4\n")
    assert list(read_vocabulary(tmp_path / "words").words) == ["<S>", "<UNK>", "</S>"]


@pytest.mark.parametrize("packed", [False, True])
def test_the_undivided_held_out_text_is_not_trained_on(corpus, prepared, tmp_path, packed):
    text = tmp_path / "above" / "1-billion-word-language-modeling-benchmark-r13output"
    shutil.copytree(corpus, text)
    (text / TRAIN / "news.en-00000-of-00100").write_text("held out\n" * 100, encoding="utf-8")
    source = tmp_path / "above"
    if packed:
        source = tmp_path / "benchmark.tar.gz"
        with tarfile.open(source, "w:gz") as tar:
            tar.add(text, text.name)
    build(source, tmp_path / "out")
    assert content(tmp_path / "out") == content(prepared)


def test_a_folder_of_several_corpora_is_refused(corpus, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(corpus)
    with pytest.raises(UserError, match="holds several corpora: give one as SOURCE, e.g. .*one"):
        build(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("packed", [False, True])
def test_all_held_out_files_beside_the_first(corpus, prepared, tmp_path, packed):
    source = corpus
    if packed:
        source = tmp_path / "benchmark.tar"
        with tarfile.open(source, "w") as tar:
            tar.add(corpus, "benchmark")
    build(source, tmp_path / "out", tests=["all"])
    found, first = open_corpus(tmp_path / "out"), open_corpus(prepared)
    assert [sentences(shard) for shard in found.test] == [sentences(shard) for shard in first.test]
    assert found.facts["test"] == first.facts["test"] and first.facts["test"]["files"] == [TEST_FILES[0]]
    assert found.facts["all_test"]["files"] == list(TEST_FILES) and not first.all_test
    ids = {word: index for index, word in enumerate(load_vocabulary(tmp_path / "out" / "vocabulary.txt").words)}
    for name, shard in zip(TEST_FILES, found.all_test, strict=True):
        text = (corpus / HELD_OUT / name).read_text(encoding="utf-8")
        assert sentences(shard) == encode_line_by_line(text, ids)


def test_an_edit_of_equal_length_is_noticed(corpus, tmp_path):
    text = shutil.copytree(corpus, tmp_path / "text")
    build(text, tmp_path / "out")
    file = text / TRAIN / "news.en-00001-of-00100"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(file.read_bytes().replace(b"the", b"teh", 1))
    os.utime(file, ns=times)
    with pytest.raises(UserError, match="holds other text, or another vocabulary"):
        build(text, tmp_path / "out")


def test_counts_are_compared_with_the_benchmarks(corpus, tmp_path, caplog, monkeypatch):
    """Only a text with the benchmark's file names is compared. Here it has five files."""
    caplog.set_level(logging.WARNING)
    build(corpus, tmp_path / "few")
    missing, *test = (record.getMessage() for record in caplog.records)
    assert missing.startswith(
        "warning: 94 of the benchmark's 99 training files are not there, the first of them news.en-00006"
    )
    assert test[0].startswith(f"warning: {TEST_FILES[0]} has 200 lines, and that of the benchmark 6,075")
    caplog.clear()
    manifest = json.loads((tmp_path / "few" / "manifest.json").read_text())
    lines, words = (
        sum(shard[unit] for shard in manifest["shards"] if shard["split"] == "train") for unit in ("lines", "words")
    )
    assert (lines, words) == (1000, manifest["train"]["tokens"] - 2 * manifest["train"]["sentences"])
    monkeypatch.setattr(benchmark, "TRAIN_FILES", {file.name for file in (corpus / TRAIN).iterdir()})
    expected = {"the training text": {"lines": lines, "words": words + 7}, TEST_FILES[0]: {"lines": 200}}
    monkeypatch.setattr(benchmark, "EXPECTED", expected)
    build(corpus, tmp_path / "same")
    assert [record.getMessage() for record in caplog.records] == [
        f"warning: the training text has {words:,} words, and that of the benchmark {words + 7:,}: "
        "is it the published file?"
    ]
    caplog.clear()
    renamed = shutil.copytree(corpus, tmp_path / "renamed")
    for file in (renamed / TRAIN).iterdir():
        file.rename(file.with_name(f"own.{file.name}"))
    build(renamed, tmp_path / "own")
    assert not caplog.records


def test_the_published_archive_is_known_by_its_checksum(corpus, tmp_path, caplog, monkeypatch):
    archive = tmp_path / benchmark.ARCHIVE
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(corpus, "benchmark")
    build(archive, tmp_path / "other")
    assert f"{archive} is not the published archive, by its checksum" in caplog.text
    caplog.clear()
    monkeypatch.setattr(raw_text, "ARCHIVE_CHECKSUM", f"sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}")
    build(archive, tmp_path / "same")
    assert "published archive" not in caplog.text


def one_file(root: Path, text: bytes) -> Path:
    make_corpus(root, files=1, lines=3)
    (root / TRAIN / "news.en-00001-of-00100").write_bytes(text)
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_that_are_not_utf8_are_named(tmp_path, workers):
    text = one_file(tmp_path / "text", b"a good line\n" * 30_000 + b"a caf\xe9 .\n")
    with pytest.raises(UserError, match=r"news.en-00001-of-00100: byte 360,005 \(0xe9\) is not UTF-8"):
        build(text, tmp_path / "out", workers=workers)


def test_empty_lines_and_a_line_of_100000_words(tmp_path):
    text = one_file(tmp_path / "text", b"\n\n  \n" + b"word " * 100_000 + b"\n\n\t\nlast line\n")
    build(text, tmp_path / "out", threshold=1)
    (shard,) = open_corpus(tmp_path / "out").train
    assert np.diff(shard.read()[1]).tolist() == [100_002, 4]


def test_a_line_without_an_end_in_sight_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_text, "LINE_BYTES", 1 << 20)
    text = one_file(tmp_path / "text", b"word " * 500_000)
    with pytest.raises(UserError, match="news.en-00001-of-00100: a line of more than 1 MiB"):
        build(text, tmp_path / "out")


def test_a_source_that_lacks_something_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="nowhere is not there"):
        build(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=f"{TRAIN} is not there"):
        build(tmp_path, tmp_path / "out")
    right = shutil.copytree(corpus, tmp_path / "far" / "above" / "benchmark")
    for wrong in (right / TRAIN, right / "nowhere", tmp_path / "far"):
        with pytest.raises(UserError, match=f"is not there: .*; the nearest folder that can be SOURCE: {right}$"):
            build(wrong, tmp_path / "out")
    with pytest.raises(
        UserError,
        match="heldout-00009.* is not there: name .* --test, .* there: news.en.heldout-00000",
    ):
        build(corpus, tmp_path / "out", tests=["news.en.heldout-00009-of-00050"])
    with pytest.raises(UserError, match="train files hold no sentence"):
        build(one_file(tmp_path / "empty", b"\n \n"), tmp_path / "out")


def test_an_archive_that_is_damaged_or_lacks_something_is_refused(corpus, tmp_path):
    archive = tmp_path / "benchmark.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(corpus / TRAIN, f"benchmark/{TRAIN}")
    with pytest.raises(UserError, match=f"no {HELD_OUT}/{TEST_FILES[0]} in it"):
        build(archive, tmp_path / "out")
    os.truncate(archive, archive.stat().st_size // 2)
    with pytest.raises(UserError, match="not a whole .tar or .tar.gz .*: download it again"):
        build(archive, tmp_path / "other")


def test_a_finished_folder_is_left_alone_and_another_text_refused(corpus, prepared, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*.*")}
    build(corpus, prepared)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*.*")} == before | {
        prepared / ".lock": (prepared / ".lock").stat().st_mtime_ns
    }
    for changes in ({"threshold": 2}, {"tests": TEST_FILES}):
        with pytest.raises(UserError, match="holds other text, or another vocabulary"):
            build(corpus, prepared, **changes)


def test_missing_truncated_and_damaged_shards_are_named_and_made_again(corpus, prepared, tmp_path):
    out = tmp_path / "out"
    build(corpus, out)
    first, second, third = sorted((out / "train").glob("*.tokens"))[:3]
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}: No such file.*prepare"):
        open_corpus(out)
    build(corpus, out)
    os.truncate(second, 1000)
    with pytest.raises(UserError, match=f"{second.name} has 1,000 bytes and should have [0-9,]+; run"):
        open_corpus(out)
    build(corpus, out)
    assert content(out) == content(prepared)
    with open(third, "r+b") as file:
        file.seek(500)
        file.write(b"\1\2\3\4")
    with pytest.raises(UserError, match=f"{third.stem}.tokens or .offsets is damaged"):
        open_corpus(out).train[2].read()


def test_a_manifest_without_a_field_is_called_damaged(corpus, prepared, tmp_path):
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["shards"][0]["tokens"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    for read in (open_corpus, partial(build, corpus)):
        with pytest.raises(UserError, match=f"field shards.0.tokens is .*: delete it, .*: python -m .* {out}$"):
            read(out)


def test_a_vocabulary_that_does_not_match_the_shards_is_refused(corpus, prepared, tmp_path):
    out = tmp_path / "out"
    build(corpus, out)
    lines = (out / "vocabulary.txt").read_bytes().splitlines(keepends=True)
    (out / "vocabulary.txt").write_bytes(b"".join(reversed(lines)))
    with pytest.raises(UserError, match="not the vocabulary that the shards beside it were encoded with"):
        open_corpus(out)
    build(corpus, out)
    assert content(out) == content(prepared)


@pytest.mark.parametrize("option", ["--workers", "--threshold"])
def test_numbers_that_make_no_sense_are_refused_at_once(corpus, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        main([str(corpus), str(tmp_path / "out"), option, "0"])
    assert f"{option}: a whole number above 0, not 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "language_model.prepare", *map(str, arguments)]


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("larger"), files=12, lines=140)


def test_killed_and_restarted_it_makes_the_same(larger, tmp_path):
    """Killed twice in the middle of encoding. Its workers end with it, and no shard is made a second time."""
    for file in (larger / TRAIN).iterdir():
        file.write_text(40 * file.read_text(encoding="utf-8"), encoding="utf-8")
    out = tmp_path / "out"
    for finished in (2, 6):
        process = subprocess.Popen(command(larger, out, "--workers", 2), stderr=subprocess.DEVNULL)
        children: list[int] = []
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "shards.jsonl").exists() and (out / "shards.jsonl").read_bytes().count(b"digest") >= finished:
                children = [
                    int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                ]
                break
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not (out / "manifest.json").exists()
        with pytest.raises(UserError, match="no finished corpus there"):
            open_corpus(out)
        while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    early = min((out / "train").glob("*.tokens"), key=lambda path: path.stat().st_mtime_ns)
    before = early.stat().st_mtime_ns
    done = subprocess.run(command(larger, out, "--workers", 2), capture_output=True, text=True)
    assert done.returncode == 0 and "shards are there already" in done.stderr, done.stderr
    assert early.stat().st_mtime_ns == before and not (out / "shards.jsonl").exists()
    build(larger, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")
    assert json.loads((out / "manifest.json").read_text()) == json.loads((tmp_path / "whole/manifest.json").read_text())


def test_a_disk_that_fills_up_costs_one_shard(corpus, prepared, tmp_path):
    """A limit on the size of files acts as the full disk."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))  # noqa: E731
    full = subprocess.run(
        command(corpus, tmp_path / "out", "--workers", 1), capture_output=True, text=True, preexec_fn=limit
    )
    errors = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert full.returncode == 2 and len(errors) == 1 and "Traceback" not in full.stderr, full.stderr
    assert "File too large" in errors[0] and "run the same command" in errors[0]
    build(corpus, tmp_path / "out")
    assert content(tmp_path / "out") == content(prepared)


def test_one_folder_takes_one_preparation_at_a_time(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    locker = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", locker, str(tmp_path / "out/.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    with pytest.raises(UserError, match="another process is preparing a corpus there"):
        build(corpus, tmp_path / "out")
    process.communicate(b"\n")
    build(corpus, tmp_path / "out")
