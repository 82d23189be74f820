"""Joint byte-pair encoding of Moses tokens: one vocabulary for both languages, as all embeddings are shared.

A piece that begins a token carries the mark U+2581, so decoding gives back the tokens exactly, and no text can spell a
special token: `</s>` in a sentence is tokens like any others. The library tokenizers learns and applies the merges;
what is kept is a plain `codec.json` (languages, pieces in the order of their ids, merges), whose digest ties prepared
data, checkpoints and translations to each other.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
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
MAX_CHARACTERS = 1000  # characters with a piece of their own; Common Crawl has thousands that occur a few times
MIN_PAIR_COUNT = 2  # as in subword-nmt: what occurs once is not worth a merge


class Codec:
    """Text to ids and back, for two languages. `size` counts the special tokens too; `digest` is a SHA-256 in hex."""

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
        """Read `folder`/codec.json; UserError where it is missing or not one."""
        path = Path(folder) / FILE
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if tuple(kept["pieces"][: len(SPECIALS)]) != SPECIALS:
                raise ValueError("the special tokens are not where they should be")
            codec = cls(kept["source"], kept["target"], kept["pieces"], kept["merges"])
        except FileNotFoundError:
            raise UserError(f"{path} is not there: prepare the data first (python -m nmt.prepare --help)") from None
        except Exception as error:  # tokenizers raises bare Exception for pieces and merges that do not fit together
            raise UserError(f"{path}: not a codec ({error}); prepare the data again") from None
        moses(codec.source), moses(codec.target)
        return codec

    def save(self, folder: str | Path) -> None:
        """Write `folder`/codec.json, whole or not at all."""
        write_atomically(Path(folder) / FILE, self._serialised())

    def encode(self, line: str, language: str | None = None) -> list[int]:
        """Ids of one raw line, without <s> and </s>; `language` None means the source's. [] for an empty line."""
        return self.encode_tokens([self.tokenize(line, language or self.source)])[0]

    def encode_lines(self, lines: Iterable[str], language: str | None = None) -> list[list[int]]:
        """`encode` for many lines at once, which is much faster."""
        return self.encode_tokens([self.tokenize(line, language or self.source) for line in lines])

    def encode_tokens(self, lines: Sequence[str]) -> list[list[int]]:
        """Ids of lines that are Moses tokens already."""
        return [found.ids for found in self._bpe.encode_batch_fast(lines, add_special_tokens=False)]

    def decode(self, ids: Iterable[int], language: str | None = None) -> str:
        """The text of `ids`, up to the first </s>, special tokens left out; `language` None means the target's."""
        language = language or self.target
        return moses(language).detokenize(self.decode_tokens(ids))

    def decode_tokens(self, ids: Iterable[int]) -> str:
        """The Moses tokens of `ids`, separated by spaces: what tokenized BLEU counts."""
        pieces = []
        for index in map(int, ids):
            if index == EOS:
                break
            if index >= len(SPECIALS):
                pieces.append(self.pieces[index])
        return " ".join("".join(pieces).replace(WORD_START, " ").split())

    def tokenize(self, line: str, language: str | None = None, normalize: bool = True) -> str:
        """The Moses tokens of a raw line, as Moses.tokenize; `language` None means the target's."""
        return moses(language or self.target).tokenize(line, normalize)

    def _serialised(self) -> str:
        kept = {"source": self.source, "target": self.target, "pieces": self.pieces, "merges": self.merges}
        return json.dumps(kept, ensure_ascii=False, indent=0) + "\n"


def learn(
    files: Sequence[Path], characters: Mapping[str, int], merges: int, source: str, target: str, progress: bool = False
) -> Codec:
    """Learn at most `merges` merges from `files` (Moses tokens, UTF-8) of both languages together.

    `characters` are the counts of all characters in these files: the most frequent MAX_CHARACTERS get a piece each. The
    outcome depends on the files' content alone, neither on the number of threads nor on the order of the files.
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
        show_progress=progress,
    )
    tokenizer.train([str(path) for path in files], trainer)
    learned: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    return Codec(source, target, pieces, [" ".join(merge) for merge in learned["merges"]])


def _splitter() -> Steps:
    """Split at spaces, then mark the beginning of each token."""
    return Steps([WhitespaceSplit(), Metaspace(WORD_START, prepend_scheme="always", split=False)])
