"""Moses tokens, the joint BPE, and the way back from ids to text."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacremoses import MosesPunctNormalizer, MosesTokenizer

from engine.errors import UserError
from nmt import codec as codec_module
from nmt.codec import BOS, EOS, PAD, SPECIALS, UNK, Codec, learn
from nmt.prepare.toy_text import generate
from nmt.text import WORD_START, moses

SENTENCES = {
    "en": [
        "Mr. Smith's well-known dog isn't here, is it?",
        'She said: "Give me 3.5 apples (or pears)!"',
        "The U.S. team won 12,000 dollars in 2014.",
    ],
    "de": [
        "Das ist z.B. ein saftig-grünes Gras, nicht wahr?",
        'Er sagte: "Am 3. Mai kostet es 3,50 Euro (oder mehr)".',
        "Die Bäume, die wir sahen, waren größer als dieser.",
    ],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Moses tokens of both languages: generated sentences and those above."""
    folder = tmp_path_factory.mktemp("codec")
    for language, side in zip(("en", "de"), zip(*generate(400), strict=True), strict=True):
        lines = [moses(language).tokenize(line) for line in (*side, *SENTENCES[language] * 3)]
        (folder / language).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [folder / "en", folder / "de"]


def characters(files):
    return Counter("".join(path.read_text(encoding="utf-8") for path in files))


@pytest.fixture(scope="module")
def codec(corpus):
    return learn(corpus, characters(corpus), 300, "en", "de")


def encode(codec: Codec, line: str, language: str = "en") -> list[int]:
    return codec.encode_lines([line], language)[0]


def test_the_vocabulary_begins_with_the_special_tokens(codec):
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    assert tuple(codec.pieces[:4]) == SPECIALS == ("<pad>", "<s>", "</s>", "<unk>")
    assert codec.size == len(set(codec.pieces)) and len(codec.merges) == 300


@pytest.mark.parametrize("language", ["en", "de"])
def test_sentences_come_back_as_they_were(codec, language):
    for line in SENTENCES[language]:
        assert codec.decode(encode(codec, line, language), language) == line


@pytest.mark.parametrize(
    ("language", "line", "tokens"),
    [
        ("en", "Mr. Smith's dog isn't well-known.", "Mr. Smith 's dog isn 't well @-@ known ."),
        ("de", "Das ist z.B. so, wie's am 3. Mai war.", "Das ist z.B. so , wie ' s am 3. Mai war ."),
        ("de", "„Ja“, sagte er – „nein“.", '" Ja " , sagte er - " nein " .'),
        ("en", "AT&T <b> [x] a|b", "AT & T < b > [ x ] a | b"),
        ("en", "a\u00adb\x00c\td\u2028e\u200bf\x85g", "a b c d e f g"),  # soft hyphen, NUL, tab, separators
        ("en", "one\rtwo", "onetwo"),  # as normalize-punctuation.perl has it
        ("de", 'Er sagte: "Nein."', 'Er sagte : " Nein " .'),  # at the end of a line alone
        ("en", "We met Mr. Smith of the U.S.", "We met Mr. Smith of the U.S ."),
        ("de", "a\u0308rgern", "ärgern"),  # decomposed
        ("en", f"a{WORD_START}b", "a _ b"),
        ("en", " \u3000\t ", ""),
    ],
)
def test_moses_tokens(language, line, tokens):
    assert moses(language).tokenize(line) == tokens


@pytest.mark.parametrize("language", ["en", "de"])
def test_only_the_escapes_differ_from_the_usual_recipe(language):
    normalizer, tokenizer = MosesPunctNormalizer(language), MosesTokenizer(language)
    for line in SENTENCES[language]:
        usual = tokenizer.tokenize(normalizer.normalize(line + "\n"), aggressive_dash_splits=True, return_str=True)
        assert moses(language).tokenize(line) == usual.replace("&apos;", "'").replace("&quot;", '"')


