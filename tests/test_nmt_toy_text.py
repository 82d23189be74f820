"""The generated sentences are correct German."""

import random

import pytest

from nmt.prepare import toy_text
from nmt.prepare.toy_text import SIZES, generate


@pytest.fixture(scope="module")
def pairs() -> dict[str, str]:
    return dict(generate(sum(SIZES.values())))


@pytest.mark.parametrize(
    ("noun", "determiner", "adjective", "forms"),
    [
        (["dog", "Hund", "m"], "the", ["old", "alt"], "der alte Hund, den alten Hund, dem alten Hund"),
        (["dog", "Hund", "m"], "my", ["old", "alt"], "mein alter Hund, meinen alten Hund, meinem alten Hund"),
        (["cat", "Katze", "f"], "this", ["old", "alt"], "diese alte Katze, diese alte Katze, dieser alten Katze"),
        (["cat", "Katze", "f"], "a", ["old", "alt"], "eine alte Katze, eine alte Katze, einer alten Katze"),
        (["book", "Buch", "n"], "every", ["", ""], "jedes Buch, jedes Buch, jedem Buch"),
        (["book", "Buch", "n"], "a", ["old", "alt"], "ein altes Buch, ein altes Buch, einem alten Buch"),
    ],
)
def test_gender_and_case(monkeypatch, noun, determiner, adjective, forms):
    monkeypatch.setattr(toy_text, "DETERMINERS", {determiner: toy_text.DETERMINERS[determiner]})
    monkeypatch.setattr(toy_text, "ADJECTIVES", [adjective])
    german = {tuple(toy_text._noun(random.Random(seed), [noun])[2]) for seed in range(20)}
    assert tuple(forms.split(", ")) in {tuple(" ".join(form.split()) for form in of_cases) for of_cases in german}


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("Every sister helps him today.", "Jede Schwester hilft ihm heute."),
        ("On Monday he stayed.", "Am Montag ist er geblieben."),
        ("She gave a small girl an apple today.", "Sie hat heute einem kleinen Mädchen einen Apfel gegeben."),
        ("The dog believes that she works.", "Der Hund glaubt, dass sie arbeitet."),
        ("He works in winter because he followed him today.", "Er arbeitet im Winter, weil er ihm heute gefolgt ist."),
        ("He works, but this quiet doctor can sleep.", "Er arbeitet, aber dieser ruhige Arzt kann schlafen."),
        (
            "This brother can forget the lamp in the house on Monday.",
            "Dieser Bruder kann am Montag die Lampe im Haus vergessen.",
        ),
    ],
)
def test_word_order_and_verb_forms(pairs, english, german):
    assert pairs[english] == german


def test_sentences_are_enough_and_each_stands_once(pairs):
    assert len(pairs) == sum(SIZES.values()) == len(set(pairs.values()))
    assert list(pairs.items())[:20] == generate(20)
    for text in (*pairs, *pairs.values()):
        assert text[0].isupper() and text.endswith(".") and "  " not in text and " ," not in text
