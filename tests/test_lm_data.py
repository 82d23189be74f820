"""Batches of a corpus: the published layout in training, every token exactly once in the test."""

from functools import partial

import numpy as np
import pytest
import torch
from lm_corpus import make_corpus

from engine.errors import UserError
from engine.seed import generator
from language_model.data import TEST_STEPS, TextData, TrainBatch, hold_out, read_text, scored_batches
from language_model.prepare import build
from language_model.prepared import Corpus, Shard, open_corpus
from language_model.toy_text import paragraphs, pydoc_corpus

SEED, ROWS, STEPS = 7, 6, 5


def in_memory(*lengths: np.ndarray, words: int = 10_000) -> Corpus:
    """A corpus with the tokens 0, 1, 2, ... over all its shards."""
    shards, first = [], 0
    for of_shard in lengths:
        offsets = np.concatenate([[0], np.cumsum(of_shard)])
        tokens = first + np.arange(offsets[-1])
        shards.append(Shard(len(tokens), len(of_shard), partial(lambda *arrays: arrays, tokens, offsets)))
        first += len(tokens)
    return Corpus(shards, shards[:1], words, "", lambda: None, {})


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    random = np.random.default_rng(0)
    return in_memory(*(random.integers(3, 40, sentences) for sentences in (30, 7, 55, 1)))


@pytest.fixture
def data(corpus) -> TextData:
    return TextData(corpus, ROWS, STEPS, device="cpu", seed=SEED)


def updates_of_one_pass(data: TextData, epoch: int, **settings: int) -> list[TrainBatch]:
    return [batch for ((_, batch),) in data.train_batches(epoch, **settings)]


