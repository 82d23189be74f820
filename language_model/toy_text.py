"""English text that comes with every Python: its reference manual, as `help()` shows it.

It has about 90,000 tokens, and differs between versions of Python. Empty lines separate paragraphs, repeated ones are
dropped, and every tenth is test text.
"""

import platform
import re
from collections.abc import Sequence
from functools import cache

import numpy as np

from language_model.prepared import Corpus, Shard
from language_model.vocabulary import Vocabulary, count_words, counted_vocabulary, digest

THRESHOLD = 2  # rarer words of the training text are <UNK>
SHARDS = 4
TEST_EVERY = 10  # paragraphs
TOKEN = re.compile(r"\w+|([^\w\s])\1*")  # a word, or a sign


@cache
def pydoc_corpus() -> Corpus:
    """Each process makes it again: that is fast."""
    text = paragraphs()
    train = [line for number, line in enumerate(text) if number % TEST_EVERY != TEST_EVERY - 1]
    test = text[TEST_EVERY - 1 :: TEST_EVERY]
    vocabulary = counted_vocabulary([count_words(train)], THRESHOLD)
    per_shard = -(-len(train) // SHARDS)
    shards = [_shard(train[first : first + per_shard], vocabulary) for first in range(0, len(train), per_shard)]
    held_out = _shard(test, vocabulary)
    facts = {
        "vocabulary": {"words": len(vocabulary), "sha256": digest(vocabulary.dump().encode())},
        "text": {"python": platform.python_version(), "sha256": digest("\n".join(text).encode())},
        "train": {"tokens": sum(shard.tokens for shard in shards), "sentences": len(train)},
        "test": {"tokens": held_out.tokens, "sentences": len(test), "files": ["pydoc_data/topics.py"]},
    }
    words, sha256 = facts["vocabulary"].values()
    return Corpus(shards, [held_out], words, sha256, lambda: vocabulary, facts)


def paragraphs() -> list[str]:
    """Every paragraph once, in the order of topics' names."""
    from pydoc_data.topics import topics

    parts = (part for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name]))
    lines = (" ".join(match.group() for match in TOKEN.finditer(part)) for part in parts)
    return list(dict.fromkeys(line for line in lines if line))


def _shard(lines: Sequence[str], vocabulary: Vocabulary) -> Shard:
    tokens, lengths = vocabulary.encode("\n".join(lines))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Shard(len(tokens), len(lengths), lambda: (tokens, offsets))
