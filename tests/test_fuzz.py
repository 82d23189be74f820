"""Some hundred mutated inputs of each kind. The long form is the script tests/fuzz/mutated.py."""

import logging

import pytest
from fuzz.mutated import KINDS, run_case


@pytest.mark.parametrize(
    ("kind", "count"), [("config", 200), ("checkpoint", 100), ("shard", 200), ("text", 500), ("image", 200)]
)
def test_mutated_input_works_or_is_refused_in_one_line(tmp_path, kind, count):
    logging.disable()
    try:
        case = KINDS[kind](tmp_path)
        worked = [run_case(case, kind, 0, number, tmp_path) for number in range(count)]
    finally:
        logging.disable(logging.NOTSET)
    assert any(worked) and not all(worked)  # both ends are reached
