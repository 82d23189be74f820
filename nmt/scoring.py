"""The loss of a split, its translations, and their BLEU in the four ways reported for English-German.

docs/reproduction.md describes the four.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from sacrebleu.metrics import BLEU

from engine.distributed import World
from engine.metrics import Sums
from engine.precision import Precision
from nmt.beam_search import translate
from nmt.codec import EOS, Codec
from nmt.config import DecodingConfig
from nmt.data import Split, eval_batches
from nmt.model import Transformer


@torch.no_grad()
def loss_sums(
    model: Transformer, split: Split, max_tokens: int, label_smoothing: float, precision: Precision, world: World
) -> dict[str, float]:
    """Sums over all ranks, each pair counted once: label-smoothed loss, nll, target tokens, pairs."""
    model.eval()
    sums = Sums(("loss", "nll", "tokens", "pairs"), world.device)
    for batch, indices in eval_batches(split, max_tokens, world.rank, world.world_size):
        source, target_in, target_out = batch.to(world.device)[:3]
        with precision.autocast():
            loss, nll = model(source, target_in, target_out, batch.tokens, label_smoothing)
        sums.add(loss=loss, nll=nll, tokens=batch.tokens, pairs=len(indices))
    total = sums.reduce(world)
    if total["pairs"] != len(split):
        raise RuntimeError(f"evaluated {total['pairs']:.0f} pairs of {len(split)}")
    return total


def translate_split(
    model: Transformer, split: Split, decoding: DecodingConfig, max_tokens: int, world: World
) -> list[list[int]]:
    """Ids of all translations, made by all ranks, known to each; always in fp32."""
    share = range(world.rank, len(split), world.world_size)
    sources = [split.source.sentence(i) for i in share]
    hypotheses = translate(model, sources, decoding.beam, decoding.length_penalty, max_tokens, world.is_main)
    longest = world.max(max((len(hypothesis.words) for hypothesis in hypotheses), default=0))
    rows = torch.zeros(len(split), longest + 1, dtype=torch.int64)
    for i, hypothesis in zip(share, hypotheses, strict=True):
        rows[i, : len(hypothesis.words) + 1] = torch.tensor([*hypothesis.words, EOS])
    rows = world.sum(rows.to(world.device)).tolist()
    return [row[: row.index(EOS)] for row in rows]


def sacre_bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Score, in per cent, and signature, of detokenized text."""
    metric = BLEU()
    score = metric.corpus_score(translations, [references]).score
    return score, str(metric.get_signature())


def all_scores(hypotheses: Sequence[Sequence[int]], references: Sequence[str], codec: Codec) -> dict[str, Any]:
    """The four scores of `hypotheses` (ids) against raw text."""
    sacrebleu, signature = sacre_bleu([codec.decode(ids) for ids in hypotheses], references)
    tokens = [codec.decode_tokens(ids) for ids in hypotheses]
    as_they_are = [codec.tokenize(line, normalize=False) for line in references]
    whole, whole_references = (
        [_whole_compounds(line) for line in lines] for lines in (tokens, map(codec.tokenize, references))
    )
    split, split_references = ([_split_compounds(line) for line in lines] for lines in (whole, whole_references))
    return {
        "fairseq_bleu": _multi_bleu(tokens, as_they_are),
        "sacrebleu": sacrebleu,
        "signature": signature,
        "compound_split_bleu": _multi_bleu(split, split_references),
        "tokenized_bleu": _multi_bleu(whole, whole_references),
    }


def _multi_bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of tokenized text, unsmoothed, as in multi-bleu.perl."""
    return BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(translations, [references]).score


def _whole_compounds(tokens: str) -> str:
    """Undo aggressive hyphen splitting, `rich @-@ text`."""
    return tokens.replace(" @-@ ", "-")


def _split_compounds(tokens: str) -> str:
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", tokens)