def test_there_are_rules_for_english_and_german_alone():
    with pytest.raises(UserError, match="language 'fr': there are de and en"):
        moses("fr")


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abdeghilnorstuwßäöüDEHKMS.,?!'\"-() 0123", max_size=80),
    language=st.sampled_from(["en", "de"]),
)
def test_decoded_tokens_are_the_tokens_encoded(codec, text, language):
    tokens = codec.tokenize(text, language)
    ids = encode(codec, text, language)
    known = set("".join(codec.pieces[len(SPECIALS) :]))
    assert (
        codec.decode_tokens(ids) == " ".join("".join(c for c in word if c in known) for word in tokens.split()).strip()
    )
    assert (UNK in ids) == any(c not in known for c in tokens.replace(" ", ""))


def test_pieces_are_those_of_the_textbook_algorithm(codec):
    """Byte-pair encoding in plain code: apply the earliest-learned merge wherever it occurs."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(codec.merges)}
    for word in {word for line in SENTENCES["de"] + SENTENCES["en"] for word in codec.tokenize(line).split()}:
        pieces = list(WORD_START + word)
        while pairs := [pair for pair in zip(pieces, pieces[1:], strict=False) if pair in ranks]:
            best, joined, index = min(pairs, key=ranks.get), [], 0
            while index < len(pieces):
                both = tuple(pieces[index : index + 2]) == best
                joined.append("".join(pieces[index : index + 1 + both]))
                index += 1 + both
            pieces = joined
        assert [codec.pieces[index] for index in codec.encode_tokens([word])[0]] == pieces


def test_no_text_spells_a_special_token(codec):
    ids = encode(codec, "</s> <s> <pad> <unk> a")
    assert not {PAD, BOS, EOS} & set(ids)
    assert codec.encode_tokens(["<pad> </s>"]) != [[PAD, EOS]]


def test_unknown_text_and_empty_lines(codec):
    ids = encode(codec, "你好 ☃")
    assert UNK in ids and set(codec.decode_tokens(ids).split()) == set()
    assert codec.decode(ids) == ""
    assert encode(codec, "") == encode(codec, "  \u2028 ") == []
    assert codec.encode_lines(["", "a", ""], "de") == [[], encode(codec, "a", "de"), []]
    assert codec.decode([]) == codec.decode_tokens([EOS]) == ""


def test_decoding_ends_at_the_first_end(codec):
    ids = encode(codec, "Der Hund", "de")
    padded = np.array([BOS, *ids, EOS, *ids, PAD], dtype=np.int64)
    assert codec.decode(padded) == "Der Hund"


def test_rare_characters_become_unknown(corpus, monkeypatch):
    monkeypatch.setattr(codec_module, "MAX_CHARACTERS", 10)
    small = learn(corpus, characters(corpus), 20, "en", "de")
    frequent = [character for character, _ in characters(corpus).most_common(12) if character not in " \n"][:10]
    assert set("".join(small.pieces[4:])) == {WORD_START, *frequent}
    assert UNK in encode(small, "Bären", "de")


def test_learning_depends_on_the_text_alone(corpus, codec):
    again = learn(corpus[::-1], characters(corpus), 300, "en", "de")
    assert again.digest == codec.digest
    program = (
        "import sys; from collections import Counter; from pathlib import Path; from nmt.codec import learn\n"
        "files = [Path(name) for name in sys.argv[1:]]\n"
        "print(learn(files, Counter(''.join(file.read_text('utf-8') for file in files)), 300, 'en', 'de').digest)"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "3", "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, corpus)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == codec.digest


def test_saved_and_loaded(codec, tmp_path):
    codec.save(tmp_path)
    loaded = Codec.load(tmp_path)
    assert (loaded.digest, loaded.size, loaded.source, loaded.target) == (codec.digest, codec.size, "en", "de")
    assert encode(loaded, SENTENCES["en"][0]) == encode(codec, SENTENCES["en"][0])


def test_a_missing_or_damaged_codec_is_named(codec, tmp_path):
    with pytest.raises(UserError, match=r"codec\.json is not there: prepare the data"):
        Codec.load(tmp_path)
    codec.save(tmp_path)
    path = tmp_path / "codec.json"
    text = path.read_text(encoding="utf-8")
    for damaged in (
        text[: len(text) // 2],
        "{}",
        text.replace("<pad>", "pad", 1),
        text.replace(codec.merges[0], "x y", 1),
    ):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"codec\.json: not a codec") as error:
            Codec.load(tmp_path)
        assert "\n" not in str(error.value)
