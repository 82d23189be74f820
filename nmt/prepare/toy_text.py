"""English-German sentences from a small grammar: the data set that needs no download.

It has what makes German hard: gender and case on articles, adjectives and pronouns; the finite verb second in main
clauses and last in subordinate ones; the perfect with haben or sein; verbs with the dative. The English determines the
German.
"""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {"train": 8_000, "valid": 500, "test": 500}
SEED = 2009
CASES = ("nom", "acc", "dat")

# Endings for m, f and n, by case. "-" means none.
THE = {"nom": "er ie as", "acc": "en ie as", "dat": "em er em"}
AFTER_DER = {"nom": "e e e", "acc": "en e e", "dat": "en en en"}  # adjectives
DIES = {"nom": "er e es", "acc": "en e es", "dat": "em er em"}
EIN = DIES | {"nom": "- e -", "acc": "en e -"}
AFTER_EIN = AFTER_DER | {"nom": "er e es", "acc": "en e es"}
DETERMINERS = {  # English: German stem, endings, endings of the adjective
    "the": ("d", THE, AFTER_DER),
    "this": ("dies", DIES, AFTER_DER),
    "every": ("jed", DIES, AFTER_DER),
    "a": ("ein", EIN, AFTER_EIN),
    "my": ("mein", EIN, AFTER_EIN),
}
PRONOUNS = (("he", "him", ("er", "ihn", "ihm")), ("she", "her", ("sie", "sie", "ihr")))

Words = list[list[str]]


def _words(text: str) -> Words:
    return [word.split(":") for word in text.split()]


ADJECTIVES = _words("big:groß small:klein old:alt beautiful:schön strange:seltsam new:neu quiet:ruhig")
PEOPLE = _words("""man:Mann:m woman:Frau:f child:Kind:n teacher:Lehrer:m doctor:Arzt:m girl:Mädchen:n sister:Schwester:f
    brother:Bruder:m mother:Mutter:f friend:Freund:m dog:Hund:m cat:Katze:f horse:Pferd:n""")
THINGS = _words("""table:Tisch:m lamp:Lampe:f window:Fenster:n door:Tür:f book:Buch:n letter:Brief:m flower:Blume:f
    picture:Bild:n key:Schlüssel:m bottle:Flasche:f hat:Hut:m bicycle:Fahrrad:n apple:Apfel:m egg:Ei:n""")
PLACES = _words(
    """house:Haus:n garden:Garten:m kitchen:Küche:f school:Schule:f park:Park:m
    city:Stadt:f village:Dorf:n hotel:Hotel:n"""
)
VERBS = (  # objects' cases; English base, third person, past; German infinitive, third person, perfect
    ("", "sleep:sleeps:slept:schlafen:schläft:hat:geschlafen work:works:worked:arbeiten:arbeitet:hat:gearbeitet"),
    ("", "stay:stays:stayed:bleiben:bleibt:ist:geblieben come:comes:came:kommen:kommt:ist:gekommen"),
    ("acc", "buy:buys:bought:kaufen:kauft:hat:gekauft find:finds:found:finden:findet:hat:gefunden"),
    ("acc", "carry:carries:carried:tragen:trägt:hat:getragen wash:washes:washed:waschen:wäscht:hat:gewaschen"),
    ("acc", "see:sees:saw:sehen:sieht:hat:gesehen forget:forgets:forgot:vergessen:vergisst:hat:vergessen"),
    ("dat", "help:helps:helped:helfen:hilft:hat:geholfen thank:thanks:thanked:danken:dankt:hat:gedankt"),
    ("dat", "follow:follows:followed:folgen:folgt:ist:gefolgt"),
    ("dat acc", "give:gives:gave:geben:gibt:hat:gegeben show:shows:showed:zeigen:zeigt:hat:gezeigt"),
)
SAYING = _words("say:sagt believe:glaubt hope:hofft")
HELPERS = {"will": "wird", "can": "kann", "must": "muss"}
TENSES = ("present", "present", "past", "past", *HELPERS)
TIMES = (
    ("", ""),
    ("", ""),
    ("today", "heute"),
    ("at night", "nachts"),
    ("on Monday", "am Montag"),
    ("in winter", "im Winter"),
)
PREPOSITIONS = (("in", "in"), ("behind", "hinter"), ("in front of", "vor"), ("near", "bei"))
CONTRACTIONS = {" in dem ": " im ", " bei dem ": " beim "}
SUBORDINATE = (("because", "weil"), ("although", "obwohl"), ("if", "wenn"))
COORDINATE = (("and", "und"), ("but", "aber"))


class Clause(NamedTuple):
    english: str  # without the time
    time: str
    second: str
    second_after_time: str  # the time comes first
    final: str


