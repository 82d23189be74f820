"""The words of nmt/prepare/toy_text.py, with all of their forms that cannot be derived."""

from typing import NamedTuple


class Noun(NamedTuple):
    english: tuple[str, str]  # singular, plural
    german: tuple[str, str]
    gender: str  # m, f, n
    weak: bool = False  # der Student, den Studenten: the plural's form in all cases but the nominative


class Verb(NamedTuple):
    english: tuple[str, str, str]  # base, third person, past
    prefix: str  # separable, or ""
    infinitive: str  # without the prefix
    third: str
    participle: str
    with_sein: bool


class Adjective(NamedTuple):
    english: str
    german: str  # as a predicate
    stem: str  # what takes an ending


def _nouns(text: str) -> tuple[Noun, ...]:
    """Lines of: English singular and plural, German singular and plural, gender; * marks a weak noun."""
    rows = [line.split() for line in text.strip().splitlines()]
    return tuple(Noun((a, b), (c, d), gender[0], gender.endswith("*")) for a, b, c, d, gender in rows)


def _verbs(text: str) -> tuple[Verb, ...]:
    """Lines of: English base, third person, past; German infinitive (prefix|verb), third person, participle; sein."""
    verbs = []
    for line in text.strip().splitlines():
        *english, infinitive, third, participle, helper = (word.replace("_", " ") for word in f"{line} -".split()[:7])
        prefix, _, verb = infinitive.rpartition("|")
        verbs.append(Verb(tuple(english), prefix, verb, third, participle, helper == "sein"))
    return tuple(verbs)


def _adjectives(text: str) -> tuple[Adjective, ...]:
    return tuple(Adjective(*line.split()) for line in text.strip().splitlines())


ANIMATE = _nouns("""
    man         men         Mann        Männer      m
    woman       women       Frau        Frauen      f
    child       children    Kind        Kinder      n
    boy         boys        Junge       Jungen      m*
    girl        girls       Mädchen     Mädchen     n
    teacher     teachers    Lehrer      Lehrer      m
    doctor      doctors     Arzt        Ärzte       m
    student     students    Student     Studenten   m*
    friend      friends     Freund      Freunde     m
    mother      mothers     Mutter      Mütter      f
    sister      sisters     Schwester   Schwestern  f
    brother     brothers    Bruder      Brüder      m
    dog         dogs        Hund        Hunde       m
    cat         cats        Katze       Katzen      f
    horse       horses      Pferd       Pferde      n
    bear        bears       Bär         Bären       m*
""")

PLACES = _nouns("""
    house       houses      Haus        Häuser      n
    garden      gardens     Garten      Gärten      m
    kitchen     kitchens    Küche       Küchen      f
    school      schools     Schule      Schulen     f
    park        parks       Park        Parks       m
    forest      forests     Wald        Wälder      m
    city        cities      Stadt       Städte      f
    village     villages    Dorf        Dörfer      n
    room        rooms       Zimmer      Zimmer      n
    hotel       hotels      Hotel       Hotels      n
""")

FOOD = _nouns("""
    apple       apples      Apfel       Äpfel       m
    cake        cakes       Kuchen      Kuchen      m
    egg         eggs        Ei          Eier        n
    potato      potatoes    Kartoffel   Kartoffeln  f
""")

_FURNITURE = _nouns("""
    table       tables      Tisch       Tische      m
    lamp        lamps       Lampe       Lampen      f
    window      windows     Fenster     Fenster     n
    door        doors       Tür         Türen       f
""")

_COMPOUNDED = {"kitchen": "Küchen", "garden": "Garten", "school": "Schul"}

_COMPOUNDS = tuple(
    Noun(
        tuple(f"{first} {word}" for word in noun.english),
        tuple(f"{german}{word.lower()}" for word in noun.german),
        noun.gender,
    )
    for first, german in _COMPOUNDED.items()
    for noun in _FURNITURE
)

_OTHER_THINGS = _nouns("""
    book        books       Buch        Bücher      n
    letter      letters     Brief       Briefe      m
    flower      flowers     Blume       Blumen      f
    picture     pictures    Bild        Bilder      n
    key         keys        Schlüssel   Schlüssel   m
    bottle      bottles     Flasche     Flaschen    f
    coat        coats       Mantel      Mäntel      m
    hat         hats        Hut         Hüte        m
    bicycle     bicycles    Fahrrad     Fahrräder   n
    car         cars        Auto        Autos       n
    ball        balls       Ball        Bälle       m
""")

THINGS = (*_OTHER_THINGS, *_OTHER_THINGS, *FOOD, *_FURNITURE, *_COMPOUNDS)

QUALITIES = _adjectives("""
    big         groß        groß
    small       klein       klein
    beautiful   schön       schön
    strange     seltsam     seltsam
""")

CHARACTER = _adjectives("""
    friendly    freundlich  freundlich
    clever      klug        klug
    happy       glücklich   glücklich
    tired       müde        müd
    sick        krank       krank
""")

AGE = _adjectives("""
    old         alt         alt
    young       jung        jung
""")

