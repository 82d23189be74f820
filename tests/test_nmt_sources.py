"""WMT14 in every form in which people have it: each gives the same data, and what is something else is refused."""

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace

import pytest

from engine.errors import UserError
from nmt.prepare import sources
from nmt.prepare.command import main, prepare
from nmt.prepare.recipes import WMT14
from nmt.prepare.sources import find_texts, sgm_to_text
from nmt.prepare.toy_text import generate

RECIPE = replace(WMT14, lines={}, merges=50)
TRAINING = {"europarl-v7.de-en": "training/", "commoncrawl.de-en": "", "news-commentary-v9.de-en": "training/"}
BOM = b"\xef\xbb\xbf"


def sgm(text):
    segments = "".join(f'<seg id="{number}">{line}</seg>\n' for number, line in enumerate(text.splitlines(), 1))
    return f'<srcset setid="x" srclang="any">\n<doc docid="1">\n<p>\n{segments}</p>\n</doc>\n</srcset>\n'


@pytest.fixture(scope="module")
def texts():
    """The files of the recipe by name, 20 lines each; every text has lines of its own."""
    pairs, found = generate(100), {}
    for number, text in enumerate((*WMT14.train, WMT14.valid, WMT14.test)):
        for language, lines in zip(("en", "de"), zip(*pairs[20 * number : 20 * number + 20], strict=True), strict=True):
            found[f"{text}.{language}"] = "".join(f"{line}\n" for line in lines)
    return found


def plain(texts):
    return {name: text.encode() for name, text in texts.items()}


def with_byte_order_marks(texts):
    return {name: BOM + text.encode() for name, text in texts.items()}


def orig(texts):
    """What fairseq's prepare-wmt14en2de.sh --icml17 leaves in orig/."""
    files = {
        f"{folder}{text}.{side}": texts[f"{text}.{side}"] for text, folder in TRAINING.items() for side in ("en", "de")
    }
    files |= {f"dev/newstest2013.{side}": texts[f"newstest2013.{side}"] for side in ("en", "de")}
    files |= {f"dev/newstest2013-src.{side}.sgm": "not this one" for side in ("en", "de")}
    files["test-full/newstest2014-deen-src.en.sgm"] = sgm(texts["newstest2014.en"])
    files["test-full/newstest2014-deen-ref.de.sgm"] = sgm(texts["newstest2014.de"])
    return {name: text.encode() for name, text in files.items()}


def pack(name, files):
    packed = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(packed, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def training_archives(texts, suffix):
    names = ("training-parallel-europarl-v7", "training-parallel-commoncrawl", "training-parallel-nc-v9")
    return {
        name + suffix: pack(
            name + suffix, {f"{folder}{text}.{side}": texts[f"{text}.{side}"].encode() for side in ("de", "en")}
        )
        for name, (text, folder) in zip(names, TRAINING.items(), strict=True)
    }


def statmt_archives(texts):
    test = {f"test/newstest2013-src.{side}.sgm": sgm(texts[f"newstest2013.{side}"]).encode() for side in ("en", "de")}
    full = {name: content for name, content in orig(texts).items() if name.startswith("test-full/")}
    return training_archives(texts, ".tgz") | {"test.tgz": pack("", test), "test-full.tgz": pack("", full)}


def dev_archive(texts):
    """statmt's dev.tgz, beside plain training text; the test set in it with the sides' roles changed."""
    files = {name: content for name, content in orig(texts).items() if name.startswith("dev/")}
    files["dev/newstest2014-deen-ref.en.sgm"] = sgm(texts["newstest2014.en"]).encode()
    files["dev/newstest2014-deen-src.de.sgm"] = sgm(texts["newstest2014.de"]).encode()
    train = {name: content for name, content in plain(texts).items() if "newstest" not in name}
    return train | {"dev.tgz": pack("dev.tgz", files)}


def hub_archives(texts):
    files = {f"dev/newstest2013.{side}": texts[f"newstest2013.{side}"].encode() for side in ("en", "de")}
    files["dev/newstest2014-deen-ref.en.sgm"] = sgm(texts["newstest2014.en"]).encode()
    files["dev/newstest2014-deen-src.de.sgm"] = sgm(texts["newstest2014.de"]).encode()
    return training_archives(texts, ".zip") | {"dev.zip": pack("dev.zip", files)}


def lay_out(folder, files, monkeypatch):
    """Write `files` below `folder`; archives of a known name get the checksum that these have."""
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
    for _ in range(2):  # the second time it is complete, and finds that it is
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
    assert "source is not a folder" in refusal(source, tmp_path)
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


def test_ones_own_text_is_looked_for_where_it_was_named(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.fr").touch()
    prefixes = [word for split in ("train", "valid", "test") for word in (f"--{split}", str(tmp_path / "text" / split))]
    with pytest.raises(UserError, match=r"no test\.en in .*text: looked for test\.en; what is there: train\.fr"):
        main(["files", str(tmp_path / "out"), "--name", "own", "--merges", "9", *prefixes])


def test_sgm_is_read_as_sacrebleu_reads_it():
    text = '<doc>\n<seg id="1"> A  dog &amp; a cat. </seg>\n<seg id="2">Two\nlines.</seg>\n</doc>\n'
    assert sgm_to_text(text) == "A dog &amp; a cat.\nTwo lines.\n"
