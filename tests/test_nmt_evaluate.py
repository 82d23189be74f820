"""Scores against sacreBLEU's command line, averages of weights, and the commands that translate, with any input."""

import io
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from nmt_cell import make_cell
from training_runs import Cell, result

from engine.averaging import average_weights, keep_weights
from engine.errors import UserError
from nmt import evaluate, translate
from nmt.codec import SPECIALS, WORD_START, Codec
from nmt.scoring import all_scores, sacre_bleu
from nmt.trained import open_run
from scripts.reporting.bundle import write_bundle

SCORES = ("fairseq_bleu", "sacrebleu", "compound_split_bleu", "tokenized_bleu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_cell(tmp_path_factory.mktemp("nmt_evaluate"))


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """A run trained so long that its translations end, and have words of the language."""
    method = ("optimizer={name: adamw, lr: 1.0e-2, betas: [0.9, 0.98]}", "schedule.warmup_updates=50")
    ours = ("updates=150", "schedule.milestones=[120]", "validate_every=150", "average.every=10", "decoding.beam=3")
    cell = Cell("nmt.train", folder / "cell.yaml")
    return cell.complete(folder / "run", *method, *ours, "model.norm=pre", "checkpoint.minutes=60", "log_every=150")


@pytest.fixture
def translated(monkeypatch, capsys):

    def run(run_dir: Path, text: bytes, *overrides: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        capsys.readouterr()
        assert translate.main([str(run_dir), *overrides]) == 0
        return capsys.readouterr().out

    return run


def by_command_line(translations: Path, references: Path, *options: str) -> str:
    command = [sys.executable, "-m", "sacrebleu", str(references), "-i", str(translations), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_score_is_that_of_sacrebleus_command_line(trained, folder, tmp_path):
    """Tested with the run's poor translations, and with good ones: references without every seventh word."""
    references = (folder / "test.de").read_text(encoding="utf-8").splitlines()
    words = [line.split(" ") for line in references]
    good = [" ".join(word for j, word in enumerate(line) if (i + j) % 7) for i, line in enumerate(words)]
    (tmp_path / "good").write_text("".join(f"{line}\n" for line in good), encoding="utf-8")
    for path in (trained / "test.de.txt", tmp_path / "good"):
        score, signature = sacre_bleu(path.read_text(encoding="utf-8").splitlines(), references)
        printed = json.loads(by_command_line(path, folder / "test.de", "-w", "9"))
        assert printed["score"] == pytest.approx(score, abs=1e-8)
        assert signature == printed["signature"]
    assert 40 < score < 95
    assert result(trained)["signature"] == signature
    assert result(trained)["sacrebleu"] == sacre_bleu((trained / "test.de.txt").read_text().splitlines(), references)[0]


def test_evaluate_prints_the_scores_of_the_result(trained, capsys):
    assert evaluate.main([str(trained)]) == 0
    printed, outcome = capsys.readouterr().out, result(trained)
    assert "50 pairs, beam 3, length penalty 0.6" in printed
    assert "averaged over 3: those after 130, 140, 150 updates" in printed
    assert (outcome["metric"], outcome["final"]) == ("fairseq_bleu", outcome["fairseq_bleu"])
    for title, name in (
        ("fairseq's BLEU", "fairseq_bleu"),
        ("sacreBLEU", "sacrebleu"),
        ("compound-split BLEU", "compound_split_bleu"),
        ("tokenized BLEU", "tokenized_bleu"),
    ):
        assert f"{title:19}  {outcome[name]:6.2f}" in printed
    assert outcome["signature"] in printed
    assert evaluate.main([str(trained), "average.last=1", "decoding.beam=1"]) == 0
    printed = capsys.readouterr().out
    assert "averaged over 1: those after 150 updates" in printed and "beam 1" in printed


def test_a_bundle_is_scored_and_translates_as_its_run(trained, folder, translated, tmp_path, capsys):
    bundle = write_bundle(trained, tmp_path)
    assert evaluate.main([str(trained)]) == 0
    printed = capsys.readouterr().out
    assert evaluate.main([str(bundle)]) == 0
    assert capsys.readouterr().out == printed
    text = (folder / "test.en").read_bytes()
    assert translated(bundle, text) == translated(trained, text)
    with pytest.raises(UserError, match="holds the average alone"):
        open_run(bundle, ["average.last=1"])
    codec = Codec.load(bundle)
    pieces = [*codec.pieces[:-2], codec.pieces[-1], codec.pieces[-2]]
    Codec(codec.source, codec.target, pieces, codec.merges).save(bundle)
    with pytest.raises(UserError, match="trained with another vocabulary than codec.json"):
        open_run(bundle, [])


def plain_bleu(hypotheses: list[str], references: list[str]) -> float:
    """BLEU of a corpus of tokens, in per cent, as its paper defines it (Papineni et al., 2002)."""
    log_precisions = 0.0
    for n in (1, 2, 3, 4):
        right = total = 0
        for lines in zip(hypotheses, references, strict=True):
            ours, theirs = (Counter(zip(*(line.split()[i:] for i in range(n)), strict=False)) for line in lines)
            right += sum(min(count, theirs[words]) for words, count in ours.items())
            total += sum(ours.values())
        log_precisions += math.log(right / total) / 4
    ours, theirs = (sum(len(line.split()) for line in lines) for lines in (hypotheses, references))
    return 100 * math.exp(log_precisions + min(0.0, 1 - theirs / ours))


# A reference; its tokens by fairseq's recipe; a translation's tokens; sacreBLEU's tokens of both texts, which it splits
# at ASCII's punctuation alone, and at a hyphen only after a digit.
PAIRS = [
    (
        "Die Ost-West-Route ist wieder offen.",
        "Die Ost @-@ West @-@ Route ist wieder offen .",
        "Die Ost @-@ West @-@ Verbindung ist wieder offen .",
        "Die Ost-West-Route ist wieder offen .",
        "Die Ost-West-Verbindung ist wieder offen .",
    ),
    (
        "„Wir haben’s geschafft!“, rief er.",
        "„ Wir haben ' s geschafft ! “ , rief er .",
        '" Wir haben es geschafft ! " , rief er .',
        "„Wir haben’s geschafft ! “ , rief er .",
        '" Wir haben es geschafft ! " , rief er .',
    ),
    (
        "Im Jahr 2013 waren es 1.250,5 Millionen Euro.",
        "Im Jahr 2013 waren es 1.250,5 Millionen Euro .",
        "2013 waren es 1.250,5 Millionen Euro .",
        "Im Jahr 2013 waren es 1.250,5 Millionen Euro .",
        "2013 waren es 1.250,5 Millionen Euro .",
    ),
    (
        "Die E-Mail-Adresse steht unten (siehe Seite 4).",
        "Die E @-@ Mail @-@ Adresse steht unten ( siehe Seite 4 ) .",
        "Die E @-@ Mail @-@ Adresse steht hier ( siehe Seite 4 ) .",
        "Die E-Mail-Adresse steht unten ( siehe Seite 4 ) .",
        "Die E-Mail-Adresse steht hier ( siehe Seite 4 ) .",
    ),
    (
        "Ein 10-jähriges Kind – und sein Hund.",
        "Ein 10 @-@ jähriges Kind – und sein Hund .",
        "Ein 10 @-@ jähriges Kind - und sein Hund .",
        "Ein 10 - jähriges Kind – und sein Hund .",
        "Ein 10 - jähriges Kind - und sein Hund .",
    ),
    (
        "Die Partei erhielt 35 Prozent der Stimmen.",
        "Die Partei erhielt 35 Prozent der Stimmen .",
        "Die Partei bekam 35 Prozent der Stimmen .",
        "Die Partei erhielt 35 Prozent der Stimmen .",
        "Die Partei bekam 35 Prozent der Stimmen .",
    ),
    (
        "Der US-Präsident kommt am 4. Juli nach Baden-Württemberg.",
        "Der US @-@ Präsident kommt am 4. Juli nach Baden @-@ Württemberg .",
        "Der Präsident der USA kommt am 4. Juli nach Baden @-@ Württemberg .",
        "Der US-Präsident kommt am 4 . Juli nach Baden-Württemberg .",
        "Der Präsident der USA kommt am 4 . Juli nach Baden-Württemberg .",
    ),
    (
        "Sie fragte: „Warum gerade heute?“",
        "Sie fragte : „ Warum gerade heute ? “",
        'Sie fragte : " Warum ausgerechnet heute ? "',
        "Sie fragte : „Warum gerade heute ? “",
        'Sie fragte : " Warum ausgerechnet heute ? "',
    ),
    (
        "Das ist nicht nur teuer, sondern auch gefährlich.",
        "Das ist nicht nur teuer , sondern auch gefährlich .",
        "Das ist nicht nur teuer , sondern auch gefährlich .",
        "Das ist nicht nur teuer , sondern auch gefährlich .",
        "Das ist nicht nur teuer , sondern auch gefährlich .",
    ),
    (
        "Der Vorsitzende, ein Mann von 61 Jahren, schwieg.",
        "Der Vorsitzende , ein Mann von 61 Jahren , schwieg .",
        "Der Vorsitzende , ein 61 @-@ jähriger Mann , schwieg .",
        "Der Vorsitzende , ein Mann von 61 Jahren , schwieg .",
        "Der Vorsitzende , ein 61 - jähriger Mann , schwieg .",
    ),
    (
        "Die so genannte ‚Neue Mitte‘ gibt es nicht.",
        "Die so genannte ‚ Neue Mitte ‘ gibt es nicht .",
        "Die sogenannte Neue Mitte gibt es nicht .",
        "Die so genannte ‚Neue Mitte‘ gibt es nicht .",
        "Die sogenannte Neue Mitte gibt es nicht .",
    ),
    (
        "Am Ende blieben 3 von 12 Läden offen; alle anderen schlossen.",
        "Am Ende blieben 3 von 12 Läden offen ; alle anderen schlossen .",
        "Am Ende blieben 3 von 12 Geschäften offen ; alle anderen schlossen .",
        "Am Ende blieben 3 von 12 Läden offen ; alle anderen schlossen .",
        "Am Ende blieben 3 von 12 Geschäften offen ; alle anderen schlossen .",
    ),
]
NORMALISED = str.maketrans({"„": '"', "“": '"', "‚": "'", "‘": "'", "–": "-"})


def test_each_score_against_a_plain_one():
    references, fairseq, tokens, references_13a, translations_13a = map(list, zip(*PAIRS, strict=True))
    codec = Codec("en", "de", [*SPECIALS, WORD_START, *sorted(set("".join(tokens)) - {" "})], [])
    scores = all_scores(codec.encode_tokens(tokens), references, codec)
    assert scores["fairseq_bleu"] == pytest.approx(plain_bleu(tokens, fairseq), abs=1e-8)
    assert scores["sacrebleu"] == pytest.approx(plain_bleu(translations_13a, references_13a), abs=1e-8)
    normalised = [line.translate(NORMALISED) for line in fairseq]
    whole, whole_references = ([line.replace(" @-@ ", "-") for line in lines] for lines in (tokens, normalised))
    assert scores["tokenized_bleu"] == pytest.approx(plain_bleu(whole, whole_references), abs=1e-8)
    # A compound split with any mark of its own counts the same, whatever the mark is.
    assert scores["compound_split_bleu"] == pytest.approx(plain_bleu(tokens, normalised), abs=1e-8)
    assert len({round(scores[name], 2) for name in SCORES}) == 4


def test_tokenized_and_compound_split_bleu():
    """A hyphenated compound is one token in the first score, and three in the second."""
    reference, other = "Die Ost-West-Route ist gut.", "Die Ost-Ost-Route ist gut."
    codec = Codec("en", "de", [*SPECIALS, WORD_START, *sorted({*reference, "@"} - {" "})], [])
    exact = all_scores(codec.encode_lines([reference], "de"), [reference], codec)
    assert [exact[name] for name in SCORES] == pytest.approx([100] * 4)
    # Tokens: Die Ost-Ost-Route ist gut .      and split: Die Ost ##AT##-##AT## Ost ##AT##-##AT## Route ist gut .
    near = all_scores(codec.encode_lines([other], "de"), [reference], codec)
    assert near["tokenized_bleu"] == 0  # no four tokens in a row are right: multi-bleu.perl does not smooth
    precisions = (8 / 9, 6 / 8, 4 / 7, 2 / 6)
    assert near["compound_split_bleu"] == pytest.approx(100 * torch.tensor(precisions).log().mean().exp().item())


def test_translate_reads_lines_and_writes_lines(trained, folder, translated):
    text = (folder / "test.en").read_bytes()
    printed = translated(trained, text)
    assert printed == (trained / "test.de.txt").read_text(encoding="utf-8")
    gaps = b"\n" + text.splitlines()[0] + b"\n   \n\r\n" + text.splitlines()[1]  # the last line without its end
    first, second = printed.splitlines()[:2]
    assert translated(trained, gaps).split("\n") == ["", first, "", "", second, ""]
    assert translated(trained, b"") == ""


def test_words_never_seen_are_translated_somehow(trained, translated):
    assert translated(trained, "漢字 ひらがな 한글\n".encode()).count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a good line\nna\xefve\n", "^line 2 of the input is not UTF-8"),
        (b"fine\nfine\n" + b"word " * 10_000, "^line 3 of the input has .* and 1,024 is the most"),
    ],
)
def test_input_that_cannot_be_translated(trained, translated, text, words):
    with pytest.raises(UserError, match=words):
        translated(trained, text)


def test_translate_as_it_is_called(trained, translated):
    command = [sys.executable, "-m", "nmt.translate", str(trained)]
    done = subprocess.run(command, input=b"A dog runs.\n", capture_output=True, timeout=120, check=True)
    assert done.stdout.decode() == translated(trained, b"A dog runs.\n")
    assert done.stderr == b""


def test_the_average_is_the_mean_of_the_last(tmp_path):
    model = torch.nn.Linear(3, 2)
    states = []
    for update in (1, 2, 3, 10, 20):
        torch.nn.init.normal_(model.weight)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        keep_weights(tmp_path, update, model, "digest", last=4)
    mean, updates = average_weights(tmp_path, 3, "digest")
    assert updates == [3, 10, 20]
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, torch.stack([state[name] for state in states[-3:]]).mean(0))
    assert average_weights(tmp_path, 10, "digest")[1] == [2, 3, 10, 20]