def write(folder: Path) -> None:
    """Write <split>.en and <split>.de. No English sentence is in two splits."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = iter(generate(sum(SIZES.values())))
    for split, size in SIZES.items():
        for language, side in zip(("en", "de"), zip(*(next(pairs) for _ in range(size)), strict=True), strict=True):
            temporary = folder / f"{split}.{language}.{os.getpid()}"
            temporary.write_text("".join(f"{line}\n" for line in side), encoding="utf-8", newline="")
            os.replace(temporary, folder / f"{split}.{language}")


def generate(count: int) -> list[tuple[str, str]]:
    """Pairs (English, German), each English sentence once."""
    draw = random.Random(SEED)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        english, german = _sentence(draw)
        pairs.setdefault(_finished(english), _finished(german))
    return list(pairs.items())


def _sentence(draw: random.Random) -> tuple[str, str]:
    kind = _one_of(draw, ("alone", "alone", "that", "coordinate", "subordinate"))
    one, other = _clause(draw), _clause(draw)
    first = f"{one.english} {one.time}"
    if kind == "alone":
        if one.time and _one_of(draw, (True, False)):
            return f"{one.time} {one.english}", one.second_after_time
        return first, one.second
    if kind == "that":
        (subject, _, german, _), (say, sagt) = _noun(draw, PEOPLE), _one_of(draw, SAYING)
        return f"{subject} {say}s that {first}", f"{german[0]} {sagt}, dass {one.final}"
    if kind == "coordinate":
        english, german = _one_of(draw, COORDINATE)
        return f"{first}, {english} {other.english} {other.time}", f"{one.second}, {german} {other.second}"
    english, german = _one_of(draw, SUBORDINATE)
    return f"{first} {english} {other.english} {other.time}", f"{one.second}, {german} {other.final}"


def _clause(draw: random.Random) -> Clause:
    subject, _, german_subject, _ = _noun(draw, PEOPLE, can_be_pronoun=True)
    cases, verbs = _one_of(draw, VERBS)
    base, third, past, infinitive, presently, auxiliary, participle = _one_of(draw, _words(verbs))
    tense = _one_of(draw, TENSES)
    if tense == "present":
        verb, finite, closing = third, presently, ""
    elif tense == "past":
        verb, finite, closing = past, auxiliary, participle
    else:
        verb, finite, closing = f"{tense} {base}", HELPERS[tense], infinitive

    english, pronouns, rest = [subject, verb], "", ""
    for case in cases.split():
        is_person = case == "dat"
        _, noun, german, is_pronoun = _noun(draw, PEOPLE if is_person else THINGS, can_be_pronoun=is_person)
        english.append(noun)
        text = german[CASES.index(case)]
        pronouns, rest = (text, rest) if is_pronoun else (pronouns, f"{rest} {text}")

    (in_, german_in), (_, place, german_place, _) = _one_of(draw, PREPOSITIONS), _noun(draw, PLACES)
    if _one_of(draw, (True, False, False)):
        english.append(f"{in_} {place}")
        rest += f" {german_in} {german_place[2]}"

    time, german_time = _one_of(draw, TIMES)
    return Clause(
        " ".join(english),
        time,
        f"{german_subject[0]} {finite} {pronouns} {german_time} {rest} {closing}",
        f"{german_time} {finite} {german_subject[0]} {pronouns} {rest} {closing}",
        f"{german_subject[0]} {pronouns} {german_time} {rest} {closing} {finite}",
    )


def _noun(draw: random.Random, nouns: Words, can_be_pronoun: bool = False) -> tuple[str, str, Sequence[str], bool]:
    """English subject, English object, German by case, whether it is a pronoun."""
    if can_be_pronoun and _one_of(draw, (True, False, False)):
        return *_one_of(draw, PRONOUNS), True
    (noun, german, gender), determiner = _one_of(draw, nouns), _one_of(draw, tuple(DETERMINERS))
    adjective, stem = _one_of(draw, (*ADJECTIVES, *[("", "")] * len(ADJECTIVES)))
    article, endings, endings_of_adjective = DETERMINERS[determiner]
    words = f"{adjective} {noun}".strip()
    english = f"{determiner}{'n' if determiner == 'a' and words[0] in 'aeo' else ''} {words}"

    def form(stem: str, endings: dict[str, str], case: str) -> str:
        return (stem + endings[case].split()["mfn".index(gender)]).removesuffix("-") if stem else ""

    by_case = [f"{form(article, endings, case)} {form(stem, endings_of_adjective, case)} {german}" for case in CASES]
    return english, english, by_case, False


def _one_of(draw: random.Random, items: Sequence[Any]) -> Any:
    """Uses random() alone: Python promises stable numbers for this method only."""
    return items[int(draw.random() * len(items))]


def _finished(text: str) -> str:
    """`text` with contractions, single spaces, a capital first letter and a full stop."""
    text = " ".join(text.split()).replace(" ,", ",")
    for apart, together in CONTRACTIONS.items():
        text = text.replace(apart, together)
    return f"{text[0].upper()}{text[1:]}."
