"""The recipes of the paper's table and of the generated sentences.

The paper's is WMT 2014, validated on newstest2013 and tested on the full newstest2014. The line counts are those of
WMT's files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recipe:
    """A prefix means two files, `<prefix>.<source>` and `<prefix>.<target>`.

    The BPE is learned on all training pairs. Then pairs are left out that have an empty side, a side of more than
    `max_length` pieces, or more than `ratio` times as many pieces on one side as on the other.
    """

    name: str  # data.name in the configs
    train: Sequence[str]
    valid: str
    test: str
    merges: int
    ratio: float
    max_length: int = 250
    source: str = "en"
    target: str = "de"
    lines: Mapping[str, int] = field(default_factory=dict)  # that each prefix must have


WMT14 = Recipe(
    name="wmt14_en_de",
    train=("europarl-v7.de-en", "commoncrawl.de-en", "news-commentary-v9.de-en"),
    valid="newstest2013",
    test="newstest2014",
    merges=40_000,
    ratio=1.5,
    lines={
        "europarl-v7.de-en": 1_920_209,
        "commoncrawl.de-en": 2_399_123,
        "news-commentary-v9.de-en": 201_288,
        "newstest2013": 3_000,
        "newstest2014": 3_003,
    },
)
GRAMMAR = Recipe(name="grammar", train=("train",), valid="valid", test="test", merges=1500, ratio=2.0)