def test_weights_of_different_models_are_not_averaged(tmp_path):
    keep_weights(tmp_path, 10, torch.nn.Linear(3, 2), "digest", last=5)
    keep_weights(tmp_path, 20, torch.nn.Linear(3, 4), "digest", last=5)
    with pytest.raises(UserError, match=r"00000020 and 00000010 are of different models \(weight: \(4, 3\) and \(2, 3"):
        average_weights(tmp_path, 5, "digest")
    keep_weights(tmp_path, 20, torch.nn.Linear(3, 2, bias=False), "digest", last=5)
    with pytest.raises(UserError, match=r"different models \(bias: absent and \(2,\)\)"):
        average_weights(tmp_path, 5, "digest")
    with pytest.raises(UserError, match="another vocabulary"):
        average_weights(tmp_path, 5, "another digest")
    with pytest.raises(UserError, match="holds no weights yet"):
        average_weights(tmp_path / "elsewhere", 5, "digest")


def test_a_damaged_file_is_named(tmp_path):
    for update in (10, 20):
        keep_weights(tmp_path, update, torch.nn.Linear(3, 2), "digest", last=5)
    path = tmp_path / "averaging/00000010/checkpoint.pt"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="00000010/checkpoint.pt is damaged"):
        average_weights(tmp_path, 5, "digest")
    assert average_weights(tmp_path, 1, "digest")[1] == [20]


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def test_vocabulary_and_weights_must_belong_together(copy, folder):
    codec = Codec.load(copy)
    pieces = [*codec.pieces[:-2], codec.pieces[-1], codec.pieces[-2]]
    Codec(codec.source, codec.target, pieces, codec.merges).save(copy)
    with pytest.raises(UserError, match="another vocabulary"):
        open_run(copy, [])


def test_settings_and_weights_must_belong_together(copy):
    with pytest.raises(UserError, match=r"another model \(embedding.weight: "):
        open_run(copy, ["model.width=64"])
    with pytest.raises(UserError, match="config.yaml"):
        open_run(copy / "averaging", [])


def test_scores_are_of_the_data_with_the_runs_vocabulary(copy, tmp_path):
    other = make_cell(tmp_path, merges=200)
    with pytest.raises(UserError, match="has another vocabulary than .* set data.root"):
        evaluate.main([str(copy), f"data.root={other / 'data'}"])
