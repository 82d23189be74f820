"""The networks of configs on torch's meta device (names and shapes of all parameters, without memory), and a mark for
configs whose optimizer is not in the oldest torch."""

from importlib import import_module

import pytest
import torch
from torch.nn import Module

from engine.config import RunConfig

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="this torch has no Muon; 2.9 is the first that has"
)
CLASSES = {"imagenet": 1000}  # of other data sets: 10
WORDS = 800_000  # above the cutoffs of every config


def meta_model(task: str, config: RunConfig) -> Module:
    with torch.device("meta"):
        if task == "classification":
            create_model = import_module("classification.models").create_model
            return create_model(config.model.name, CLASSES.get(config.data.name, 10), depth=config.model.depth)
        create_model = import_module(f"{task}.model").create_model
        window = (config.sequence_length,) if task == "language_model" else ()
        return create_model(config.model, WORDS, *window)
