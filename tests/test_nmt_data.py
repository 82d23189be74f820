"""Batches: every pair once an epoch, the same for any number of ranks, resumable, and with little padding."""

import json
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from nmt.codec import BOS, EOS, PAD
from nmt.data import Batch, _cuts, eval_batches, load_data, train_batches, updates_per_epoch
from nmt.prepare.command import prepare, verify
from nmt.prepare.recipes import Recipe
from nmt.prepare.toy_text import generate

SIZES = {"train": 1500, "valid": 60, "test": 50}
TOKENS = 512


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nmt_data")
    pairs = iter(generate(sum(SIZES.values())))
    for split, size in SIZES.items():
        for language, lines in zip(("en", "de"), zip(*(next(pairs) for _ in range(size)), strict=True), strict=True):
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    prepare(Recipe("own", ("train",), "valid", "test", merges=300, ratio=2.0), folder, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def data(root):
    return load_data("own", root)


@pytest.fixture
def copy(root, tmp_path):
    return shutil.copytree(root, tmp_path / "copy")


def sentences(batch: Batch) -> list[tuple]:
    rows = zip(batch.source, batch.target_out, strict=True)
    pairs = [tuple(tuple(side[side != PAD].tolist()) for side in row) for row in rows]
    return sorted(pairs) if batch.tokens else []


def all_sentences(split):
    return sorted(
        ((*split.source.sentence(index).tolist(), EOS), (*split.target.sentence(index).tolist(), EOS))
        for index in range(len(split))
    )


def test_a_split_is_what_was_prepared(root, data):
    for split, name in ((data.train, "train"), (data.valid, "valid"), (data.test, "test")):
        assert len(split) == SIZES[name]
        assert [len(split.source.sentence(i)) for i in range(len(split))] == (split.source.lengths - 1).tolist()
        assert [len(split.target.sentence(i)) for i in range(len(split))] == (split.target.lengths - 1).tolist()
    assert [data.codec.decode(data.test.target.sentence(i)) for i in range(50)] == data.test.references
    sources = (root / "valid.en.txt").read_text(encoding="utf-8").splitlines()
    assert data.codec.encode_lines(sources) == [data.valid.source.sentence(i).tolist() for i in range(60)]


def test_a_batch_is_its_sentences_padded(data):
    """Compared with rows that are made one by one."""
    indices = np.array([7, 3, 1200, 3])
    batch = data.train.batch(indices)
    assert all(tensor.dtype == torch.int64 for tensor in batch[:3])
    for row, index in enumerate(indices):
        source, target = data.train.source.sentence(index).tolist(), data.train.target.sentence(index).tolist()
        for tensor, ids in (
            (batch.source, [*source, EOS]),
            (batch.target_in, [BOS, *target]),
            (batch.target_out, [*target, EOS]),
        ):
            assert tensor[row].tolist() == ids + [PAD] * (tensor.shape[1] - len(ids))
    longest = [max(side.lengths[indices]) for side in (data.train.source, data.train.target)]
    assert [batch.source.shape, batch.target_in.shape, batch.target_out.shape] == [
        (4, longest[0]),
        *[(4, longest[1])] * 2,
    ]
    assert batch.tokens == int((batch.target_out != PAD).sum())
    assert batch.to(torch.device("cpu")) is batch


def test_the_last_sentence_of_the_file_can_be_padded(data):
    longest, last = int(np.argmax(data.train.longest)), len(data.train) - 1
    batch = data.train.batch(np.array([longest, last]))
    assert batch.source[1].tolist()[: data.train.source.lengths[last] - 1] == data.train.source.sentence(last).tolist()
    assert set(batch.source[1].tolist()[data.train.source.lengths[last] :]) <= {PAD}


def alone(*arguments, **settings):
    return [batch for ((_, batch),) in train_batches(*arguments, passes=1, **settings)]


@pytest.mark.parametrize(("passes", "world_size"), [(1, 1), (8, 1), (8, 2), (8, 8), (6, 3)])
def test_every_pair_once_an_epoch_on_equally_many_updates(data, passes, world_size):
    """The last update takes the remaining pairs: no pair is dropped."""
    ranks = [list(train_batches(data.train, TOKENS, passes, 1, 0, rank, world_size)) for rank in range(world_size)]
    assert {len(updates) for updates in ranks} == {updates_per_epoch(data.train, TOKENS, passes)}
    for rank, updates in enumerate(ranks):
        assert all([index for index, _ in update] == list(range(rank, passes, world_size)) for update in updates)
    flat = [batch for updates in ranks for update in updates for _, batch in update]
    assert sorted(chain.from_iterable(map(sentences, flat))) == all_sentences(data.train)
    assert max(len(batch.source) * max(batch.source.shape[1], batch.target_in.shape[1]) for batch in flat) <= TOKENS
    idle = [batch for batch in flat if not batch.tokens]
    assert len(idle) == len(flat) - len(alone(data.train, TOKENS, seed=1, epoch=0)) < passes


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_pass_is_the_same_on_any_number_of_ranks(data, world_size):
    one = train_batches(data.train, TOKENS, 8, 5, 3)
    ranks = [train_batches(data.train, TOKENS, 8, 5, 3, rank, world_size) for rank in range(world_size)]
    for update, *shares in zip(one, *ranks, strict=True):
        together = dict(sorted(chain(*shares)))
        assert list(together) == [index for index, _ in update] == list(range(8))
        assert {batch.update_tokens for _, batch in update} == {sum(batch.tokens for _, batch in update)}
        for index, batch in update:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(batch[:3], together[index][:3], strict=True))
            assert batch[3:] == together[index][3:]


