"""From a line of raw text to Moses tokens, and back: what the BPE sees, and what tokenized BLEU counts.

The steps are those of the usual WMT recipes (normalize-punctuation, remove-non-printing-char, tokenizer with aggressive
hyphen splitting, in sacremoses' port), each with the settings of its language. Two things differ from the Perl scripts:
tokens are not escaped (`'s`, not `&apos;s`: the number of tokens is the same, and nothing in the text can be taken for
an escape when it is put together again), and text is brought to Unicode's composed form first, so that an umlaut is one
character whoever typed it.
"""

import sys
import unicodedata
from dataclasses import dataclass
from functools import cache

from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

from engine.errors import UserError

LANGUAGES = ("de", "en")  # those whose rules are tested here
RULES = "nfc, moses punctuation, moses tokens with @-@, unescaped"  # in every manifest: change it with the rules
WORD_START = "\u2581"  # the BPE's mark of a new token; never part of a text
# Every kind of white space becomes a space, but the no-break space: Moses has rules of its own for it.
_CLEAN = {code: " " for code in range(sys.maxunicode) if chr(code).isspace() and chr(code) != "\u00a0"}
_CLEAN[ord(WORD_START)] = "_"


@dataclass(frozen=True)
class Moses:
    """Moses' rules for one language."""

    normalizer: MosesPunctNormalizer
    tokenizer: MosesTokenizer
    detokenizer: MosesDetokenizer

    def tokenize(self, line: str, normalize: bool = True) -> str:
        """The tokens of a raw line, separated by single spaces; "" for an empty line.

        Without `normalize` punctuation stays as it is, but for the typographic apostrophe: what fairseq's recipe does
        with test sets.
        """
        line = unicodedata.normalize("NFC", line).translate(_CLEAN)
        line = self.normalizer.normalize(line) if normalize else line.replace("\u2019", "'")
        tokens = self.tokenizer.tokenize(line, aggressive_dash_splits=True, return_str=True, escape=False)
        return " ".join(tokens.split())

    def detokenize(self, tokens: str) -> str:
        """The text that such tokens stand for."""
        return self.detokenizer.detokenize(tokens.split(), unescape=False)


@cache
def moses(language: str) -> Moses:
    """The rules for `language` ("de" or "en"); UserError for any other."""
    if language not in LANGUAGES:
        raise UserError(f"no tokenization rules for the language '{language}': there are {' and '.join(LANGUAGES)}")
    normalizer = MosesPunctNormalizer(language, post_remove_control_chars=True)
    return Moses(normalizer, MosesTokenizer(language), MosesDetokenizer(language))
