"""From a line of raw text to Moses tokens, and back.

As in the usual WMT recipes: normalize-punctuation.perl, remove-non-printing-char.perl (a soft hyphen becomes a blank
and splits a word), tokenizer.perl with aggressive hyphen splitting. sacremoses does the first and the last.
docs/data.md lists all differences from the Perl scripts.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

from engine.errors import UserError

LANGUAGES = ("de", "en")  # only their rules are tested here
# Every manifest holds it: change it with the rules.
RULES = "nfc, moses punctuation, blanks for what does not print, moses tokens with @-@, unescaped"
FINAL_DOT = re.compile(r"(?<=[^\s.])\.$")  # the Perl script splits it even from abbreviations
WORD_START = "\u2581"  # the BPE's mark of a new token; `tokenize` removes it from text


@dataclass(frozen=True)
class Moses:
    normalizer: MosesPunctNormalizer
    tokenizer: MosesTokenizer
    detokenizer: MosesDetokenizer

    def tokenize(self, line: str, normalize: bool = True) -> str:
        """The tokens of a raw line, separated by single spaces.

        Without `normalize` only typographic apostrophes are replaced, as in the test sets of fairseq's recipe.
        """
        line = unicodedata.normalize("NFC", line).replace(WORD_START, "_")
        if normalize:  # Perl's rule for a last quotation mark needs the newline
            line = _blank_non_printing(self.normalizer.normalize(line + "\n"))
        else:
            line = line.replace("\u2019", "'")
        tokens = self.tokenizer.tokenize(line, aggressive_dash_splits=True, return_str=True, escape=False)
        return FINAL_DOT.sub(" .", " ".join(tokens.split()))

    def detokenize(self, tokens: str) -> str:
        return self.detokenizer.detokenize(tokens.split(), unescape=False)


@cache
def moses(language: str) -> Moses:
    """The rules for "de" or "en". UserError for any other language."""
    if language not in LANGUAGES:
        raise UserError(f"no tokenization rules for the language '{language}': there are {' and '.join(LANGUAGES)}")
    return Moses(MosesPunctNormalizer(language), MosesTokenizer(language), MosesDetokenizer(language))


def _blank_non_printing(line: str) -> str:
    r"""A blank for each character of Unicode's category C, Perl's \p{C}."""
    if line.isprintable():  # fast, and nearly always true
        return line
    return "".join(" " if unicodedata.category(character)[0] == "C" else character for character in line)
