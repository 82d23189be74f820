"""Loss and perplexity of texts."""

import math

import numpy as np
import torch

from engine.distributed import World
from engine.metrics import Sums
from engine.precision import Precision
from language_model.data import TextData, read_text, scored_batches
from language_model.model import Network


@torch.inference_mode()
def score(
    model: Network, tokens: np.ndarray, lengths: np.ndarray, rows: int, precision: Precision, world: World
) -> dict[str, float]:
    """Sums over all ranks: `loss`, in nats, and the number of `tokens`.

    RuntimeError unless each token was counted once.
    """
    model.eval()
    sums, state = Sums(("loss", "tokens"), world.device), None
    for inputs, targets, counted in scored_batches(
        tokens, lengths, rows, world.rank, world.world_size, steps=model.test_steps, device=world.device
    ):
        state = model.zero_state(inputs.shape[1]) if state is None else state
        with precision.autocast():
            log_prob, state = model(inputs, targets, state)
        sums.add(loss=-torch.where(counted, log_prob, 0.0).sum(dtype=torch.float64), tokens=counted.sum())
    total = sums.reduce(world)
    if total["tokens"] != len(tokens):
        raise RuntimeError(f"evaluated {total['tokens']:.0f} tokens of a text of {len(tokens)}")
    return total


def final_perplexities(
    data: TextData, model: Network, rows: int, precision: Precision, world: World, test_loss: float
) -> dict[str, float]:
    """Perplexities of the test set, whose mean loss is `test_loss`, and of all held-out files."""
    corpus = data.corpus
    sentences = sum(shard.sentences for shard in corpus.test)
    found = perplexities(test_loss * data.test_tokens, data.test_tokens, sentences)
    if corpus.all_test:
        loss = score(model, *read_text(corpus.all_test), rows, precision, world)["loss"]
        facts = corpus.facts["all_test"]
        found |= {"all_files": len(facts["files"]), "all_tokens": facts["tokens"]}
        of_all = perplexities(loss, facts["tokens"], facts["sentences"])
        found |= {f"all_{name}": value for name, value in of_all.items()}
    return found


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats."""
    return math.exp(min(loss, 709.0))  # exp(710) is beyond a float


def perplexities(loss: float, tokens: int, sentences: int) -> dict[str, float]:
    """Perplexity by each denominator, for the total `loss` (nats) of a text's `tokens`, marks included.

    ppl                words, <S> and </S>: as in the published code, and in training
    ppl_with_end_mark  words and </S>: as in the benchmark's literature
    ppl_per_word       words alone
    """
    return {
        "ppl": perplexity(loss / tokens),
        "ppl_with_end_mark": perplexity(loss / (tokens - sentences)),
        "ppl_per_word": perplexity(loss / (tokens - 2 * sentences)),
    }
