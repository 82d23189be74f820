"""English-German sentences from a grammar: the data set that needs no download.

Real parallel text does not ship with any package that this repository needs; message catalogues differ from one
installation to the next, and hold no sentences to learn from. So the sentences are generated, with what makes German
hard for a model: three genders, four cases and two numbers on articles, pronouns, adjectives and weak nouns; verb
second, verb first and verb final; separable verbs, perfect with haben and sein, modal verbs; verbs with the dative;
relative and subordinate clauses; contractions (im, zur) and compounds. What the sentences say is often odd, but both
sides are correct and the German follows from the English, so that a model can learn to get nearly all of it right.

Everything is a function of a fixed seed: the same files on every machine. The words are in nmt/prepare/toy_words.py.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from nmt.prepare import toy_words as words
from nmt.prepare.toy_words import Adjective, Noun, Verb

SIZES = {"train": 8_000, "valid": 500, "test": 500}
SEED = 2009
FIRST, THIRD, PLURAL = 0, 1, 2  # the persons that occur; we, they and plural nouns share their verb forms
CASES = ("nom", "acc", "dat", "gen")
FORMS = ("m", "f", "n", "p")  # genders, and the plural of all three

THE = {"nom": "der die das die", "acc": "den die das die", "dat": "dem der dem den", "gen": "des der des der"}
RELATIVE = THE | {"dat": "dem der dem denen"}
ENDINGS = {"nom": "er e es e", "acc": "en e es e", "dat": "em er em en", "gen": "es er es er"}  # dieser, einige
EIN_ENDINGS = ENDINGS | {"nom": "- e - e", "acc": "en e - e"}  # ein, kein, mein: without ending in three places
WEAK = {"nom": "e e e en", "acc": "en e e en", "dat": "en en en en", "gen": "en en en en"}  # after der, dieser, jeder
MIXED = WEAK | {"nom": "er e es en", "acc": "en e es en"}  # after ein, kein, mein
STRONG = ENDINGS  # without article; only the plural is used
EIN_WORDS = {"a": "ein", "no": "kein", "my": "mein", "his": "sein", "her": "ihr", "our": "unser", "their": "ihr"}
DER_WORDS = {"this": "dies", "these": "dies", "every": "jed"}
QUANTITIES = {"two": "zwei", "three": "drei", "four": "vier", "five": "fünf", "many": "viel", "some": "einig"}
CONTRACTED = {"in dem": "im", "in das": "ins", "zu dem": "zum", "zu der": "zur", "bei dem": "beim"}
DEFINITE = ("the", "the", "the", "my", "his", "her", "our", "their")
MODALS = {  # English: German for I, he, they
    "can": ("kann", "kann", "können"),
    "must": ("muss", "muss", "müssen"),
    "should": ("soll", "soll", "sollen"),
    "want to": ("will", "will", "wollen"),
    "must not": ("darf", "darf", "dürfen"),
}
HABEN, SEIN, WERDEN = ("habe", "hat", "haben"), ("bin", "ist", "sind"), ("werde", "wird", "werden")
WAR = ("war", "war", "waren")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Phrase:
    """A noun phrase or a pronoun in both languages."""

    person: int
    english: tuple[str, str]  # as subject, as object
    german: dict[str, str]  # by case
    is_pronoun: bool = False


@dataclass(frozen=True)
class Clause:
    """What is said; the word order is chosen when it is spoken."""

    subject: Phrase
    verb: Verb | None  # None: to be, with a predicate
    tense: str  # present, past, future, or a modal of MODALS
    negated: bool = False
    objects: tuple[tuple[str, Phrase], ...] = ()  # with their cases, in the English order
    predicate: Adjective | None = None
    time: tuple[str, str] | None = None
    place: tuple[str, str] | None = None

    def english(self, question: bool = False) -> list[str]:
        """Subject, verb, objects, place, time; with do-support where English wants it."""
        helper, main = self._english_verb(question)
        objects = [phrase.english[1] for _, phrase in self.objects]
        predicate = self.predicate.english if self.predicate else ""
        rest = [*objects, predicate, *(parts[0] for parts in (self.place, self.time) if parts)]
        if question:
            return [helper, self.subject.english[0], main, *rest]
        not_ = "not" if self.negated and self.tense != "must not" else ""
        return [self.subject.english[0], helper, not_, main, *rest]

    def _english_verb(self, question: bool) -> tuple[str, str]:
        person = self.subject.person
        do = "did" if self.tense == "past" else ("do", "does", "do")[person]
        base, third, past = self.verb.english if self.verb else ("be", "", "")
        if self.tense == "future":
            return "will", base
        if self.tense == "want to":
            plain = not (question or self.negated)
            return ("", f"{('want', 'wants', 'want')[person]} to {base}") if plain else (do, f"want to {base}")
        if self.tense in MODALS:
            return self.tense, base
        if not self.verb:
            return (("was", "was", "were") if self.tense == "past" else ("am", "is", "are"))[person], ""
        if question or self.negated:
            return do, base
        return "", past if self.tense == "past" else (base, third, base)[person]

    def german(self, order: str, fronted: bool = False) -> list[str]:
        """`order` of the finite verb: second (behind the time if `fronted`, else the subject), first or final."""
        finite, closing = self._german_verb()
        middle = self._middle(with_time=not fronted)
        subject = self.subject.german["nom"]
        if order == "final":
            joined = [closing[0] + finite] if self.verb and closing == [self.verb.prefix] else [*closing, finite]
            return [subject, *middle, *joined]
        if order == "first":
            return [finite, subject, *middle, *closing]
        if fronted:
            return [self.time[1], finite, subject, *middle, *closing]
        return [subject, finite, *middle, *closing]

    def _german_verb(self) -> tuple[str, list[str]]:
        """The finite verb, and what closes the clause: participle, infinitive or separable prefix."""
        person, verb = self.subject.person, self.verb
        infinitive = verb.prefix + verb.infinitive if verb else "sein"
        if self.tense == "future":
            return WERDEN[person], [infinitive]
        if self.tense in MODALS:
            return MODALS[self.tense][person], [infinitive]
        if not verb:
            return (WAR if self.tense == "past" else SEIN)[person], []
        if self.tense == "past":
            return (SEIN if verb.with_sein else HABEN)[person], [verb.participle]
        return (verb.infinitive[:-1], verb.third, verb.infinitive)[person], [verb.prefix]

    def _middle(self, with_time: bool) -> list[str]:
        """Pronouns, time, dative, accusative, nicht, place, predicate."""
        pronouns = [phrase.german[case] for case, phrase in self.objects if phrase.is_pronoun]
        others = sorted((case != "dat", phrase.german[case]) for case, phrase in self.objects if not phrase.is_pronoun)
        return [
            *pronouns,
            self.time[1] if with_time and self.time else "",
            *(text for _, text in others),
            "nicht" if self.negated else "",
            self.place[1] if self.place else "",
            self.predicate.german if self.predicate else "",
        ]


def write(folder: Path) -> None:
    """Write <split>.en and <split>.de to `folder`; no English sentence is in two splits."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = generate(sum(SIZES.values()))
    begin = 0
    for split, size in SIZES.items():
        for language, side in zip(("en", "de"), zip(*pairs[begin : begin + size], strict=True), strict=True):
            temporary = folder / f"{split}.{language}.{os.getpid()}"
            temporary.write_text("".join(f"{line}\n" for line in side), encoding="utf-8", newline="")
            os.replace(temporary, folder / f"{split}.{language}")
        begin += size