def test_an_update_sees_several_lengths(data):
    """Its passes are the next shuffled batches, and each has its own length."""
    updates = list(train_batches(data.train, TOKENS, 4, 1, 0))
    in_turn = alone(data.train, TOKENS, seed=1, epoch=0)
    passes = [batch for update in updates for _, batch in update]
    assert list(map(sentences, passes))[: len(in_turn)] == list(map(sentences, in_turn))
    widths = [{batch.source.shape[1] for _, batch in update} for update in updates]
    assert np.mean([len(found) for found in widths]) > 2


def test_the_order_is_a_function_of_seed_and_epoch(data):
    def order(seed, epoch, start=0):
        return list(map(sentences, alone(data.train, TOKENS, seed=seed, epoch=epoch, start_update=start)))

    first = order(1, 0)
    assert order(1, 0) == first
    assert order(1, 0, start=7) == first[7:]
    updates = list(train_batches(data.train, TOKENS, 3, 1, 0))
    later = list(train_batches(data.train, TOKENS, 3, 1, 0, start_update=2))
    assert [[sentences(batch) for _, batch in update] for update in later] == [
        [sentences(batch) for _, batch in update] for update in updates[2:]
    ]
    for other in (order(1, 1), order(2, 0)):
        assert other != first and len(other) == len(first)
        assert sorted(map(tuple, other)) != sorted(map(tuple, first))
    assert order(1, 0, start=len(first)) == []


def test_the_lengths_of_updates_come_in_no_order(data):
    widths = [batch.source.shape[1] for batch in alone(data.train, TOKENS, seed=1, epoch=0)]
    assert widths != sorted(widths) and abs(np.corrcoef(widths, range(len(widths)))[0, 1]) < 0.5


def test_a_pass_with_nothing_to_do(data):
    """Passes without a batch get a row that adds nothing to the loss, and no NaN."""
    (update,) = train_batches(data.train, TOKENS, 1000, 1, 0)
    idle = [batch for _, batch in update if not batch.tokens]
    assert [tensor.tolist() for tensor in idle[0][:3]] == [[[EOS]], [[BOS]], [[PAD]]]
    logits = torch.zeros(1, 9, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, idle[0].target_out[0], ignore_index=PAD, reduction="sum")
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_a_pair_that_fits_no_batch(data):
    width = int(data.train.longest.max())
    words = rf"^a pair of {width} tokens does not fit batch={width - 1}: raise it to that many at least$"
    with pytest.raises(UserError, match=words):
        next(train_batches(data.train, width - 1, 2, 1, 0))
    with pytest.raises(UserError, match=words):
        updates_per_epoch(data.train, width - 1, 2)


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("max_tokens", [1, 300, 10_000])
def test_evaluation_takes_every_pair_once(data, world_size, max_tokens):
    seen = []
    for rank in range(world_size):
        for batch, indices in eval_batches(data.valid, max_tokens, rank, world_size):
            assert [tuple(row[row != PAD].tolist()) for row in batch.target_out] == [
                (*data.valid.target.sentence(index).tolist(), EOS) for index in indices
            ]
            assert batch.source.shape[0] * batch.source.shape[1] <= max(max_tokens, data.valid.longest.max())
            seen += indices.tolist()
    assert sorted(seen) == list(range(len(data.valid)))