def published_batches(corpus: Corpus, epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The published layout: a shard's shuffled sentences as one list, viewed as [rows, batches, steps]."""
    batches = []
    for index in torch.randperm(len(corpus.train), generator=generator(SEED, "shards", epoch)).tolist():
        tokens, offsets = corpus.train[index].read()
        lines = [tokens[start:stop] for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
        order = torch.randperm(len(lines), generator=generator(SEED, "sentences", epoch, index))
        stream = torch.from_numpy(np.concatenate([lines[k] for k in order.tolist()]))
        used = (len(stream) - 1) // (ROWS * STEPS) * ROWS * STEPS
        x, y = (part.view(ROWS, -1, STEPS).permute(1, 2, 0) for part in (stream[:used], stream[1 : used + 1]))
        batches += list(zip(x, y, strict=True))
    return batches


@pytest.mark.parametrize("epoch", [0, 1])
def test_batches_are_the_published_ones(corpus, data, epoch):
    expected = published_batches(corpus, epoch)
    batches = updates_of_one_pass(data, epoch)
    assert len(batches) == len(expected) == data.updates_per_epoch > 40
    for batch, (tokens, targets) in zip(batches, expected, strict=True):
        assert torch.equal(batch.tokens, tokens) and torch.equal(batch.targets, targets)
        assert batch.tokens.shape == (STEPS, ROWS) and batch.tokens.is_contiguous()


def test_a_row_goes_on_from_batch_to_batch_until_a_new_shard(data):
    before, starts = None, 0
    for batch in updates_of_one_pass(data, 3):
        if batch.starts_shard:
            starts += 1
        else:
            assert torch.equal(batch.tokens[0], before.targets[-1])
        before = batch
    assert starts == 3  # the fourth shard, of one sentence, fills no batch


def test_orders_change_with_the_epoch_and_the_seed_alone(corpus, data):
    def tokens(seed, epoch):
        data = TextData(corpus, ROWS, STEPS, device="cpu", seed=seed)
        return torch.cat([batch.tokens for batch in updates_of_one_pass(data, epoch)])

    assert torch.equal(tokens(SEED, 0), tokens(SEED, 0))
    assert not torch.equal(tokens(SEED, 0), tokens(SEED, 1)) and not torch.equal(tokens(SEED, 0), tokens(8, 0))


def test_an_epoch_takes_every_token_once_but_for_what_fills_no_batch(corpus, data):
    taken = torch.cat([batch.tokens.flatten() for batch in updates_of_one_pass(data, 0)])
    assert len(taken.unique()) == len(taken)
    total = sum(shard.tokens for shard in corpus.train)
    assert total - len(corpus.train) * ROWS * STEPS <= len(taken) < total


@pytest.mark.parametrize(("ranks", "passes"), [(1, 3), (2, 2), (3, 6)])
def test_passes_take_neighbouring_rows_and_the_ranks_divide_them(corpus, data, ranks, passes):
    divided = TextData(corpus, ROWS // passes, STEPS, passes=passes, device="cpu", seed=SEED)
    shares = [divided.train_batches(2, rank, ranks) for rank in range(ranks)]
    for whole, *of_ranks in zip(updates_of_one_pass(data, 2), *shares, strict=True):
        found = dict(sum(of_ranks, []))
        batches = [found[index] for index in range(passes)]
        assert torch.equal(torch.cat([batch.tokens for batch in batches], 1), whole.tokens)
        assert torch.equal(torch.cat([batch.targets for batch in batches], 1), whole.targets)
        assert all(batch.starts_shard == whole.starts_shard for batch in batches)


def test_an_epoch_can_be_taken_up_anywhere(data):
    whole = updates_of_one_pass(data, 1)
    for start in range(len(whole) + 1):
        rest = updates_of_one_pass(data, 1, start_update=start)
        assert len(rest) == len(whole) - start
        for batch, expected in zip(rest, whole[start:], strict=True):
            assert torch.equal(batch.tokens, expected.tokens) and torch.equal(batch.targets, expected.targets)
            assert batch.starts_shard == expected.starts_shard


@pytest.mark.parametrize("rows", [1, 3, 32, 500])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_test_token_is_a_target_exactly_once(corpus, rows, ranks):
    tokens, offsets = corpus.test[0].read()
    found, starts = [], []
    for rank in range(ranks):
        rank_rows = []
        batches = scored_batches(*read_text(corpus.test), rows, rank, ranks, device="cpu")
        for number, batch in enumerate(batches):
            assert len(batch.tokens) <= TEST_STEPS
            found += batch.targets[batch.counted].tolist()
            expected = torch.where(batch.targets == 0, len(tokens) - 1, batch.targets - 1)  # the token before
            assert torch.equal(batch.tokens[batch.counted], expected[batch.counted])
            if number == 0:
                rank_rows = batch.targets[0].tolist()
        starts += rank_rows
    assert sorted(found) == tokens.tolist()
    assert set(starts) <= set(offsets[:-1].tolist()) and len(starts) == min(rows, len(offsets) - 1, len(starts))


def test_rows_of_a_test_text_are_about_equal():
    lengths = np.random.default_rng(1).integers(3, 40, 2000)
    (counted,) = zip(
        *[(b.counted,) for b in scored_batches(np.arange(lengths.sum()), lengths, 16, device="cpu")], strict=True
    )
    per_row = torch.cat(counted).sum(0)
    assert len(per_row) == 16 and per_row.max() - per_row.min() < 2 * 40


def test_batches_that_no_shard_fills_are_refused(corpus):
    with pytest.raises(UserError, match="batch=512 rows of sequence_length=20 tokens need a shard of 10,241"):
        TextData(corpus, 512, 20, device="cpu", seed=1)


def test_prepared_files_are_read_as_they_were_written(tmp_path):
    build(make_corpus(tmp_path / "text"), tmp_path / "out")
    corpus = open_corpus(tmp_path / "out")
    batches = updates_of_one_pass(TextData(corpus, 8, 20, device="cpu", seed=1), 0)
    vocabulary = corpus.load_vocabulary()
    assert len(vocabulary) == corpus.words
    first = [vocabulary.words[token] for token in batches[0].tokens[:, 0].tolist()]
    assert first[0] == "<S>" and batches[0].tokens.dtype == torch.int64
    after_end = torch.cat([batch.targets[batch.tokens == vocabulary.end] for batch in batches])
    assert len(after_end) > 100 and (after_end == vocabulary.start).all()


def test_pydoc_topics_split_paragraphs_between_training_and_test():
    corpus = pydoc_corpus()
    vocabulary = corpus.load_vocabulary()
    (tokens, offsets), lines = corpus.test[0].read(), paragraphs()
    assert len(set(lines)) == len(lines) and len(offsets) - 1 == len(lines) // 10
    assert sum(shard.sentences for shard in corpus.train) + len(lines) // 10 == len(lines)
    words = [vocabulary.words[token] for token in tokens[1 : offsets[1] - 1]]
    pairs = zip(words, lines[9].split(), strict=True)
    assert all(word in (expected, "<UNK>") for word, expected in pairs)
    assert corpus.facts["text"]["sha256"] != corpus.vocabulary_digest == corpus.facts["vocabulary"]["sha256"]
    assert sum(shard.tokens for shard in corpus.train) > 50_000


def test_whole_sentences_are_held_out_of_training(corpus):
    parts = hold_out(corpus, 0.1)
    sentences = {}
    for name, shards in (("whole", corpus.train), ("train", parts.train), ("valid", parts.valid)):
        read = [shard.read() for shard in shards]
        assert [(shard.tokens, shard.sentences) for shard in shards] == [(len(t), len(o) - 1) for t, o in read]
        found = [tuple(t[a:b].tolist()) for t, o in read for a, b in zip(o[:-1], o[1:], strict=True)]
        sentences[name] = found
    assert len(sentences["valid"]) == 3 + 1 + 6  # of 30, 7 and 55 sentences, and none of one
    assert sorted(sentences["train"] + sentences["valid"]) == sorted(sentences["whole"])
    assert corpus.valid == () and parts.test == corpus.test
    with pytest.raises(UserError, match="holds out no training sentence"):
        hold_out(corpus, 0.001)