def generate(count: int, seed: int = SEED) -> list[tuple[str, str]]:
    """`count` pairs (English, German), no English sentence twice; the first n are the same for every `count` >= n."""
    speaker = Speaker(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        english, german = speaker.sentence()
        pairs.setdefault(english, german)
    return list(pairs.items())


class Speaker:
    """Draws sentences. Only random() is drawn on, the one method whose numbers Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def sentence(self) -> tuple[str, str]:
        kind = self.one_of(("simple",) * 12 + ("question",) * 2 + ("w-question", "that", "joined", "joined"))
        if kind == "simple":
            clause = self.clause(relatives=True)
            fronted = clause.time is not None and self.chance(0.5)
            english = clause.english()
            if fronted:
                english = [clause.time[0], *replace(clause, time=None).english()]
            return _finish(english, "."), _finish(clause.german("second", fronted), ".")
        if kind == "question":
            clause = replace(self.clause(can_negate=False), negated=False)
            return _finish(clause.english(question=True), "?"), _finish(clause.german("first"), "?")
        if kind == "w-question":
            word = self.one_of((("why", "warum"), ("when", "wann"), ("where", "wo")))
            clause = replace(self.clause(can_negate=False), time=None)
            if word[0] == "where":
                clause = replace(self.clause(can_negate=False, goes=False), place=None)
            return _finish([word[0], *clause.english(True)], "?"), _finish([word[1], *clause.german("first")], "?")
        if kind == "that":
            speaker, verb, said = self.animate(DEFINITE), self.one_of(words.CLAUSE_VERBS), self.clause()
            outer = Clause(speaker, verb, self.one_of(("present", "past")))
            english, german = [*outer.english(), "that", *said.english()], [*outer.german("second"), ", dass"]
            return _finish(english, "."), _finish([*german, *said.german("final")], ".")
        (english_word, german_word, subordinate), one = self.one_of(words.CONJUNCTIONS), self.clause()
        other = self.clause(future=not subordinate)
        if not subordinate:
            english = [*one.english(), english_word, *other.english()]
            return _finish(english, "."), _finish([*one.german("second"), german_word, *other.german("second")], ".")
        if self.chance(0.4):  # the subordinate clause comes first, and counts as the first part of the other
            english = [english_word, *other.english(), ",", *one.english()]
            return _finish(english, "."), _finish([german_word, *other.german("final"), ",", *one.german("first")], ".")
        english, german = [*one.english(), english_word, *other.english()], [*one.german("second"), ",", german_word]
        return _finish(english, "."), _finish([*german, *other.german("final")], ".")

    def clause(
        self, can_negate: bool = True, goes: bool = True, relatives: bool = False, future: bool = True
    ) -> Clause:
        """A clause with a subject of its own; `goes` allows verbs of motion, `relatives` relative clauses."""
        negated = can_negate and self.chance(0.2)
        determiners = (*DEFINITE, "this") if negated else None
        return self.said_of(self.animate(determiners, relatives, pronouns=True), negated, goes, relatives, future)

    def said_of(
        self, subject: Phrase, negated: bool = False, goes: bool = True, relatives: bool = False, future: bool = True
    ) -> Clause:
        """What `subject` does, has done, will, can, must or should do, or is."""
        tenses = ("present",) * 4 + ("past",) * 4 + ("can", "must", "should", "want to") + ("future",) * 2 * future
        tense = self.one_of(tenses)
        if negated and tense == "must":
            tense = "must not"
        determiners = (*DEFINITE, "this") if negated else None
        kind = self.one_of(("thing",) * 3 + ("social",) * 3 + ("dative", "giving", "giving", "food", "predicate"))
        kind = self.one_of((kind, kind, "alone", "motion" if goes else "alone"))
        verb, objects, predicate, place = None, (), None, None
        if kind in ("thing", "food"):
            verb = self.one_of(words.THING_VERBS if kind == "thing" else words.EATING_VERBS)
            objects = (("acc", self.noun(words.THINGS if kind == "thing" else words.FOOD, determiners, relatives)),)
        elif kind == "social":
            verb, objects = (
                self.one_of(words.SOCIAL_VERBS),
                (("acc", self.animate(determiners, relatives, objects=True)),),
            )
        elif kind == "dative":
            verb, objects = (
                self.one_of(words.DATIVE_VERBS),
                (("dat", self.animate(determiners, relatives, objects=True)),),
            )
        elif kind == "giving":
            to = self.animate(determiners or (*DEFINITE, "a", "this"), objects=True)
            what = self.noun(words.THINGS, determiners)
            verb, objects = self.one_of(words.GIVING_VERBS), (("dat", to), ("acc", what))
        elif kind == "motion":
            verb, place = self.one_of(words.MOTION_VERBS), self.somewhere(words.DIRECTIONS)
        elif kind == "predicate":
            predicate = self.one_of((*words.QUALITIES, *words.CHARACTER, *words.AGE))
            tense = self.one_of(("present", "past", "future" if future else "past"))
        else:
            verb = self.one_of(words.INTRANSITIVE_VERBS)
        if place is None and kind not in ("predicate", "giving") and self.chance(0.35):
            place = self.somewhere(words.POSITIONS)
        times = [
            (english, german) for english, german, tenses in words.TIMES if tense in tenses.split() or tenses == "any"
        ]
        time = self.one_of(times) if self.chance(0.35) else None
        return Clause(subject, verb, tense, negated, objects, predicate, time, place)

    def animate(
        self,
        determiners: Sequence[str] | None = None,
        relatives: bool = False,
        pronouns: bool = False,
        objects: bool = False,
    ) -> Phrase:
        """People and animals; `pronouns` in the subject's place, or in the `objects`'."""
        if (pronouns and self.chance(0.35)) or (objects and self.chance(0.25)):
            person, english, german = self.one_of(words.PRONOUNS)
            return Phrase(person, english, dict(zip(CASES, german, strict=False)), is_pronoun=True)
        return self.noun(words.ANIMATE, determiners, relatives, animate=True, can_be_none=objects)

    def noun(
        self,
        nouns: Sequence[Noun],
        determiners: Sequence[str] | None = None,
        relatives: bool = False,
        animate: bool = False,
        can_be_none: bool = True,
    ) -> Phrase:
        """A noun with determiner, adjectives, owner and relative clause; `can_be_none` allows "no"."""
        noun, plural = self.one_of(nouns), self.chance(0.3)
        if determiners is None:
            one, several = ("the", "a", "a", "this", "every"), ("the", "these", *QUANTITIES)
            determiners = (*DEFINITE, *(several if plural else one), *(("no",) if can_be_none else ()))
        determiner = self.one_of(determiners)
        if determiner == "this" and plural:
            determiner = "these"
        adjectives = self.adjectives(animate)
        form = "p" if plural else noun.gender
        english = _english_noun(noun, plural, determiner, adjectives)
        german = {case: _german_noun(noun, form, determiner, adjectives, case) for case in CASES}
        person = PLURAL if plural else THIRD
        if determiner == "the" and self.chance(0.12):  # the teacher's books: die Bücher des Lehrers
            owner = self.noun(words.ANIMATE, DEFINITE, animate=True)
            if owner.english[0].split()[-1][-1] != "s":  # the plural's apostrophe would be all there is to hear
                english = _english_noun(noun, plural, f"{owner.english[0]}'s", adjectives)
                german = {case: f"{text} {owner.german['gen']}" for case, text in german.items()}
                return Phrase(person, (english,) * 2, german)
        if relatives and determiner in ("the", "a") and self.chance(0.2):
            english_clause, german_clause = self.relative(form, person, animate)
            english = f"{english} {english_clause}"
            german = {case: f"{text} , {german_clause} ," for case, text in german.items()}
        return Phrase(person, (english,) * 2, german)

    def adjectives(self, animate: bool) -> list[Adjective]:
        """None, one or two: the second is of a kind that stands without a comma before it, as in "kleine rote"."""
        general, special = (words.CHARACTER, words.AGE) if animate else (words.MAKE, words.COLOURS)
        count = self.one_of((0, 0, 0, 0, 1, 1, 1, 2))
        return [*([self.one_of((*words.QUALITIES, *general))] * (count > 0)), *([self.one_of(special)] * (count > 1))]

    def relative(self, form: str, person: int, animate: bool) -> tuple[str, str]:
        """A relative clause whose pronoun is its subject or its object."""
        english_pronoun = "who" if animate else "that"
        german_pronoun = {case: _form(RELATIVE, case, form) for case in CASES}
        if animate and self.chance(0.6):
            clause = self.said_of(Phrase(person, (english_pronoun,) * 2, german_pronoun))
            return _join(clause.english()), _join(clause.german("final"))
        verb = self.one_of(words.SOCIAL_VERBS if animate else words.THING_VERBS)
        clause = Clause(self.animate(DEFINITE, pronouns=True), verb, self.one_of(("present", "past", "future", "can")))
        pronoun = "whom" if animate else "that"
        return _join([pronoun, *clause.english()]), _join([german_pronoun["acc"], *clause.german("final")])

    def somewhere(self, prepositions: Sequence[tuple[str, str, str]]) -> tuple[str, str]:
        """A preposition and a place."""
        english, german, case = self.one_of(prepositions)
        noun = self.noun(words.PLACES, ("the", "the", "the", "a", "this", "my", "our"), can_be_none=False)
        text = f"{german} {noun.german[case]}"
        for apart, together in CONTRACTED.items():
            if text.startswith(f"{apart} "):
                text = together + text.removeprefix(apart)
        return f"{english} {noun.english[1]}", text

    def one_of(self, items: Sequence[Item]) -> Item:
        return items[int(self._random.random() * len(items))]

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability


def _english_noun(noun: Noun, plural: bool, determiner: str, adjectives: Sequence[Adjective]) -> str:
    parts = [*(adjective.english for adjective in adjectives), noun.english[plural]]
    if determiner == "a":
        determiner = "" if plural else "an" if parts[0][0] in "aeio" else "a"
    return _join([determiner, *parts])


def _german_noun(noun: Noun, form: str, determiner: str, adjectives: Sequence[Adjective], case: str) -> str:
    """Determiner, adjectives and noun, each with its ending."""
    if determiner == "the":
        parts, endings = [_form(THE, case, form)], WEAK
    elif determiner in DER_WORDS:
        parts, endings = [DER_WORDS[determiner] + _form(ENDINGS, case, form)], WEAK
    elif determiner in EIN_WORDS and not (determiner == "a" and form == "p"):
        parts, endings = [EIN_WORDS[determiner] + _form(EIN_ENDINGS, case, form)], MIXED
    else:
        word = QUANTITIES.get(determiner, "")
        parts, endings = [word + _form(ENDINGS, case, form) if determiner in ("many", "some") else word], STRONG
    parts += [adjective.stem + _form(endings, case, form) for adjective in adjectives]
    return _join([*parts, _inflected(noun, form, case)])


def _inflected(noun: Noun, form: str, case: str) -> str:
    singular, plural = noun.german
    if form == "p":
        return plural + "n" if case == "dat" and plural[-1] not in "ns" else plural
    if noun.weak:
        return singular if case == "nom" else plural
    if case == "gen" and form != "f":
        return singular + ("s" if singular.endswith(("el", "en", "er", "ig", "o", "um")) else "es")
    return singular


def _form(table: dict[str, str], case: str, form: str) -> str:
    return table[case].split()[FORMS.index(form)].removeprefix("-")


def _join(parts: Sequence[str]) -> str:
    return " ".join(" ".join(parts).split())


def _finish(parts: Sequence[str], mark: str) -> str:
    """A sentence: commas set right, a capital at its beginning, a mark at its end."""
    text = _join([*parts, mark])
    for wrong, right in ((" ,", ","), (",,", ","), (f", {mark}", mark), (f",{mark}", mark), (f" {mark}", mark)):
        text = text.replace(wrong, right)
    text = text.replace(" can not ", " cannot ")
    return text[0].upper() + text[1:]
