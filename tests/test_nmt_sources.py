"""WMT14 in every form in which people have it: each gives the same data, and other sets are refused."""

import hashlib
from dataclasses import replace

import pytest
from wmt14_layouts import dev_archive, hub_archives, orig, plain, statmt_archives, toy_texts, with_byte_order_marks

from engine.errors import UserError
from nmt.prepare import sources
from nmt.prepare.command import main, prepare
from nmt.prepare.recipes import WMT14
from nmt.prepare.sources import find_texts, sgm_to_text

RECIPE = replace(WMT14, lines={}, merges=50)


@pytest.fixture(scope="module")
def texts():
    return toy_texts()


def lay_out(folder, files, monkeypatch):
    """Write `files` below `folder`. The known archives' checksums become those of these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        if sources.CHECKSUMS.get(name):
            monkeypatch.setitem(sources.CHECKSUMS, name, f"sha256:{hashlib.sha256(content).hexdigest()}")
    return folder


def data_in(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file() and path.name != "manifest.json"}


@pytest.fixture(scope="module")
def expected(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    for name, content in plain(texts).items():
        (folder / name).write_bytes(content)
    prepare(RECIPE, folder, folder / "out")
    return data_in(folder / "out")


@pytest.mark.parametrize("layout", [with_byte_order_marks, orig, statmt_archives, dev_archive, hub_archives])
def test_every_layout_gives_the_same_data(layout, texts, expected, tmp_path, monkeypatch):
    source = lay_out(tmp_path / "source", layout(texts), monkeypatch)
    before = sorted(source.rglob("*"))
    for _ in range(2):
        prepare(RECIPE, source, tmp_path / "out")
    assert data_in(tmp_path / "out") == expected
    assert sorted(source.rglob("*")) == before  # a source is never written to


def test_an_archive_of_another_content_is_refused(texts, tmp_path, monkeypatch):
    source = lay_out(tmp_path / "source", statmt_archives(texts), monkeypatch)
    monkeypatch.setitem(sources.CHECKSUMS, "test.tgz", f"md5:{'0' * 32}")
    with pytest.raises(UserError, match=r"test\.tgz is not the file that is expected, by its checksum"):
        prepare(RECIPE, source, tmp_path / "out")
    other = lay_out(tmp_path / "other", statmt_archives(texts), monkeypatch)
    (other / "test.tgz").write_bytes((other / "test.tgz").read_bytes()[:100])
    with pytest.raises(UserError, match=r"test\.tgz is not a whole archive"):
        prepare(RECIPE, other, tmp_path / "out")


def refusal(source, tmp_path):
    with pytest.raises(UserError) as error:
        find_texts(source, ["newstest2014"], ["en", "de"], tmp_path / "unpacked")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_wrong_source_is_told_what_was_looked_for_and_what_is_there(tmp_path):
    source = tmp_path / "source"
    assert "source is not there" in refusal(source, tmp_path)
    (source / "sub").mkdir(parents=True)
    assert refusal(source, tmp_path).endswith("what is there: sub")
    (source / "sub" / "newstest2015.en").touch()
    message = refusal(source, tmp_path)
    assert "source or its folders training, test-full, dev, test: looked for newstest2014.en, newstest2014-*" in message
    assert "test-full.tgz" in message and message.endswith("what is there: sub, sub/newstest2015.en")
    (source / "newstest2014.fr").touch()
    assert refusal(source, tmp_path).endswith("what is there: newstest2014.fr")
    (source / "test-filtered").mkdir()
    assert "test-filtered is another test set, of 2,737 lines" in refusal(source, tmp_path)
    (source / "sub" / "train-00000-of-00003.parquet").touch()
    assert "looks like Hugging Face's wmt14, which is another set: 4,508,785 training pairs" in refusal(
        source, tmp_path
    )


def test_a_wrong_source_is_told_the_nearest_right_one(texts, tmp_path, monkeypatch):
    right = lay_out(tmp_path / "downloads" / "orig", orig(texts), monkeypatch)
    for wrong in (right / "training", right / "dev", tmp_path, tmp_path / "downloads"):
        assert refusal(wrong, tmp_path).endswith(f"; the nearest folder that has it: {right}")
    assert "is not a folder" in refusal(right / "commoncrawl.de-en.en", tmp_path)


def test_ones_own_text_is_looked_for_where_it_was_named(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.fr").touch()
    prefixes = [word for split in ("train", "valid", "test") for word in (f"--{split}", str(tmp_path / "text" / split))]
    with pytest.raises(UserError, match=r"no test\.en in .*text: looked for test\.en; what is there: train\.fr"):
        main(["files", str(tmp_path / "out"), "--name", "own", "--merges", "9", *prefixes])


def test_sgm_is_read_as_sacrebleu_reads_it():
    text = '<doc>\n<seg id="1"> A  dog &amp; a cat. </seg>\n<seg id="2">Two\nlines.</seg>\n</doc>\n'
    assert sgm_to_text(text) == "A dog &amp; a cat.\nTwo lines.\n"
