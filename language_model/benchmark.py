"""The One Billion Word benchmark (Chelba et al., arXiv 1312.3005): its files, and the counts that identify them.

docs/data_facts.yaml gives each value's public source.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ARCHIVE = "1-billion-word-language-modeling-benchmark-r13output.tar.gz"
ARCHIVE_URL = f"https://www.statmt.org/lm-benchmark/{ARCHIVE}"
ARCHIVE_CHECKSUM = "sha256:01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e"
VOCABULARY = "1b_word_vocab.txt"
VOCABULARY_URL = f"https://github.com/rafaljozefowicz/lm/raw/master/{VOCABULARY}"
TRAIN_FILES = frozenset(f"news.en-{number:05}-of-00100" for number in range(1, 100))
NOT_FOR_TRAINING = "news.en-00000-of-00100"  # the whole held-out text
TEST_FILE = "news.en.heldout-00000-of-00050"  # the test set of the benchmark's authors
WORDS_TOLERANCE = 1e-5  # wc defines white space differently and counts 2,358 words fewer
EXPECTED = {  # lines end with a newline, words with white space
    "the training text": {"lines": 30_301_028, "words": 768_648_884},
    TEST_FILE: {"lines": 6_075, "words": 153_583},
}


def warnings(shards: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Differences from the benchmark, if the training files have its names."""
    train = [shard for shard in shards if shard["split"] == "train"]
    found = {shard["file"] for shard in train}
    if not found <= TRAIN_FILES:
        return
    if missing := sorted(TRAIN_FILES - found):
        yield f"{len(missing)} of the benchmark's 99 training files are not there, the first of them {missing[0]}"
        train = []  # cannot be compared
    test = [shard for shard in shards if shard["file"] == TEST_FILE]
    for (what, expected), of_text in zip(EXPECTED.items(), (train, test), strict=True):
        for unit, count in expected.items():
            there = sum(shard[unit] for shard in of_text)
            if of_text and abs(there - count) > (WORDS_TOLERANCE * count if unit == "words" else 0):
                yield f"{what} has {there:,} {unit}, and that of the benchmark {count:,}: is it the published file?"
