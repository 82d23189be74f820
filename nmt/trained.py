"""A run folder or bundle, opened for translating: settings, vocabulary, averaged weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.allocator import keep_freed_memory
from engine.averaging import average_weights
from engine.checkpoint import require_same_shapes
from engine.config import load_config
from engine.distributed import World, setup
from engine.errors import UserError
from engine.weights import BUNDLED, read_bundled
from nmt.codec import Codec
from nmt.config import Config
from nmt.model import Transformer


class Trained(NamedTuple):
    config: Config
    codec: Codec
    model: Transformer  # in evaluation mode, on the world's device
    updates: list[int]  # after which the averaged weights were taken; empty for an exponential average
    world: World


def open_run(run_dir: Path, overrides: Sequence[str]) -> Trained:
    """`run_dir` is a run, finished or not, or a bundle. `overrides` change its config. UserError if they do not fit."""
    config = load_config(Config, run_dir / "config.yaml", overrides)
    world = setup(config.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    codec = Codec.load(run_dir)
    if bundled := read_bundled(run_dir):
        if any(override.startswith("average") for override in overrides):
            raise UserError(
                f"{run_dir / BUNDLED} holds the average alone, not what went into it: leave average.last out"
            )
        if bundled.vocabulary != codec.digest:
            raise UserError(f"{run_dir / BUNDLED} was trained with another vocabulary than codec.json there holds")
        weights, updates = bundled.state, list(bundled.averaged)
    elif config.average.decay:
        raise UserError(f"{run_dir} has no {BUNDLED}, the average that the run writes: train to its first validation")
    else:
        weights, updates = average_weights(run_dir, config.average.last, codec.digest)
    model = Transformer(config.model, codec.size)
    require_same_shapes(model, weights, run_dir)
    model.load_state_dict(weights)
    return Trained(config, codec, model.to(world.device).eval(), updates, world)
