"""The guarded lookup finds what LMDB's own finds, and no damage of the file leads it out of the file."""

from pathlib import Path
from random import Random

import lmdb
import pytest

from classification.imagenet.lookup import DamagedFile, LmdbFile


def write(path: Path, pairs: dict[bytes, bytes], at_once: int) -> Path:
    """Write `pairs` with LMDB itself, `at_once` in a transaction."""
    entries = list(pairs.items())
    with lmdb.open(str(path), subdir=False, lock=False, map_size=1 << 28) as env:
        for first in range(0, len(entries), at_once):
            with env.begin(write=True) as transaction:
                for key, value in entries[first : first + at_once]:
                    transaction.put(key, value)
    return path


def drawn(random: Random, count: int) -> dict[bytes, bytes]:
    """Keys of 1 to 200 bytes in random order; values that are empty, inside a leaf, and on pages of their own."""
    return {
        random.randbytes(random.choice((1, 8, 16, 200))): random.randbytes(random.choice((0, 3, 500, 2030, 2040, 9000)))
        for _ in range(count)
    }


@pytest.mark.parametrize(("count", "at_once"), [(0, 1), (1, 1), (50, 7), (3000, 100)])
def test_every_key_has_the_value_that_was_written(tmp_path, count, at_once):
    random = Random(count)
    pairs = drawn(random, count)
    file = LmdbFile(write(tmp_path / "file", pairs, at_once))
    assert {key: bytes(file.get(key)) for key in pairs} == pairs
    absent = [key for key in drawn(random, 200) if key not in pairs]
    assert absent and [file.get(key) for key in absent] == [None] * len(absent)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file of three levels, and what is in it."""
    random = Random(1)
    pairs = drawn(random, 400) | {bytes([first]) * 400: b"" for first in range(200)}
    path = write(tmp_path_factory.mktemp("lookup") / "file", pairs, 50)
    with lmdb.open(str(path), subdir=False, lock=False, readonly=True) as env:
        assert env.stat()["depth"] >= 3
    return path.read_bytes(), pairs


def test_damaged_trees_end_in_an_error_or_in_a_value_of_the_file(small, tmp_path):
    """Bits and numbers of the tree's pages are changed: those that lead from the root to a value."""
    content, pairs = small
    random, path, refused, page = Random(2), tmp_path / "file", 0, int.from_bytes(content[40:44], "little")
    tree = [at for at in range(0, len(content), page) if content[at + 10] in (1, 2)]  # flags of branches and leaves
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(random.choice((1, 30, 300))):
            at = random.choice(tree) + random.choice((random.randrange(page - 1), random.randrange(200)))
            damaged[at : at + 2] = random.choice((b"\xff\xff", b"\0\0", random.randbytes(2)))
        path.write_bytes(damaged)
        try:
            file = LmdbFile(path)
        except DamagedFile:
            refused += 1
            continue
        for key in random.sample(list(pairs), 40):
            try:
                found = file.get(key)
            except DamagedFile:
                refused += 1
            else:
                assert found is None or bytes(found) in damaged
    assert refused > 100


def test_pages_in_a_circle_end_in_an_error(small, tmp_path):
    content, pairs = small
    path = tmp_path / "file"
    path.write_bytes(content)
    file = LmdbFile(path)
    root, damaged = file._page(file._root), bytearray(content)
    for node in root.nodes:  # each child is the root itself
        damaged[root.start + node : root.start + node + 6] = file._root.to_bytes(6, "little")
    path.write_bytes(damaged)
    with pytest.raises(DamagedFile, match="in a circle"):
        LmdbFile(path).get(next(iter(pairs)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "it is empty"),
        (lambda content: content[:100], "its end is missing"),
        (lambda content: content[:-1], "its end is missing"),
        (lambda content: b"x" * len(content), "no file of LMDB"),
    ],
)
def test_files_that_are_not_whole_are_refused(small, tmp_path, change, message):
    (tmp_path / "file").write_bytes(change(small[0]))
    with pytest.raises(DamagedFile, match=message):
        LmdbFile(tmp_path / "file")
