"""The LMDB of ImageNet: it holds what the source holds, and every damage is noticed."""

import errno
import fcntl
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from imagenet_images import CLASSES, make_tree
from imagenet_layouts import build_until

from classification.imagenet.lmdb import LmdbSplit, Record, SplitWriter, finished, open_splits
from classification.imagenet.prepare import build, verify
from engine.errors import UserError


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("imagenet") / "tree")


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("imagenet_built") / "lmdb"
    build(tree, out)
    return out


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


@pytest.fixture
def small_chunks(monkeypatch):
    for module in ("lmdb", "prepare", "raw"):
        monkeypatch.setattr(f"classification.imagenet.{module}.CHUNK", 4)


def records(split):
    return [(record.label, bytes(record.image)) for record in (split[index] for index in range(len(split)))]


def expected(tree, split):
    return [
        (label, path.read_bytes())
        for label, name in enumerate(CLASSES)
        for path in sorted((tree / split / name).iterdir())
    ]


def command(*arguments):
    return [sys.executable, "-m", "classification.prepare_imagenet", *map(str, arguments)]


def test_holds_the_untouched_files_and_their_labels(tree, built):
    train, val = open_splits(built)
    assert records(train) == expected(tree, "train")
    assert records(val) == expected(tree, "val")
    manifest = finished(built)
    assert manifest["classes"] == list(CLASSES)
    assert {name: split["images"] for name, split in manifest["splits"].items()} == {"train": 24, "val": 12}
    assert verify(built, decode=True) == []


def test_counts_other_than_imagenets_are_mentioned_and_allowed(tree, tmp_path):
    done = subprocess.run(command("build", tree, tmp_path / "out"), capture_output=True, text=True)
    assert done.returncode == 0
    assert "24 training and 12 validation images in 3 classes" in done.stderr
    assert "1,281,167 training and 50,000 validation images in 1,000 classes" in done.stderr
    done = subprocess.run(command("verify", tmp_path / "out", "--decode"), capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"{tmp_path / 'out'}: whole")


def test_building_again_changes_nothing(tree, copy):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    build(tree, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda root: shutil.rmtree(root / "train"),
            "neither a folder train/ .*, nor ILSVRC2012_img_train.tar, nor",
        ),
        (lambda root: shutil.rmtree(root / "val"), "val or .*/validation is not there"),
        (lambda root: (root / "val" / "n09999999").mkdir(), "holds no image"),
        (lambda root: (root / "val" / CLASSES[0]).rename(root / "val" / "other"), "the class 'other'"),
    ],
)
def test_incomplete_sources_are_named(tree, tmp_path, break_it, message):
    source = shutil.copytree(tree, tmp_path / "source")
    break_it(source)
    with pytest.raises(UserError, match=message):
        build(source, tmp_path / "out")


