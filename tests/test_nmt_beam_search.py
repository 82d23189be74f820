"""Beam search against all possible translations, against a plain beam search, and against itself in other batches."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmt.beam_search import beam_search, translate
from nmt.codec import BOS, EOS, PAD
from nmt.model import ModelConfig, create_model


def random_model(seed, words, sharpness=3.0, **sizes):
    """A random model whose distributions are far from uniform, so that translations end and hypotheses compete."""
    torch.manual_seed(seed)
    shape = {"width": 16, "inner_width": 24, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, **sizes}
    model = create_model(ModelConfig(**shape), words).eval()
    with torch.no_grad():
        model.embedding.weight *= sharpness
    return model


@torch.no_grad()
def log_p_next(model, source, prefix):
    logits = model(torch.tensor([[*source, EOS]]), torch.tensor([[BOS, *prefix]]))[0, -1]
    return logits.double().log_softmax(0).tolist()


def penalty(length, length_penalty):
    return length**length_penalty


def exhaustive(model, source, words, longest, length_penalty):
    """The best of all translations of at most `longest` words (with EOS), and its score."""
    best = (-math.inf, None)
    for length in range(1, longest + 1):
        for sentence in itertools.product(range(EOS + 1, words), repeat=length - 1):
            log_p = sum(log_p_next(model, source, sentence[:t])[word] for t, word in enumerate((*sentence, EOS)))
            best = max(best, (log_p / penalty(length, length_penalty), list(sentence)))
    return best


def plain_beam_search(model, source, words, longest, k, length_penalty):
    """The rules at the top of nmt/beam_search.py, for one sentence and one hypothesis at a time."""
    hypotheses, best, ends = [(0.0, [])], (-math.inf, None), 0
    for length in range(1, longest + 1):
        candidates = []
        for score, prefix in hypotheses:
            log_p = log_p_next(model, source, prefix)
            candidates += [(score + log_p[word], prefix, word) for word in range(EOS, words)]
        candidates.sort(key=lambda candidate: -candidate[0])
        continued = [candidate for candidate in candidates if candidate[2] != EOS][:k]
        counted = candidates if length == longest else candidates[:k]
        for score, prefix, word in counted:
            if word == EOS:
                ends += 1
                best = max(best, (score / penalty(length, length_penalty), prefix))
        if ends >= k or (continued and best[0] >= continued[0][0] / penalty(longest, length_penalty)):
            break
        hypotheses = [(score, [*prefix, word]) for score, prefix, word in continued]
    return best


def limits(*lengths):
    return torch.tensor(lengths)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(5, 6), st.integers(1, 4), st.sampled_from([0.0, 0.6, 1.0, 3.0]))
def test_wide_enough_it_finds_the_best_of_all(seed, words, longest, length_penalty):
    model = random_model(seed, words)
    source = [4, 3, 4]
    score, sentence = exhaustive(model, source, words, longest, length_penalty)
    width = (words - 3) ** longest
    (found,) = beam_search(model, torch.tensor([[*source, EOS]]), width, length_penalty, limits(longest))
    assert found.words == sentence
    assert found.score == pytest.approx(score, rel=1e-4, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(1, 12), st.sampled_from([0.0, 0.6, 2.0]))
def test_it_is_beam_search(seed, k, longest, length_penalty):
    words, source = 12, [5, 9, 4, 3]
    model = random_model(seed, words)
    score, sentence = plain_beam_search(model, source, words, longest, k, length_penalty)
    (found,) = beam_search(model, torch.tensor([[*source, EOS]]), k, length_penalty, limits(longest))
    assert found.words == sentence
    assert found.score == pytest.approx(score, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed):
    words, model = 30, random_model(seed, 30)
    for source in ([7, 8, 9], [4], [20, 11, 5, 5, 29, 12]):
        greedy = []
        while len(greedy) < len(source) + 1 + 49:
            log_p = log_p_next(model, source, greedy)
            word = max(range(EOS, words), key=lambda w, log_p=log_p: log_p[w])
            if word == EOS:
                break
            greedy.append(word)
        assert translate(model, [source], beam_size=1)[0].words == greedy


def random_sources(count, words, seed=3):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=random).tolist()
    return [torch.randint(4, words, (length,), generator=random).tolist() for length in lengths]


@pytest.mark.parametrize("k", [1, 4])
def test_what_else_is_in_the_batch_changes_no_translation(k):
    """Alone, in batches of any size, in any order."""
    model, sources = random_model(11, 50, encoder_layers=2, decoder_layers=2), random_sources(30, 50)
    alone = [translate(model, [source], k)[0] for source in sources]
    assert len({len(hypothesis.words) for hypothesis in alone}) > 5
    for max_tokens in (20, 150, 10_000):
        together = translate(model, sources, k, max_tokens=max_tokens)
        assert [hypothesis.words for hypothesis in together] == [hypothesis.words for hypothesis in alone]
        assert [h.score for h in together] == pytest.approx([h.score for h in alone], rel=1e-4)
    backwards = translate(model, sources[::-1], k)
    assert [hypothesis.words for hypothesis in backwards[::-1]] == [hypothesis.words for hypothesis in alone]


def test_a_translation_ends_at_its_longest_length():
    """The weights make EOS the least likely word, so each sentence stops at its own limit."""
    model, sources = random_model(2, 40), random_sources(4, 40)
    with torch.no_grad():
        model.embedding.weight[EOS] = -10 * model.decoder[-1].feed_forward_residual.norm.weight.new_ones(16)
        model.decoder[-1].feed_forward_residual.norm.bias += 1.0
    found = translate(model, sources, beam_size=3)
    assert [len(hypothesis.words) for hypothesis in found] == [len(source) + 50 for source in sources]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor([*s, EOS]) for s in sources], True, PAD)
    found = beam_search(model, padded, 3, 0.6, limits(1, 5, 40, 2))
    assert [len(hypothesis.words) for hypothesis in found] == [0, 4, 39, 1]


class Chain:
    """Acts as a Transformer. With probability 0.5 it ends at once; with 0.4 it says 4, 5, 6, 7, 8, and ends."""

    def start(self, source, hypotheses):
        return self

    def step(self, words, state):
        last = words.unsqueeze(2)
        p = torch.full((*words.shape, 9), 1e-9)
        p = p.scatter(2, (last + 1).clamp(4, 8), 1.0).scatter(2, torch.full_like(last, EOS), 1e-9)
        p[words == BOS] = torch.tensor([0, 0, 0.5, 0.1, 0.4, 0, 0, 0, 0]) + 1e-9
        p[words == 8] = torch.eye(9)[EOS] + 1e-9
        return p.log()

    def reorder(self, parents):
        pass

    def keep(self, sentences):
        pass


@pytest.mark.parametrize(("length_penalty", "longer"), [(0.0, False), (0.1, False), (0.3, True), (1.0, True)])
def test_a_longer_translation_may_still_overtake(length_penalty, longer):
    """log 0.4 is divided by the penalty of 6 words, log 0.5 by that of one. The search must not stop at log 0.5."""
    assert (math.log(0.4) / penalty(6, length_penalty) > math.log(0.5)) == longer
    (found,) = beam_search(Chain(), torch.tensor([[4, EOS]]), 2, length_penalty, limits(20))
    assert found.words == ([4, 5, 6, 7, 8] if longer else [])


def test_special_words_are_never_produced():
    model = random_model(0, 6)
    found = translate(model, random_sources(20, 6), beam_size=9)  # wider than the vocabulary
    produced = {word for hypothesis in found for word in hypothesis.words}
    assert produced and not produced & {PAD, BOS, EOS}


def test_nothing_to_translate():
    assert translate(random_model(0, 6), []) == []