def test_evaluation_begins_with_the_longest(data):
    widths = [max(batch.source.shape[1], batch.target_in.shape[1]) for batch, _ in eval_batches(data.valid, 200)]
    assert widths == sorted(widths, reverse=True)


def test_padding_is_small(data):
    batches = alone(data.train, TOKENS, seed=1, epoch=0)
    total = sum(batch.source.numel() + batch.target_out.numel() for batch in batches)
    real = int((data.train.source.lengths + data.train.target.lengths).sum())
    assert 0 < 1 - real / total < 0.1


def test_batches_are_full(data):
    """Batch sizes are multiples of 8 sentences or finer, so nearly all batches come close to the budget."""
    batches = alone(data.train, 4096, seed=1, epoch=0)
    costs = [len(batch.source) * max(batch.source.shape[1], batch.target_in.shape[1]) for batch in batches]
    assert np.median(costs) > 0.9 * 4096


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=300),
    budget=st.integers(40, 2000),
    multiple=st.sampled_from([1, 8]),
)
def test_cuts(lengths, budget, multiple):
    longest = np.sort(np.array(lengths, dtype=np.int32))
    cuts = _cuts(longest, budget, multiple)
    assert cuts[0] == 0 and cuts[-1] == len(longest) and (np.diff(cuts) > 0).all()
    for begin, end in zip(cuts, cuts[1:], strict=False):
        count = end - begin
        assert count * longest[end - 1] <= budget
        if end < len(longest):
            assert (count + multiple) * longest[min(begin + count + multiple, len(longest)) - 1] > budget or (
                begin + count + multiple > len(longest)
            )
            assert count % multiple == 0 or count < multiple


def test_data_of_another_recipe_is_refused(root):
    with pytest.raises(
        UserError, match="holds data of the recipe 'own', not 'wmt14_en_de': set data.name or data.root"
    ):
        load_data("wmt14_en_de", root)


def test_missing_data(tmp_path):
    with pytest.raises(UserError, match=r"holds no prepared data: python -m nmt.prepare --help"):
        load_data("own", tmp_path)


@pytest.mark.parametrize(
    "place", [["splits", "test"], ["splits", "train", "sha256"], ["splits", "valid", "de", "tokens"]]
)
def test_a_manifest_that_lacks_a_field_says_how_to_prepare_again(copy, place):
    manifest = json.loads((copy / "manifest.json").read_text())
    values = manifest
    for name in place[:-1]:
        values = values[name]
    del values[place[-1]]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    for recipe, command in (("wmt14_en_de", f"wmt14 SOURCE {copy}"), ("grammar", f"grammar {copy}"), ("own", "--help")):
        with pytest.raises(UserError, match=rf"^{copy}/manifest\.json .* field {'.'.join(place)} .* {command}$"):
            load_data(recipe, copy)
    with pytest.raises(UserError, match=rf"field {'.'.join(place)} "):
        verify(copy)


@pytest.mark.parametrize("name", ["train.de.bin", "valid.en.offsets"])
def test_a_short_or_missing_file_is_named(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-8])
    with pytest.raises(UserError, match=rf"{name} has [\d,]+ bytes, not [\d,]+: delete {copy}/manifest.json, "):
        load_data("own", copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"{name} has 0 bytes"):
        load_data("own", copy)


def test_raw_text_that_does_not_fit_is_named(copy):
    (copy / "test.de.txt").write_text("one line\n")
    with pytest.raises(UserError, match=r"test\.de\.txt has 1 lines, not 50"):
        _ = load_data("own", copy).test.references


def test_a_codec_that_does_not_fit_is_named(copy):
    kept = json.loads((copy / "codec.json").read_text(encoding="utf-8"))
    kept["merges"] = kept["merges"][:-1]
    (copy / "codec.json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(UserError, match=r"codec\.json is not the one that the data was made with"):
        load_data("own", copy)
