"""What the benchmarks share: who is measured when, and what counts."""

import pytest
import torch

from benchmarks.turns import ratios, speeds, turns
from engine.distributed import World


def test_every_other_round_reverses_the_order():
    assert list(turns("abc", 3)) == [*"abc", *"cba", *"abc"]


@pytest.mark.parametrize("warmup", [False, True])
def test_the_warmup_comes_first_and_does_not_count(warmup):
    calls = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = speeds(contenders, 8.0, 2, World(0, 1, 0, torch.device("cpu")), warmup)
    assert calls == [*"ab" * warmup, *"ab", *"ba"]
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
    assert all(value > 0 for values in found.values() for value in values)


def test_ratios_are_taken_round_by_round():
    assert ratios([1.0, 9.0], [2.0, 3.0]) == [0.5, 3.0]
