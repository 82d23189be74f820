"""BLEU in the three ways that are reported for English-German, all computed by sacreBLEU.

bleu                 sacreBLEU of the detokenized text, with its signature: the number to compare with other work
tokenized_bleu       of Moses tokens, as multi-bleu.perl computes it
compound_split_bleu  the same with hyphenated compounds split ("rich ##AT##-##AT## text"), as most papers on
                     Transformers report it; the published table does too
"""

import re
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU

from nmt.codec import Codec


def sacre_bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Score in per cent and signature of detokenized `translations`, one reference each."""
    metric = BLEU()
    score = metric.corpus_score(translations, [references]).score
    return score, str(metric.get_signature())


def all_scores(hypotheses: Sequence[Sequence[int]], references: Sequence[str], codec: Codec) -> dict[str, Any]:
    """bleu, signature, tokenized_bleu and compound_split_bleu of `hypotheses` (ids) against raw reference text."""
    bleu, signature = sacre_bleu([codec.decode(ids) for ids in hypotheses], references)
    tokens = [_whole_compounds(codec.decode_tokens(ids)) for ids in hypotheses]
    reference_tokens = [_whole_compounds(codec.tokenize(line)) for line in references]
    return {
        "bleu": bleu,
        "signature": signature,
        "tokenized_bleu": _multi_bleu(tokens, reference_tokens),
        "compound_split_bleu": _multi_bleu(
            [_split_compounds(line) for line in tokens], [_split_compounds(line) for line in reference_tokens]
        ),
    }


def _multi_bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of text that is tokenized already, without smoothing: what multi-bleu.perl prints."""
    return BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(translations, [references]).score


def _whole_compounds(tokens: str) -> str:
    """Undo the tokenizer's aggressive splitting of hyphens: `rich @-@ text` is `rich-text` again."""
    return tokens.replace(" @-@ ", "-")


def _split_compounds(tokens: str) -> str:
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", tokens)