def test_map_grows_from_smaller_than_one_chunk(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("classification.imagenet.prepare.SplitWriter", lambda *a: SplitWriter(*a, map_size=16384))
    build(tree, tmp_path / "out")
    assert records(open_splits(tmp_path / "out")[0]) == expected(tree, "train")


def test_killed_at_any_time_it_continues(tree, tmp_path):
    """Killed at a time by the clock, not at a known step."""
    out = tmp_path / "out"
    for delay in (0.9, 1.3):
        process = subprocess.Popen(command("build", tree, out), stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
    build(tree, out)
    assert verify(out) == []


def test_does_not_continue_with_other_images(tree, tmp_path, small_chunks):
    other = shutil.copytree(tree, tmp_path / "other")
    assert build_until(40, tree, tmp_path / "out") == -signal.SIGKILL
    (other / "train" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG").rename(other / "train" / CLASSES[0] / "new.JPEG")
    with pytest.raises(UserError, match=r"train\.lmdb was begun from other images"):
        build(other, tmp_path / "out")


def test_does_not_touch_a_finished_build_of_other_images(tree, copy, tmp_path):
    other = shutil.copytree(tree, tmp_path / "other")
    next((other / "val" / CLASSES[1]).iterdir()).unlink()
    with pytest.raises(UserError, match="already holds other images"):
        build(other, copy)


def test_two_builds_into_one_folder(tree, tmp_path):
    with open(tmp_path / ".lock", "w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        done = subprocess.run(command("build", tree, tmp_path), capture_output=True, text=True)
    assert done.returncode == 2
    assert "another process is building there" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_file_system_without_locks_and_folder_that_is_not_ours_are_named(tree, tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(UserError, match="its file system has no locks .No locks available.: choose a folder"):
        build(tree, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out cannot be made .*Not a directory"):
        build(tree, tmp_path / "file" / "out")


def test_disk_that_refuses_more_is_one_line_and_the_build_goes_on_later(tree, tmp_path):
    """A limit on the size of files acts as the full disk: the system refuses the write in the same place."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = subprocess.run(command("build", tree, tmp_path), capture_output=True, text=True, preexec_fn=limited)
    assert done.returncode == 2, done.stderr
    assert "run the same command to go on" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    build(tree, tmp_path)
    assert verify(tmp_path) == []


def in_little_memory(code, *arguments, mebibytes=600):
    """Run `code` in a process with a limit on its additional address space."""
    limit = f"""
import resource, sys
from pathlib import Path
import classification.imagenet.lmdb
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + ({mebibytes} << 20),) * 2)
"""
    done = subprocess.run([sys.executable, "-c", limit + code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


REFUSED = """
from classification.imagenet.lmdb import Record, SplitWriter
from engine.errors import UserError
try:
    writer = SplitWriter(Path(sys.argv[1]), "inputs", ["a"], int(sys.argv[2]))
    writer.append([Record(0, b"x" * 1000)] * 256)
except UserError as error:
    print(error)
"""


def test_address_space_that_is_refused_costs_no_build(tmp_path):
    path = tmp_path / "train.lmdb"
    writer = SplitWriter(path, "inputs", ["a"])
    writer.append([Record(0, b"x" * 1000)] * 256)
    before = path.read_bytes()
    said = in_little_memory(REFUSED, path, 1 << 30)
    assert "it takes 1.0 GiB of address space" in said and "ulimit -v" in said and "delete" not in said
    assert path.read_bytes() == before
    # The same where a map that was small enough at first has to grow.
    said = in_little_memory(REFUSED, tmp_path / "val.lmdb", 1 << 19, mebibytes=0)
    assert "of address space" in said and "delete" not in said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"not LMDB's" * 2000), "is truncated or damaged .*: delete it"),
        (lambda path: path.mkdir(), r"cannot be opened \(Is a directory\): mend that"),
    ],
)
def test_advice_to_delete_is_given_for_what_is_no_lmdb_alone(tmp_path, make, message):
    make(tmp_path / "train.lmdb")
    with pytest.raises(UserError, match=message):
        SplitWriter(tmp_path / "train.lmdb", "inputs", ["a"])


def flip(path, needle, offset):
    """Flip one bit `offset` bytes after `needle`, which occurs once in the file."""
    content = bytearray(path.read_bytes())
    at = content.index(needle)
    assert content.find(needle, at + 1) < 0
    content[at + offset] ^= 1
    path.write_bytes(content)


def test_flipped_bit_is_found_and_named(tree, copy):
    image = expected(tree, "train")[9][1]
    flip(copy / "train.lmdb", image[:400], 300)
    bad = verify(copy)
    assert bad == [f"{copy}/train.lmdb, key 9 (class {CLASSES[1]}) differs from its checksum"]
    done = subprocess.run(command("verify", copy), capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (1, [*bad, f"{copy}: 1 damaged"])


def test_decode_names_what_is_no_image(tree, tmp_path):
    source = shutil.copytree(tree, tmp_path / "source")
    (source / "val" / CLASSES[2] / f"{CLASSES[2]}_1.JPEG").write_bytes(b"not an image")
    build(source, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    (bad,) = verify(tmp_path / "out", decode=True)
    assert bad.startswith(f"{tmp_path}/out/val.lmdb, key 9 (class {CLASSES[2]}) is no image")


@pytest.mark.parametrize("share", [0, 0.3, 0.95])
def test_truncated_file_is_refused(copy, share):
    path = copy / "train.lmdb"
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(UserError, match=r"train\.lmdb is truncated or damaged"):
        open_splits(copy)


@pytest.mark.parametrize("content", ["", "{", '{"format": 1}', "[]"])
def test_damaged_manifest_is_refused(copy, content):
    (copy / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        open_splits(copy)


def test_a_manifest_that_lacks_a_field_says_how_to_build_again(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["splits"]["val"]["images"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for read in (open_splits, verify):
        with pytest.raises(
            UserError, match=rf"{copy}/manifest\.json .* field splits\.val\.images .*imagenet SOURCE {copy}$"
        ):
            read(copy)


def test_manifest_that_is_missing_or_of_another_build_is_refused(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    for changed, message in (
        ({"format": 2}, "is of format 2"),
        ({"splits": manifest["splits"] | {"val": {"images": 11, "digest": ""}}}, "belong to different builds"),
    ):
        path.write_text(json.dumps(manifest | changed))
        with pytest.raises(UserError, match=message):
            open_splits(copy)
    path.unlink()
    with pytest.raises(UserError, match="unfinished build"):
        open_splits(copy)


def test_split_is_the_same_in_another_process(built):
    train, _ = open_splits(built)
    first = records(train)
    assert len(pickle.dumps(train)) < 2000
    assert records(pickle.loads(pickle.dumps(train))) == first
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        os.write(send, b"same" if records(train) == first else b"different")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert io.FileIO(receive).read(9) == b"same"


def test_file_that_replaced_an_open_one_is_read(tree, tmp_path):
    build(tree, tmp_path / "out")
    before, _ = open_splits(tmp_path / "out")
    assert len(records(before)) == 24
    shutil.rmtree(tmp_path / "out")
    build(make_tree(tmp_path / "other", train=2, val=1), tmp_path / "out")
    assert len(records(open_splits(tmp_path / "out")[0])) == 6
    assert verify(tmp_path / "out") == []
    assert len(records(before)) == 24  # as long as it is open


def test_read_only_folder_without_a_lock_file(built):
    before = set(os.listdir(built))
    records(LmdbSplit(built / "train.lmdb", CLASSES))
    assert set(os.listdir(built)) == before == {"train.lmdb", "val.lmdb", "manifest.json", ".lock"}
