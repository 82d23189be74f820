"""Score a text with a trained model: python -m language_model.evaluate RUN|BUNDLE FILE [key=value ...]

RUN is a run folder, whose newest checkpoint is used. BUNDLE comes from `python -m scripts.report --bundle RUN`.
FILE is tokenized text, one sentence a line. scoring.py explains the three perplexities. key=value changes the run's
config: data.root=FOLDER, precision, device, eval_rows.
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint import require_same_shapes
from engine.config import load_config
from engine.distributed import World, setup
from engine.errors import UserError, run_main, settings_of
from engine.run import create_precision
from engine.weights import read_weights
from language_model.config import Config
from language_model.data import load_corpus
from language_model.model import create_model
from language_model.raw_text import Part
from language_model.scoring import perplexities, score

PERPLEXITIES = ("perplexity, both marks", "perplexity, end mark", "perplexity, words")
USAGE = "usage: python -m language_model.evaluate RUN|BUNDLE FILE [key=value ...]"


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(USAGE)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    run, file = Path(arguments[0]), Path(arguments[1])
    config = load_config(Config, run / "config.yaml", arguments[2:])
    with closing(setup(config.device)) as world:
        found = evaluate_file(config, run, file, world)
    for name, value in found.items() if world.is_main else ():
        print(f"{name:<26}{value:>14,}" if isinstance(value, int) else f"{name:<26}{value:>14,.2f}")
    return 0


def evaluate_file(config: Config, run: Path, file: Path, world: World) -> dict[str, Any]:
    """The values to print. UserError if the run, its data or the file cannot be used."""
    corpus = load_corpus(config.data)
    weights = read_weights(run, _say)
    if weights.vocabulary != corpus.vocabulary_digest:
        raise UserError(f"{run}: trained with another vocabulary than that of {config.data.root}: give its data.root=")
    tokens, lengths, unknown = _read(file, corpus.load_vocabulary())

    with settings_of("model"):
        model = create_model(config.model, corpus.words, config.sequence_length)
    require_same_shapes(model, weights.state, run)
    model.load_state_dict(weights.state)
    model.to(world.device)
    precision = create_precision(config.precision, world.device, _say)
    total = score(model, tokens, lengths, config.eval_rows, precision, world)
    words = len(tokens) - 2 * len(lengths)
    return {
        "sentences": len(lengths),
        "words": words,
        "out of vocabulary": unknown,
        "out of vocabulary, %": 100 * unknown / words,
        "tokens": len(tokens),
    } | dict(zip(PERPLEXITIES, perplexities(total["loss"], len(tokens), len(lengths)).values(), strict=True))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _read(file: Path, vocabulary: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """The file's tokens, sentence lengths, and number of unknown words."""
    try:
        part = Part("test", str(file), 0, 0, file.stat().st_size, path=file)
        encoded = [vocabulary.encode(text) for text in part.texts()]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    tokens, lengths = (np.concatenate([pair[which] for pair in encoded] or [[]]) for which in (0, 1))
    if not len(tokens):
        raise UserError(f"{file}: there is no sentence in it")
    return tokens, lengths, int(np.count_nonzero(tokens == vocabulary.unknown))


if __name__ == "__main__":
    run_main(main)
