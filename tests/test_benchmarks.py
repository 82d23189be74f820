"""What the benchmarks share: who is measured when, and what counts."""

from pathlib import Path

import pytest
import torch

from benchmarks import nmt
from benchmarks.turns import ratios, speeds, turns
from engine.distributed import World
from engine.errors import UserError

ROOT = Path(__file__).parents[1]


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


def test_overrides_may_stand_behind_options():
    words = ["train", str(ROOT / "configs/grammar/apollo.yaml"), "a.b=1", "--updates", "2", "c=3", "--rounds", "1"]
    with pytest.raises(UserError, match="unknown key 'a'"):
        nmt.main(words)
    with pytest.raises(SystemExit):
        nmt.main([*words, "--bogus"])


def test_ratios_are_taken_round_by_round():
    assert ratios([1.0, 9.0], [2.0, 3.0]) == [0.5, 3.0]