MAKE = _adjectives("""
    new         neu         neu
    old         alt         alt
    expensive   teuer       teur
    dark        dunkel      dunkl
    clean       sauber      sauber
""")

COLOURS = _adjectives("""
    red         rot         rot
    green       grün        grün
    black       schwarz     schwarz
    white       weiß        weiß
""")

THING_VERBS = _verbs("""
    buy         buys        bought      kaufen      kauft       gekauft
    find        finds       found       finden      findet      gefunden
    carry       carries     carried     tragen      trägt       getragen
    open        opens       opened      auf|machen  macht       aufgemacht
    close       closes      closed      zu|machen   macht       zugemacht
    bring_along brings_along brought_along mit|bringen bringt   mitgebracht
    need        needs       needed      brauchen    braucht     gebraucht
    forget      forgets     forgot      vergessen   vergisst    vergessen
    wash        washes      washed      waschen     wäscht      gewaschen
""")

EATING_VERBS = _verbs("""
    eat         eats        ate         essen       isst        gegessen
    cook        cooks       cooked      kochen      kocht       gekocht
""")

SOCIAL_VERBS = _verbs("""
    see         sees        saw         sehen       sieht       gesehen
    visit       visits      visited     besuchen    besucht     besucht
    know        knows       knew        kennen      kennt       gekannt
    love        loves       loved       lieben      liebt       geliebt
    ask         asks        asked       fragen      fragt       gefragt
    call        calls       called      an|rufen    ruft        angerufen
    pick_up     picks_up    picked_up   ab|holen    holt        abgeholt
""")

DATIVE_VERBS = _verbs("""
    help        helps       helped      helfen      hilft       geholfen
    thank       thanks      thanked     danken      dankt       gedankt
    follow      follows     followed    folgen      folgt       gefolgt     sein
    answer      answers     answered    antworten   antwortet   geantwortet
""")

GIVING_VERBS = _verbs("""
    give        gives       gave        geben       gibt        gegeben
    show        shows       showed      zeigen      zeigt       gezeigt
    bring       brings      brought     bringen     bringt      gebracht
""")

INTRANSITIVE_VERBS = _verbs("""
    sleep       sleeps      slept       schlafen    schläft     geschlafen
    work        works       worked      arbeiten    arbeitet    gearbeitet
    wait        waits       waited      warten      wartet      gewartet
    laugh       laughs      laughed     lachen      lacht       gelacht
    dance       dances      danced      tanzen      tanzt       getanzt
    stay        stays       stayed      bleiben     bleibt      geblieben   sein
    cry         cries       cried       weinen      weint       geweint
    wake_up     wakes_up    woke_up     auf|wachen  wacht       aufgewacht  sein
""")

MOTION_VERBS = _verbs("""
    go          goes        went        gehen       geht        gegangen    sein
    run         runs        ran         rennen      rennt       gerannt     sein
    drive       drives      drove       fahren      fährt       gefahren    sein
    come        comes       came        kommen      kommt       gekommen    sein
""")

CLAUSE_VERBS = _verbs("""
    say         says        said        sagen       sagt        gesagt
    believe     believes    believed    glauben     glaubt      geglaubt
    hope        hopes       hoped       hoffen      hofft       gehofft
""")

# person (0: I, 1: he or she, 2: plural), English subject and object, German nominative, accusative, dative
PRONOUNS = (
    (0, ("I", "me"), ("ich", "mich", "mir")),
    (1, ("he", "him"), ("er", "ihn", "ihm")),
    (1, ("she", "her"), ("sie", "sie", "ihr")),
    (2, ("we", "us"), ("wir", "uns", "uns")),
    (2, ("they", "them"), ("sie", "sie", "ihnen")),
)

# English, German, the tenses they go with
TIMES = (
    ("today", "heute", "any"),
    ("in the morning", "am Morgen", "any"),
    ("in the evening", "am Abend", "any"),
    ("at night", "in der Nacht", "any"),
    ("on Monday", "am Montag", "any"),
    ("in winter", "im Winter", "any"),
    ("now", "jetzt", "present can must should"),
    ("every day", "jeden Tag", "present past can must should"),
    ("yesterday", "gestern", "past"),
    ("last week", "letzte Woche", "past"),
    ("tomorrow", "morgen", "future"),
    ("next year", "nächstes Jahr", "future"),
)

POSITIONS = (
    ("in", "in", "dat"),
    ("in", "in", "dat"),
    ("behind", "hinter", "dat"),
    ("in front of", "vor", "dat"),
    ("next to", "neben", "dat"),
    ("near", "bei", "dat"),
)

DIRECTIONS = (
    ("into", "in", "acc"),
    ("to", "zu", "dat"),
    ("out of", "aus", "dat"),
    ("through", "durch", "acc"),
)

# English, German, whether it begins a subordinate clause
CONJUNCTIONS = (
    ("because", "weil", True),
    ("although", "obwohl", True),
    ("if", "wenn", True),
    ("and", "und", False),
    (", but", ", aber", False),
)
