"""A run folder opened for translation: its settings, its vocabulary and the average of its last weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from engine.allocator import keep_freed_memory
from engine.checkpoint import require_same_shapes
from engine.config import load_config
from engine.distributed import World, setup
from nmt.averaging import average_weights
from nmt.codec import Codec
from nmt.model import Transformer
from nmt.train import Config


class Trained(NamedTuple):
    config: Config
    codec: Codec
    model: Transformer  # in evaluation mode, on the world's device
    updates: list[int]  # the averaged weights are from after these
    world: World


def open_run(run_dir: Path, overrides: Sequence[str]) -> Trained:
    """Read RUN, finished or not. `overrides` ("key=value") change its config. UserError if something does not fit."""
    config = load_config(Config, run_dir / "config.yaml", overrides)
    world = setup(config.device)
    if world.device.type == "cpu":
        keep_freed_memory()
    codec = Codec.load(run_dir)
    weights, updates = average_weights(run_dir, config.average.last, codec.digest)
    model = Transformer(config.model, codec.size)
    require_same_shapes(model, weights, run_dir)
    model.load_state_dict(weights)
    return Trained(config, codec, model.to(world.device).eval(), updates, world)
