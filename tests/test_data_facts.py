"""docs/data.md and the code agree with docs/data_facts.yaml."""

import re
from pathlib import Path

import pytest
import yaml
from torchvision.datasets import CIFAR10, CIFAR100, folder

from classification import cifar, image_files
from classification.imagenet import labels
from classification.imagenet.hugging_face import NAMES
from classification.imagenet.prepare import MD5
from classification.imagenet.raw import TRAIN_TAR, VAL_IMAGES_A_CLASS, VAL_TAR
from language_model import benchmark
from nmt.codec import MAX_CHARACTERS, SPECIALS
from nmt.prepare import raw_text, sources
from nmt.prepare.download import ARCHIVES, MIRRORS
from nmt.prepare.recipes import WMT14

DOCS = Path(__file__).parent.parent / "docs"
FACTS = yaml.safe_load((DOCS / "data_facts.yaml").read_text(encoding="utf-8"))
ALL = [fact for facts in FACTS.values() for fact in facts]


def shown(table):
    return [fact["shown"] for fact in FACTS[table] if "shown" in fact]


@pytest.mark.parametrize("fact", ALL, ids=lambda fact: fact.get("shown") or fact["file"])
def test_the_page_shows_it_and_a_source_stands_beside(fact):
    page = " ".join((DOCS / "data.md").read_text(encoding="utf-8").split())
    assert fact["source"] and fact.keys() <= {"shown", "file", "checksum", "md5", "source"}
    assert "shown" not in fact or fact["shown"] in page


def test_cifar_is_known_by_the_checksums_of_torchvision():
    known = {fact["shown"]: fact["md5"] for fact in FACTS["cifar10"] if "md5" in fact}
    assert known == {source.filename: source.tgz_md5 for source in (CIFAR10, CIFAR100)}
    assert list(cifar.ARCHIVES.values()) == [
        (source.url, source.tgz_md5, source.base_folder) for source in (CIFAR10, CIFAR100)
    ]


def test_the_endings_of_images_are_those_of_torchvisions_folders():
    assert image_files.IMG_EXTENSIONS == folder.IMG_EXTENSIONS


def test_imagenets_archives_are_known_by_these_checksums():
    known = {fact["file"]: fact["checksum"] for fact in FACTS["imagenet"] if "file" in fact}
    assert known == {name: f"md5:{checksum}" for name, checksum in MD5.items()}


def test_imagenets_files_are_looked_for_under_these_names():
    facts = shown("imagenet")
    assert {f"`{name}`" for name in (*labels.LISTS, labels.MAP)} <= set(facts)
    assert f"id 1 is {labels.FIRST_ID}" in facts and f"{VAL_IMAGES_A_CLASS} validation images of each" in facts
    for name in (TRAIN_TAR, VAL_TAR, labels.KIT_2012):  # with their sizes
        assert any(fact.startswith(f"`{name}` (") for fact in facts), name
    named = [name for fact in facts for name in re.findall(r"data/([^`]+)`", fact)]
    assert len(named) == 4 and all(any(form.fullmatch(name) for form in NAMES.values()) for name in named)


def test_one_billion_words_compares_with_these_counts():
    facts = shown("one_billion_words")
    assert {benchmark.ARCHIVE, benchmark.VOCABULARY, benchmark.ARCHIVE_CHECKSUM.removeprefix("sha256:")} <= set(facts)
    train, first = benchmark.EXPECTED["the training text"], benchmark.EXPECTED[benchmark.TEST_FILE]
    expected = [*train.values(), train["words"] + 2 * train["lines"]]
    expected += [*first.values(), first["words"] + first["lines"], first["words"] + 2 * first["lines"]]
    assert {f"{count:,}" for count in expected} <= set(facts)
    assert len(benchmark.TRAIN_FILES) == 99 and benchmark.NOT_FOR_TRAINING not in benchmark.TRAIN_FILES


def test_wmt14_demands_these_counts_and_checksums():
    facts = shown("wmt14")
    counts = [WMT14.lines[text] for text in WMT14.train]
    assert f"{' + '.join(f'{count:,}' for count in counts)} = {sum(counts):,}" in facts
    assert {f"{WMT14.lines[text]:,}" for text in (WMT14.valid, WMT14.test)} <= set(facts)
    assert {f"{count:,}" for count in raw_text.OTHER_SETS} <= set(facts) and "4,508,785" in sources.HUB_SET
    assert f"{WMT14.merges:,} merges" in facts
    assert {archive.name: archive.checksum for archive in (*ARCHIVES, *MIRRORS)} == {
        fact["file"]: fact["checksum"] for fact in FACTS["wmt14"] if "file" in fact
    }
    largest = WMT14.merges + MAX_CHARACTERS + 1 + len(SPECIALS)  # and the mark of a word's beginning
    assert f"at most {largest:,}" in (DOCS / "data.md").read_text(encoding="utf-8")
