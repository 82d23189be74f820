"""scripts/prepare.sh on toy data: one command a table, from what people have to the line that starts a row."""

import hashlib
import multiprocessing
import pickle
import shutil
import subprocess
import tarfile
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from imagenet_images import make_tree
from imagenet_layouts import ground_truth_and_ids_by_option, hugging_face_archives, make_toy, tars_and_kit_2012
from lm_corpus import make_corpus, make_vocabulary
from torchvision.datasets import CIFAR10
from wmt14_layouts import hub_archives, orig, plain, statmt_archives, toy_texts

from classification.cifar import ARCHIVES
from classification.data import read_cifar10
from classification.imagenet.lmdb import open_splits
from engine.errors import UserError
from language_model import benchmark
from language_model.prepared import open_corpus
from nmt.prepare import recipes, sources
from nmt.prepared import finished
from scripts import prepare

ROOT = Path(__file__).parent.parent


@pytest.fixture
def said(capsys):

    def run(*arguments):
        prepare.main([str(argument) for argument in arguments])
        return capsys.readouterr().out.splitlines()

    return run


def make_cifar(folder, monkeypatch):
    """Files of CIFAR-10's format with three images each. torchvision expects their checksums; the address is dead."""
    batches, random = folder / CIFAR10.base_folder, np.random.default_rng(0)
    batches.mkdir(parents=True)

    def write(name, content):
        (batches / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((batches / name).read_bytes()).hexdigest()

    for split in ("train_list", "test_list"):
        content = {"data": random.integers(0, 256, (3, 3072), dtype=np.uint8), "labels": [0, 1, 2]}
        monkeypatch.setattr(CIFAR10, split, [write(name, content) for name, _ in getattr(CIFAR10, split)])
    _, md5 = write(CIFAR10.meta["filename"], {CIFAR10.meta["key"]: [str(label) for label in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5})
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as tar:
        tar.add(batches, CIFAR10.base_folder)
    md5 = hashlib.md5((folder / CIFAR10.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5)
    published = ARCHIVES["cifar10"]._replace(url=f"http://127.0.0.1:1/{CIFAR10.filename}", md5=md5)
    monkeypatch.setitem(ARCHIVES, "cifar10", published)


@pytest.mark.parametrize("form", ["", CIFAR10.filename, CIFAR10.base_folder])
def test_cifar10(said, tmp_path, monkeypatch, form):
    """The archive or the unpacked files, named directly or by their folder."""
    make_cifar(tmp_path / "source", monkeypatch)
    if form == CIFAR10.base_folder:
        (tmp_path / "source" / CIFAR10.filename).unlink()
    found, will, row = said("cifar10", tmp_path / "source" / form, tmp_path / "out")
    assert found == f"found: {tmp_path}/source/{form or CIFAR10.filename}" and will.startswith("will write: 360 MB")
    assert len(read_cifar10(tmp_path / "out").train.labels) == 15 and row.endswith(f"data.root={tmp_path}/out")
    assert said("cifar10", tmp_path / "source", tmp_path / "out")[-1] == row
    with pytest.raises(UserError, match=f"no CIFAR-10 in .*; the nearest folder that has it: {tmp_path}/out$"):
        said("cifar10", tmp_path, tmp_path / "other")
    shutil.rmtree(tmp_path / "out")
    batch = tmp_path / "source" / CIFAR10.base_folder / "data_batch_1"
    (tmp_path / "source" / CIFAR10.filename).unlink(missing_ok=True)
    batch.write_bytes(batch.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="cifar10 is not complete in .*out and cannot be downloaded"):
        said("cifar10", tmp_path / "source", tmp_path / "out")


def at_once(arguments, count=2):
    """Exit statuses of `count` processes that prepare the same."""
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=prepare.main, args=(arguments,)) for _ in range(count)]
    for each in started:
        each.start()
    for each in started:
        each.join()
    return [each.exitcode for each in started]


def test_cifar10_twice_at_once(tmp_path, monkeypatch):
    make_cifar(tmp_path / "source", monkeypatch)
    copy = shutil.copy
    monkeypatch.setattr(shutil, "copy", lambda *places: (copy(*places), time.sleep(1)))
    assert at_once(["cifar10", str(tmp_path / "source"), str(tmp_path / "out")]) == [0, 0]
    assert len(read_cifar10(tmp_path / "out").train.labels) == 15


def test_one_billion_words_is_downloaded_once(tmp_path, monkeypatch):
    """Two processes that want it at once, and ask a slow server, which counts."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open("away.tar.gz", "w:gz") as tar:
        tar.add(make_corpus(tmp_path / "text"), "benchmark")
    make_vocabulary(tmp_path / "away.txt", ["the", "of"])
    files = {"/words": Path("away.txt").read_bytes(), "/text": Path("away.tar.gz").read_bytes()}
    asked = []

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            time.sleep(0.5)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path])

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(benchmark, "VOCABULARY_URL", f"http://127.0.0.1:{server.server_port}/words")
        monkeypatch.setattr(benchmark, "ARCHIVE_URL", f"http://127.0.0.1:{server.server_port}/text")
        digest = hashlib.sha256(files["/text"]).hexdigest()
        monkeypatch.setattr(benchmark, "ARCHIVE_CHECKSUM", f"sha256:{digest}")
        assert 0 in at_once(["one_billion_words", "--workers", "1"])  # the other one may be refused while it encodes
        server.shutdown()
    assert sorted(asked) == ["/text", "/words"]


def test_one_billion_words(said, tmp_path):
    """The vocabulary lies beside the text. --test all is passed on."""
    text = make_corpus(tmp_path / "text")
    make_vocabulary(text / "1b_word_vocab.txt", ["the", "of"])
    found, will, row = said("one_billion_words", text, tmp_path / "out", "--test", "all", "--workers", 1)
    assert found.startswith(f"found: {text} with ") and f"vocabulary {text}/1b_word_vocab.txt of 5 words" in found
    amount, unit = will.removeprefix("will write: ").split()[:2]
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".json")
    assert unit == "MB" and 0.4 < float(amount) / (written / 1e6) < 1.5 and " in about " in will
    assert row == f"to train a row: bash scripts/lm_apollo.sh data.root={tmp_path}/out"
    assert open_corpus(tmp_path / "out").all_test
    assert said("one_billion_words", text, tmp_path / "out", "--test", "all") == [found, row]
    with pytest.raises(UserError, match="holds other text, or another vocabulary"):
        said("one_billion_words", text, tmp_path / "out")


def test_one_billion_words_downloaded(said, tmp_path, monkeypatch):
    """Downloads from the published addresses to where the configs look, only until complete."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open("away.tar.gz", "w:gz") as tar:
        tar.add(make_corpus(tmp_path / "text"), "benchmark")
    make_vocabulary(tmp_path / "away.txt", ["the", "of"])
    monkeypatch.setattr(benchmark, "VOCABULARY_URL", (tmp_path / "away.txt").as_uri())
    monkeypatch.setattr(benchmark, "ARCHIVE_URL", (tmp_path / "nothing.tar.gz").as_uri())
    with pytest.raises(UserError, match="nothing.tar.gz.*put it into data/one_billion_words_source, and run the same"):
        said("one_billion_words")
    monkeypatch.setattr(benchmark, "ARCHIVE_URL", (tmp_path / "away.tar.gz").as_uri())
    digest = hashlib.sha256((tmp_path / "away.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(benchmark, "ARCHIVE_CHECKSUM", f"sha256:{digest}")
    found, _, row = said("one_billion_words", "--workers", 1)
    assert found.startswith(f"found: data/one_billion_words_source/{benchmark.ARCHIVE} with ")
    assert row == "to train a row: bash scripts/lm_apollo.sh" and open_corpus(Path("data/one_billion_words")).train
    shutil.rmtree("data/one_billion_words_source")
    assert said("one_billion_words") == ["data/one_billion_words is complete", row]


@pytest.mark.parametrize(
    ("layout", "first", "size"),
    [
        (plain, "europarl-v7.de-en.en", "2.0 GB"),
        (orig, "training/europarl-v7.de-en.en", "3.4 GB"),
        (statmt_archives, "training-parallel-europarl-v7.tgz", "3.4 GB"),
        (hub_archives, "training-parallel-europarl-v7.zip", "3.4 GB"),
    ],
)
def test_wmt14(said, tmp_path, monkeypatch, layout, first, size):
    texts = (*recipes.WMT14.train, recipes.WMT14.valid, recipes.WMT14.test)
    monkeypatch.setattr(recipes, "WMT14", replace(recipes.WMT14, lines=dict.fromkeys(texts, 20)))
    for name, content in layout(toy_texts()).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        if sources.CHECKSUMS.get(name):
            monkeypatch.setitem(sources.CHECKSUMS, name, f"sha256:{hashlib.sha256(content).hexdigest()}")
    found, will, row = said("wmt14", tmp_path, tmp_path / "out", "--workers", "1")
    assert found.startswith(f"found: {tmp_path}/{first}, ")
    assert will.startswith(f"will write: {size} to {tmp_path}/out, in about 2 minutes")
    assert row == f"to train a row: bash scripts/nmt_apollo.sh data.root={tmp_path}/out"
    assert finished(tmp_path / "out")["splits"]["train"]["lines"]["read"] == 60


def test_imagenet(said, tmp_path):
    """Only the images count, also behind links: neither the archive that held them nor the test images."""
    tree, source = make_tree(tmp_path / "tree"), tmp_path / "source"
    source.mkdir()
    for split in ("train", "val"):
        (source / split).symlink_to(tree / split)
    (source / "all.zip").write_bytes(bytes(1 << 20))
    shutil.copytree(tree / "val", source / "test")
    found, will, row = said("imagenet", source, tmp_path / "out")
    size = sum(path.stat().st_size for path in tree.rglob("*.JPEG"))
    assert found == f"found: a folder tree in {source}, 36 files with {size / 1e6:.3g} MB"
    assert will == f"will write: {1.02 * size / 1e6:.3g} MB to {tmp_path}/out, in a few seconds"
    assert (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").glob("*.tmp"))
    assert row == f"to train a row: bash scripts/imagenet_apollo.sh data.root={tmp_path}/out"
    assert said("imagenet", source, tmp_path / "in two")[-1].endswith(f".sh 'data.root={tmp_path}/in two'")


def test_imagenet_with_label_files_in_other_places(said, tmp_path):
    toy = make_toy()
    download = ground_truth_and_ids_by_option(toy, tmp_path / "download", bom=False)
    labels, ids = download.options["val_labels"], download.options["ids"]
    with pytest.raises(UserError, match=r"give it the labels with --val-labels FILE \(docs/data.md"):
        said("imagenet", download.source, tmp_path / "out")
    said("imagenet", download.source, tmp_path / "out", "--val-labels", labels, "--ids", ids)
    _, val = open_splits(tmp_path / "out")
    assert [val.classes[val[at].label] for at in range(len(val))] == [wnid for _, wnid, _ in toy.val]


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        (tars_and_kit_2012, "the official tar files in {}, 2 files"),
        (hugging_face_archives, "imagenet-1k as tar.gz files in {}/data, 6 files"),
    ],
)
def test_imagenet_in_archives_is_found(said, tmp_path, layout, found):
    source = layout(make_toy(), tmp_path / "source", bom=False).source
    for path in (source / "test_images.tar.gz", source / "data" / "test_images.tar.gz"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1 << 20))
    assert said("imagenet", source, tmp_path / "out")[0].startswith(f"found: {found.format(source)} with ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cifar10", "{}"], ["no CIFAR-10 in ", "cifar-10-python.tar.gz", "what is there: cifar-100-python.tar.gz, x"]),
        (["imagenet"], ["cannot be downloaded without its terms", "docs/data.md"]),
        (["imagenet", "{}/nowhere"], ["nowhere is not there", "give the folder that has them"]),
        (["imagenet", "{}"], ["source holds neither a folder train/", "ILSVRC2012_img_train.tar", "train-*.parquet"]),
        (["one_billion_words", "{}"], ["training-monolingual.tokenized.shuffled is not there", "holds: cifar-100"]),
        (["one_billion_words", "{}/nowhere"], ["nowhere is not there"]),
        (["wmt14", "{}"], ["no europarl-v7.de-en.en in ", "training-parallel-europarl-v7.tgz", "what is there: cifar"]),
        (["wmt14", "{}", "{}/out", "--test", "all"], ["--test are options of one_billion_words"]),
        (["wmt14", "{}", "{}/out", "--ids", "x"], ["--ids are options of imagenet"]),
        (["wmt15"], ["invalid choice: 'wmt15'"]),
    ],
)
def test_a_wrong_source_is_told_what_was_looked_for(said, tmp_path, arguments, words):
    (tmp_path / "source").mkdir()
    for name in ("x", "cifar-100-python.tar.gz", ".hidden"):
        (tmp_path / "source" / name).touch()
    with pytest.raises(UserError) as error:
        said(*(argument.format(tmp_path / "source") for argument in arguments))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), str(error.value)


def test_without_a_vocabulary_it_says_where_to_get_one(said, tmp_path):
    with pytest.raises(UserError, match=r"no 1b_word_vocab\.txt in .* or beside it: get https://.*--vocabulary"):
        said("one_billion_words", make_corpus(tmp_path / "text"), tmp_path / "out")


def test_a_full_disk_is_told_before_anything_is_written(said, tmp_path, monkeypatch):
    text = make_corpus(tmp_path / "text")
    make_vocabulary(text / "1b_word_vocab.txt", ["the"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**4, 10**4))
    with pytest.raises(
        UserError, match=r"out has 0.01 MB free, and this takes [\d.]+ MB: make room, or give another DEST"
    ):
        said("one_billion_words", text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_script_is_the_command(tmp_path):
    command = ["bash", "scripts/prepare.sh", "wmt14", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "error: no europarl-v7.de-en.en in " in done.stderr, done.stderr
