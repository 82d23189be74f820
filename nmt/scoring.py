"""BLEU in the four ways that are reported for English-German. They differ by up to 0.7 points, so each has a name.

fairseq_bleu         Moses tokens with hyphens split (`rich @-@ text` is three tokens). In the references' punctuation
                     only the typographic apostrophe is normalised. fairseq's generation prints this score for data
                     that its prepare-wmt14en2de.sh made. It stands beside the published number
sacrebleu            sacreBLEU of the detokenized text, with its signature: the number to compare with other work
compound_split_bleu  Moses tokens, both sides normalised, compounds split as `rich ##AT##-##AT## text`. Most papers on
                     Transformers report this score
tokenized_bleu       the same with whole compounds, as multi-bleu.perl computes it

sacreBLEU's implementation computes all four. Only the score called sacrebleu is smoothed, and only if no four words in
a row are right in the whole test set.
"""

import re
from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU

from nmt.codec import Codec


def sacre_bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Score (in per cent) and signature of detokenized `translations`, with one reference each."""
    metric = BLEU()
    score = metric.corpus_score(translations, [references]).score
    return score, str(metric.get_signature())


def all_scores(hypotheses: Sequence[Sequence[int]], references: Sequence[str], codec: Codec) -> dict[str, Any]:
    """The four scores of `hypotheses` (ids) against raw reference text, by the names above, and the signature."""
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
    """BLEU of tokenized text, without smoothing, as multi-bleu.perl prints it."""
    return BLEU(tokenize="none", smooth_method="none", force=True).corpus_score(translations, [references]).score


def _whole_compounds(tokens: str) -> str:
    """Undo the tokenizer's aggressive splitting of hyphens: `rich @-@ text` becomes `rich-text`."""
    return tokens.replace(" @-@ ", "-")


def _split_compounds(tokens: str) -> str:
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", tokens)
