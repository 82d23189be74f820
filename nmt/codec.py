"""Joint byte-pair encoding of Moses tokens: one vocabulary for both languages, because they share all embeddings.

A piece that begins a token carries the mark U+2581. So decoding gives back the exact tokens, and no text spells a
special token. Prepared data and checkpoints with the same digest belong together.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.pre_tokenizers import Sequence as Steps
from tokenizers.trainers import BpeTrainer

from engine.errors import UserError
from engine.files import write_atomically
from nmt.text import WORD_START, moses

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
FILE = "codec.json"
MAX_CHARACTERS = 1000  # that have a piece; Common Crawl has thousands of rare ones
MIN_PAIR_COUNT = 2  # as in subword-nmt


class Codec:
    """`size` includes special tokens. A `language` of None is the source in encode_lines, elsewhere the target."""

    def __init__(self, source: str, target: str, pieces: Sequence[str], merges: Sequence[str]) -> None:
        self.source, self.target = source, target
        self.pieces, self.merges = list(pieces), list(merges)
        self.size = len(self.pieces)
        self.digest = sha256(self._serialised().encode()).hexdigest()
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        model = BPE(ids, [tuple(merge.split(" ")) for merge in self.merges], unk_token=SPECIALS[UNK], fuse_unk=True)
        self._bpe = Tokenizer(model)
        self._bpe.pre_tokenizer = _splitter()

    @classmethod
    def load(cls, folder: str | Path) -> "Codec":
        """Read `folder`/codec.json. UserError if it is missing or no codec."""
        path = Path(folder) / FILE
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if tuple(kept["pieces"][: len(SPECIALS)]) != SPECIALS:
                raise ValueError("the special tokens are not where they should be")
            codec = cls(kept["source"], kept["target"], kept["pieces"], kept["merges"])
        except FileNotFoundError:
            raise UserError(f"{path} is not there: prepare the data first (python -m nmt.prepare --help)") from None
        except Exception as error:  # tokenizers raises a bare one if pieces and merges do not fit
            raise UserError(f"{path}: not a codec ({error}); prepare the data again") from None
        moses(codec.source), moses(codec.target)  # UserError for a language without rules
        return codec

    def save(self, folder: str | Path) -> None:
        write_atomically(Path(folder) / FILE, self._serialised())

    def encode_lines(self, lines: Iterable[str], language: str | None = None) -> list[list[int]]:
        """Ids of raw lines, without <s> and </s>."""
        return self.encode_tokens([self.tokenize(line, language or self.source) for line in lines])

    def encode_tokens(self, lines: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._bpe.encode_batch_fast(lines, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], language: str | None = None) -> str:
        """Text of `ids` up to the first </s>, without special tokens."""
        return moses(language or self.target).detokenize(self.decode_tokens(ids))

    def decode_tokens(self, ids: Iterable[int]) -> str:
        """Moses tokens of `ids`, separated by spaces."""
        sentence = takewhile(lambda index: index != EOS, map(int, ids))
        pieces = "".join(self.pieces[index] for index in sentence if index >= len(SPECIALS))
        return " ".join(pieces.replace(WORD_START, " ").split())

    def tokenize(self, line: str, language: str | None = None, normalize: bool = True) -> str:
        return moses(language or self.target).tokenize(line, normalize)

    def _serialised(self) -> str:
        kept = {"source": self.source, "target": self.target, "pieces": self.pieces, "merges": self.merges}
        return json.dumps(kept, ensure_ascii=False, indent=0) + "\n"


def learn(files: Sequence[Path], characters: Mapping[str, int], merges: int, source: str, target: str) -> Codec:
    """Learn at most `merges` merges from `files` (Moses tokens, UTF-8) of both languages.

    `characters` counts all their characters; the MAX_CHARACTERS most frequent get a piece each.
    """
    ranked = sorted(characters.keys() - {" ", "\n"}, key=lambda character: (-characters[character], character))
    alphabet = [WORD_START, *ranked[:MAX_CHARACTERS]]
    tokenizer = Tokenizer(BPE(unk_token=SPECIALS[UNK]))
    tokenizer.pre_tokenizer = _splitter()
    trainer = BpeTrainer(
        vocab_size=len(SPECIALS) + len(alphabet) + merges,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=list(SPECIALS),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in files], trainer)
    learned: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    return Codec(source, target, pieces, [" ".join(merge) for merge in learned["merges"]])


def _splitter() -> Steps:
    return Steps([WhitespaceSplit(), Metaspace(WORD_START, prepend_scheme="always", split=False)])
