"""Score an image classifier on its test set: python -m classification.evaluate RUN|BUNDLE [key=value ...]

RUN is a run folder, whose newest checkpoint is used. BUNDLE comes from `python -m scripts.report --bundle RUN`.
key=value changes the config, e.g. data.root=FOLDER. torchrun starts it as well.
"""

import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from classification.augment import ImageData
from classification.config import Config
from classification.data import load_data
from classification.models import create_model
from classification.train import evaluate
from engine.checkpoint import require_same_shapes
from engine.config import load_config
from engine.distributed import World, setup
from engine.errors import run_main, settings_of
from engine.precision import Precision
from engine.run import create_precision
from engine.weights import read_weights

USAGE = "usage: python -m classification.evaluate RUN|BUNDLE [key=value ...]   e.g. runs/cifar10/apollo_milestone/seed1"


class Trained(NamedTuple):
    config: Config
    world: World
    precision: Precision
    model: torch.nn.Module
    data: ImageData
    update: int


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    folder = Path(arguments[0])
    config = load_config(Config, folder / "config.yaml", arguments[1:])
    with closing(setup(config.device)) as world:
        trained = open_trained(folder, config, world)
        tested = evaluate(trained)
    if world.is_main:
        print(f"{trained.data.test_size:,} images, weights after {trained.update:,} updates")
        print(f"top-1 accuracy, %  {tested['test_top1']:8.2f}")
        print(f"loss               {tested['test_loss']:8.4f}")
    return 0


def open_trained(folder: Path, config: Config, world: World) -> Trained:
    """UserError where model and data do not fit or cannot be used."""
    say = partial(print, file=sys.stderr)
    weights = read_weights(folder, say)
    with world.main_first():  # it may have to download
        data = load_data(config.data, world.device, config.seed)
    with settings_of("model"):
        model = create_model(config.model.name, data.num_classes, depth=config.model.depth)
    require_same_shapes(model, weights.state, folder)
    model.load_state_dict(weights.state)
    model.to(world.device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    precision = create_precision(config.precision, world.device, say)
    return Trained(config, world, precision, model, data, weights.update)


if __name__ == "__main__":
    run_main(main)
