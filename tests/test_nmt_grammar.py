"""The generated sentences: German as it should be, word by word."""

import pytest

from nmt.prepare import toy_words as words
from nmt.prepare.toy_text import CASES, Clause, Phrase, Speaker, _finish, _german_noun, generate
from nmt.prepare.toy_words import Adjective

RED, DARK = Adjective("red", "rot", "rot"), Adjective("dark", "dunkel", "dunkl")
HE = Phrase(1, ("he", "him"), {"nom": "er", "acc": "ihn", "dat": "ihm"}, is_pronoun=True)
I = Phrase(0, ("I", "me"), {"nom": "ich", "acc": "mich", "dat": "mir"}, is_pronoun=True)  # noqa: E741
THEM = Phrase(2, ("they", "them"), {"nom": "sie", "acc": "sie", "dat": "ihnen"}, is_pronoun=True)
BOOK = Phrase(1, ("the book", "the book"), {"nom": "das Buch", "acc": "das Buch"})
WOMAN = Phrase(1, ("the woman", "the woman"), {"nom": "die Frau", "acc": "die Frau", "dat": "der Frau"})
TODAY, HERE = ("today", "heute"), ("in the park", "im Park")


def noun(english):
    return next(noun for noun in (*words.ANIMATE, *words.THINGS, *words.PLACES) if noun.english[0] == english)


def verb(english):
    groups = (words.THING_VERBS, words.SOCIAL_VERBS, words.DATIVE_VERBS, words.GIVING_VERBS, words.INTRANSITIVE_VERBS)
    return next(verb for group in groups for verb in group if verb.english[0] == english)


@pytest.mark.parametrize(
    ("english", "plural", "determiner", "adjectives", "forms"),
    [
        ("dog", False, "the", [RED], "der rote Hund, den roten Hund, dem roten Hund, des roten Hundes"),
        ("dog", False, "a", [RED], "ein roter Hund, einen roten Hund, einem roten Hund, eines roten Hundes"),
        ("dog", True, "the", [RED], "die roten Hunde, die roten Hunde, den roten Hunden, der roten Hunde"),
        ("dog", True, "two", [RED], "zwei rote Hunde, zwei rote Hunde, zwei roten Hunden, zwei roter Hunde"),
        ("dog", True, "many", [DARK], "viele dunkle Hunde, " * 2 + "vielen dunklen Hunden, vieler dunkler Hunde"),
        ("woman", False, "our", [DARK], "unsere dunkle Frau, " * 2 + "unserer dunklen Frau, unserer dunklen Frau"),
        ("child", False, "no", [RED], "kein rotes Kind, kein rotes Kind, keinem roten Kind, keines roten Kindes"),
        ("child", False, "this", [RED], "dieses rote Kind, dieses rote Kind, diesem roten Kind, dieses roten Kindes"),
        ("child", True, "my", [RED], "meine roten Kinder, " * 2 + "meinen roten Kindern, meiner roten Kinder"),
        ("boy", False, "every", [], "jeder Junge, jeden Jungen, jedem Jungen, jedes Jungen"),
        ("student", False, "a", [], "ein Student, einen Studenten, einem Studenten, eines Studenten"),
        ("teacher", False, "the", [], "der Lehrer, den Lehrer, dem Lehrer, des Lehrers"),
        ("girl", True, "these", [], "diese Mädchen, diese Mädchen, diesen Mädchen, dieser Mädchen"),
        ("kitchen table", False, "his", [], "sein *, seinen *, seinem *, seines *es".replace("*", "Küchentisch")),
        ("car", True, "some", [], "einige Autos, einige Autos, einigen Autos, einiger Autos"),
    ],
)  # fmt: skip
def test_noun_phrases(english, plural, determiner, adjectives, forms):
    form = "p" if plural else noun(english).gender
    assert [_german_noun(noun(english), form, determiner, adjectives, case) for case in CASES] == forms.split(", ")


@pytest.mark.parametrize(
    ("clause", "english", "second", "first", "final"),
    [
        (
            Clause(HE, verb("open"), "present", objects=(("acc", BOOK),), time=TODAY),
            "he opens the book today",
            "er macht heute das Buch auf",
            "macht er heute das Buch auf",
            "er heute das Buch aufmacht",
        ),
        (
            Clause(I, verb("open"), "past", negated=True, objects=(("acc", BOOK),), place=HERE),
            "I did not open the book in the park",
            "ich habe das Buch nicht im Park aufgemacht",
            "habe ich das Buch nicht im Park aufgemacht",
            "ich das Buch nicht im Park aufgemacht habe",
        ),
        (
            Clause(THEM, verb("give"), "must not", negated=True, objects=(("dat", WOMAN), ("acc", BOOK)), time=TODAY),
            "they must not give the woman the book today",
            "sie dürfen heute der Frau das Buch nicht geben",
            "dürfen sie heute der Frau das Buch nicht geben",
            "sie heute der Frau das Buch nicht geben dürfen",
        ),
        (
            Clause(HE, verb("thank"), "want to", objects=(("dat", THEM),), time=TODAY),
            "he wants to thank them today",
            "er will ihnen heute danken",
            "will er ihnen heute danken",
            "er ihnen heute danken will",
        ),
        (
            Clause(THEM, verb("stay"), "past", place=HERE),
            "they stayed in the park",
            "sie sind im Park geblieben",
            "sind sie im Park geblieben",
            "sie im Park geblieben sind",
        ),
        (
            Clause(WOMAN, None, "future", predicate=DARK, negated=True),
            "the woman will not be dark",
            "die Frau wird nicht dunkel sein",
            "wird die Frau nicht dunkel sein",
            "die Frau nicht dunkel sein wird",
        ),
    ],
)
def test_word_order(clause, english, second, first, final):
    def spoken(order):
        return " ".join(word for word in clause.german(order) if word)

    assert " ".join(word for word in clause.english() if word) == english
    assert (spoken("second"), spoken("first"), spoken("final")) == (second, first, final)
    if clause.time:
        assert [word for word in clause.german("second", fronted=True) if word][:2] == ["heute", first.split()[0]]


def test_questions():
    clause = Clause(HE, verb("see"), "present", objects=(("acc", THEM),))
    assert _finish(clause.english(question=True), "?") == "Does he see them?"
    assert _finish(clause.german("first"), "?") == "Sieht er sie?"


def test_commas_and_capitals():
    assert _finish(["der Mann , der lacht ,", ", weil er singt ,"], ".") == "Der Mann, der lacht, weil er singt."


def test_sentences_are_a_function_of_the_seed():
    assert generate(20) == generate(40)[:20] != generate(20, seed=1)
    assert generate(2)[1] == ("We should eat the egg.", "Wir sollen das Ei essen.")
    assert len({english for english, _ in generate(500)}) == 500


def test_all_sentences_are_well_formed():
    speaker = Speaker(5)
    for english, german in (speaker.sentence() for _ in range(2000)):
        for text in (english, german):
            assert text[0].isupper() and text[-1] in ".?" and text[:-1].count(".") == 0
            assert "  " not in text and " ," not in text and ",," not in text and ",." not in text
        assert english.endswith("?") == german.endswith("?")
