"""Batched beam search: a few tensor operations a word for all hypotheses of a batch.

A hypothesis's score is log p(words) / length ** length_penalty, as in fairseq's generation. The length counts EOS.

A step has a sentence's K best continuations and the K ends of its hypotheses. An end counts if it is among the K best
of both. A sentence is finished when K ends have counted, no continuation can beat the best end, or it is too long.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nmt.codec import BOS, EOS, PAD
from nmt.model import Transformer

LONGER = 50  # words that a translation may have beyond its source's, as in "Attention Is All You Need"
DROP_SHARE = 0.8  # finished sentences leave the batch when at most this share is unfinished


class Hypothesis(NamedTuple):
    words: list[int]  # without BOS and EOS
    score: float  # divided by its length penalty


@torch.no_grad()
def translate(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    beam_size: int = 5,
    length_penalty: float = 0.6,
    max_tokens: int = 4096,
    progress: bool = False,
) -> list[Hypothesis]:
    """The best translation of each source (ids without EOS). Puts the model into evaluation mode.

    A batch has at most `max_tokens` padded source words, or one sentence.
    """
    model.eval()
    device = next(model.parameters()).device
    order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))  # longest first: a lack of memory shows at once
    found: list[Hypothesis | None] = [None] * len(sources)
    with tqdm(
        total=len(sources), unit="sentence", desc="translating", leave=False, disable=None if progress else True
    ) as bar:
        start = 0
        while start < len(order):
            longest = len(sources[order[start]]) + 1
            batch = order[start : start + max(1, max_tokens // longest)]
            padded = pad_sequence(
                [torch.as_tensor(np.array([*sources[i], EOS], dtype=np.int64)) for i in batch],
                batch_first=True,
                padding_value=PAD,
            ).to(device)
            for i, hypothesis in zip(batch, beam_search(model, padded, beam_size, length_penalty), strict=True):
                found[i] = hypothesis
            start += len(batch)
            bar.update(len(batch))
    return found


@torch.no_grad()
def beam_search(
    model: Transformer, source: Tensor, beam_size: int, length_penalty: float, longest: Tensor | None = None
) -> list[Hypothesis]:
    """The best hypothesis for each sentence of `source`, int64 [B, S], padded with PAD.

    `longest`, int64 [B], limits their lengths, with EOS.
    """
    device, k = source.device, beam_size
    if longest is None:
        longest = (source != PAD).sum(1) + LONGER
    state = model.start(source, k)

    def penalty(length: Tensor | int) -> Tensor | float:
        return length**length_penalty

    number = torch.arange(len(source), device=device)
    scores = torch.full((len(source), k), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all hypotheses start equal, so one is enough
    words = source.new_full((len(source), k), BOS)
    history = source.new_empty((len(source), k, 0))
    best = torch.full((len(source),), -torch.inf, device=device)
    best_words = source.new_zeros((len(source), 0))  # padded with PAD
    ends = torch.zeros_like(number)
    done = torch.zeros_like(number, dtype=torch.bool)
    found: dict[int, Hypothesis] = {}

    while len(number):
        length = history.shape[2] + 1
        logits = model.step(words, state).float()
        log_p = scores[..., None] - logits.logsumexp(2, keepdim=True)
        ended = (logits[..., EOS : EOS + 1] + log_p).squeeze(2)
        logits[..., [PAD, BOS, EOS]] = -torch.inf
        top, top_words = logits.topk(min(k, logits.shape[2]), dim=2)
        continued, index = (top + log_p).flatten(1).topk(k, dim=1)

        least = torch.cat((continued, ended), 1).topk(k, dim=1).values[:, -1:]
        last = longest == length
        counts = ((ended >= least) | last[:, None]) & ended.isfinite() & ~done[:, None]
        ended = ended.masked_fill(~counts, -torch.inf) / penalty(length)
        ends += counts.sum(1)
        score, which = ended.max(1)
        better = score > best
        chosen = history.gather(1, which[:, None, None].expand(-1, 1, length - 1)).squeeze(1)
        best_words = torch.where(better[:, None], chosen, best_words)
        best = torch.where(better, score, best)
        done |= last | (ends >= k) | (best >= continued[:, 0] / penalty(longest))

        parents = index // top.shape[2]
        scores, words = continued, top_words.flatten(1).gather(1, index)
        history = torch.cat((history.gather(1, parents[..., None].expand_as(history)), words[..., None]), 2)
        best_words = torch.nn.functional.pad(best_words, (0, 1), value=PAD)
        state.reorder(parents)

        going_on = (~done).nonzero().squeeze(1)
        if len(going_on) <= DROP_SHARE * len(number):
            finished = done.nonzero().squeeze(1)
            found |= _hypotheses(number[finished], best_words[finished], best[finished])
            state.keep(going_on)
            number, longest, scores, words, history, best, best_words, ends, done = (
                values[going_on] for values in (number, longest, scores, words, history, best, best_words, ends, done)
            )
    return [found[i] for i in range(len(source))]


def _hypotheses(number: Tensor, words: Tensor, scores: Tensor) -> dict[int, Hypothesis]:
    rows = zip(number.tolist(), words.cpu().numpy(), scores.tolist(), strict=True)
    return {i: Hypothesis(row[row != PAD].tolist(), score) for i, row, score in rows}
