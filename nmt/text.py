"""From a line of raw text to Moses tokens, and back: what the BPE sees, and what tokenized BLEU counts.

The steps are those of the usual WMT recipes, in their order: normalize-punctuation.perl, remove-non-printing-char.perl
(a character that does not print becomes a blank, so that a soft hyphen splits a word), tokenizer.perl with aggressive
hyphen splitting; the first and the last in sacremoses' port, each with the settings of its language. docs/data.md lists
what differs from the Perl scripts.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

from sacremoses import MosesDetokenizer, MosesPunctNormalizer, MosesTokenizer

from engine.errors import UserError

LANGUAGES = ("de", "en")  # those whose rules are tested here
# In every manifest: change it with the rules.
RULES = "nfc, moses punctuation, blanks for what does not print, moses tokens with @-@, unescaped"
FINAL_DOT = re.compile(r"(?<=[^\s.])\.$")  # the Perl script splits it off even from an abbreviation
WORD_START = "\u2581"  # the BPE's mark of a new token; never part of a text


@dataclass(frozen=True)
class Moses:
    """Moses' rules for one language."""

    normalizer: MosesPunctNormalizer
    tokenizer: MosesTokenizer
    detokenizer: MosesDetokenizer

    def tokenize(self, line: str, normalize: bool = True) -> str:
        """The tokens of a raw line, separated by single spaces; "" for an empty line.

        Without `normalize` the line stays as it is, but for the typographic apostrophe: what fairseq's recipe does with
        test sets.
        """
        line = unicodedata.normalize("NFC", line).replace(WORD_START, "_")
        if normalize:  # the Perl script's rule for a last quotation mark needs the line's end
            line = _blank_non_printing(self.normalizer.normalize(line + "\n"))
        else:
            line = line.replace("\u2019", "'")
        tokens = self.tokenizer.tokenize(line, aggressive_dash_splits=True, return_str=True, escape=False)
        return FINAL_DOT.sub(" .", " ".join(tokens.split()))

    def detokenize(self, tokens: str) -> str:
        """The text that such tokens stand for."""
        return self.detokenizer.detokenize(tokens.split(), unescape=False)


@cache
def moses(language: str) -> Moses:
    """The rules for `language` ("de" or "en"); UserError for any other."""
    if language not in LANGUAGES:
        raise UserError(f"no tokenization rules for the language '{language}': there are {' and '.join(LANGUAGES)}")
    return Moses(MosesPunctNormalizer(language), MosesTokenizer(language), MosesDetokenizer(language))


def _blank_non_printing(line: str) -> str:
    r"""A blank for every character of Unicode's general category C (control, format, unassigned, ...): Perl's \p{C}."""
    if line.isprintable():  # nearly every line, and much faster
        return line
    return "".join(" " if unicodedata.category(character)[0] == "C" else character for character in line)
