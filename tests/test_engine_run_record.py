"""The run folder: lines that a resumed run repeats, results that are never half written, TensorBoard."""

import json

import pytest
import torch

from engine.config import RunConfig, load_config
from engine.distributed import World
from engine.errors import UserError
from engine.run_record import RunRecord, read_result

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def config(tmp_path) -> RunConfig:
    (tmp_path / "c.yaml").write_text("{table: t, row: r, batch: 8, optimizer: {name: sgd, lr: 0.1}}")
    return load_config(RunConfig, tmp_path / "c.yaml")


def lines(record: RunRecord) -> list[int]:
    return [json.loads(line)["update"] for line in (record.folder / "metrics.jsonl").read_text().splitlines()]


def test_rewinding_drops_what_will_be_repeated(config, tmp_path):
    record = RunRecord(config, tmp_path / "run", ALONE)
    record.metrics("train", 1, loss=2.0)
    position = record.position()
    record.metrics("train", 2, loss=1.0)
    record.rewind(position)
    assert lines(record) == [1] and record.wall_s >= position["wall_s"] > 0
    record.metrics("train", 2, loss=1.0)
    assert lines(record) == [1, 2]
    record.rewind(None)
    assert lines(record) == []


def test_only_a_finished_run_is_complete(config, tmp_path):
    record = RunRecord(config, tmp_path / "run", ALONE)
    record.environment(world_size=1)
    assert not record.complete and read_result(record.folder) is None
    record.finish(final=1.0)
    assert record.complete and read_result(record.folder)["complete"] is True
    (record.folder / "result.json").write_text('{"final": ')
    with pytest.raises(UserError, match="is damaged .*delete it, then run the same command again"):
        read_result(record.folder)


def test_the_environment_keeps_that_of_the_earlier_part(config, tmp_path):
    record = RunRecord(config, tmp_path / "run", ALONE)
    for world_size in (1, 2, 4):
        record.environment(world_size=world_size)
    environment = json.loads((record.folder / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["device"] and environment["command"]
    assert [part["recipe"]["world_size"] for part in (environment, *environment["resumed_from"])] == [4, 1, 2]


def test_tensorboard_gets_the_same_numbers(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def begin(position=None, update=0):
        record = RunRecord(config, tmp_path / "run", ALONE, tensorboard=True)
        record.rewind(position, update)
        return record

    def shown(name):
        board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
        return [(event.step, event.value) for event in board.Scalars(name)]

    record = begin()
    record.metrics("train", 50, loss=2.5, note="words")
    record.metrics("train", 60, loss=2.0)
    position = record.position()
    record.metrics("epoch", 60, loss=9.0)
    record.metrics("train", 70, loss=9.0)
    # What a kill leaves: at least the events up to the last save.
    assert shown("train/loss")[:2] == [(50, 2.5), (60, 2.0)]
    record._board.close()
    record._lock.close()
    record = begin(position, 60)
    record.metrics("epoch", 60, loss=1.5)
    record.metrics("train", 70, loss=1.0)
    record.finish(final=1.0)
    assert shown("train/loss") == [(50, 2.5), (60, 2.0), (70, 1.0)] and shown("epoch/loss") == [(60, 1.5)]


def test_other_ranks_write_nothing(config, tmp_path):
    record = RunRecord(config, tmp_path / "run", World(1, 1, 1, torch.device("cpu")))
    record.say("x")
    record.metrics("train", 1, loss=1.0)
    record.environment(world_size=2)
    record.finish(final=1.0)
    assert not record.folder.exists() and record.position() == {}


def test_a_folder_where_nothing_was_trained_is_free_for_other_settings(config, tmp_path):
    """A user often finds a misspelt setting after the folder was made. The corrected command must be accepted."""
    other = load_config(RunConfig, tmp_path / "c.yaml", ["optimizer.lr=0.2"])
    RunRecord(config, tmp_path / "run", ALONE)
    RunRecord(other, tmp_path / "run", ALONE)
    (tmp_path / "run/checkpoint.pt").touch()
    with pytest.raises(UserError, match="other settings: optimizer.lr"):
        RunRecord(config, tmp_path / "run", ALONE)


def test_a_start_that_fails_leaves_no_folder(config, tmp_path):
    record = RunRecord(config, tmp_path / "a/b/run", ALONE)
    with pytest.raises(ValueError), record.start():
        raise ValueError
    assert not (tmp_path / "a").exists()
    record = RunRecord(config, tmp_path / "run", ALONE)
    record._lock.close()
    record = RunRecord(config, tmp_path / "run", ALONE)
    with pytest.raises(ValueError), record.start():
        raise ValueError
    assert (tmp_path / "run/config.yaml").exists()


def test_an_unchanged_config_is_not_rewritten(config, tmp_path):
    RunRecord(config, tmp_path / "run", ALONE)._lock.close()
    before = (tmp_path / "run/config.yaml").stat()
    RunRecord(config, tmp_path / "run", ALONE)
    after = (tmp_path / "run/config.yaml").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_numbers_that_json_has_not_are_null(config, tmp_path):
    record = RunRecord(config, tmp_path / "run", ALONE)
    record.metrics("train", 1, loss=1.0, norm=float("inf"))
    record.finish(final=1.0, other=float("nan"))

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((record.folder / "metrics.jsonl").read_text(), parse_constant=refuse)
    result = json.loads((record.folder / "result.json").read_text(), parse_constant=refuse)
    assert (line["loss"], line["norm"], result["final"], result["other"]) == (1.0, None, 1.0, None)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_where_no_run_can_be_written(config, tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write a run there .*choose another run_dir"):
        RunRecord(config, tmp_path / place, ALONE)
