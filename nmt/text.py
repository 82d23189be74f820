"""From a line of raw text to Moses tokens, and back.

The steps are those of the usual WMT recipes, in their order: normalize-punctuation.perl, remove-non-printing-char.perl
(a character that does not print becomes a blank, so a soft hyphen splits a word), tokenizer.perl with aggressive hyphen
splitting. sacremoses' port does the first and the last. docs/data.md lists all differences from the Perl scripts.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

from engine.errors import UserError

LANGUAGES = ("de", "en")  # only these languages' rules are tested here
# Every manifest holds this text: change it with the rules.
RULES = "nfc, moses punctuation, blanks for what does not print, moses tokens with @-@, unescaped"
FINAL_DOT = re.compile(r"(?<=[^\s.])\.$")  # the Perl script splits it off, even from an abbreviation
WORD_START = "\u2581"  # the BPE's mark of a new token; no text holds it


@dataclass(frozen=True)
class Moses:
    normalizer: MosesPunctNormalizer
    tokenizer: MosesTokenizer
    detokenizer: MosesDetokenizer

    def tokenize(self, line: str, normalize: bool = True) -> str:
        """The tokens of a raw line, separated by single spaces.

        Without `normalize` only the typographic apostrophe is replaced, as fairseq's recipe does in test sets.
        """
        line = unicodedata.normalize("NFC", line).replace(WORD_START, "_")
        if normalize:  # the Perl script's rule for a quotation mark at the end needs the newline
            line = _blank_non_printing(self.normalizer.normalize(line + "\n"))
        else:
            line = line.replace("\u2019", "'")
        tokens = self.tokenizer.tokenize(line, aggressive_dash_splits=True, return_str=True, escape=False)
        return FINAL_DOT.sub(" .", " ".join(tokens.split()))

    def detokenize(self, tokens: str) -> str:
        return self.detokenizer.detokenize(tokens.split(), unescape=False)


@cache
def moses(language: str) -> Moses:
    """The rules for `language` ("de" or "en"). UserError for any other language."""
    if language not in LANGUAGES:
        raise UserError(f"no tokenization rules for the language '{language}': there are {' and '.join(LANGUAGES)}")
    return Moses(MosesPunctNormalizer(language), MosesTokenizer(language), MosesDetokenizer(language))


def _blank_non_printing(line: str) -> str:
    r"""A blank for each character of Unicode's general category C (control, format, unassigned, ...), Perl's \p{C}."""
    if line.isprintable():  # true of nearly every line, and a fast test
        return line
    return "".join(" " if unicodedata.category(character)[0] == "C" else character for character in line)
