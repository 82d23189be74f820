"""The weights of a trained model, from its run folder or a bundle.

A bundle has the state_dict in weights.safetensors. So has a run folder whose evaluated weights are not the checkpoint's
(engine/evaluated.py).
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.checkpoint import read_checkpoint
from engine.errors import UserError

BUNDLED = "weights.safetensors"


class Weights(NamedTuple):
    state: dict[str, torch.Tensor]  # a state_dict on the CPU
    update: int  # updates taken
    vocabulary: str | None = None  # its digest; None in a task without one
    averaged: tuple[int, ...] = ()  # updates whose weights they are the mean of


def read_weights(folder: Path, say: Callable[[str], None]) -> Weights:
    """The weights to evaluate: of weights.safetensors, or else of the newest checkpoint.

    `say` gets damaged checkpoints' names. Raises UserError where none can be read.
    """
    if bundled := read_bundled(folder):
        return bundled
    saved = _read_saved(folder, say)
    if saved["extra"].get("train_mode"):
        raise UserError(
            f"{folder}: the checkpoint holds the weights of the optimizer's train mode, and those to evaluate are "
            "written by a later evaluation: train on until then"
        )
    return _of_checkpoint(saved)


def read_trained(folder: Path, say: Callable[[str], None]) -> Weights:
    """The newest checkpoint's weights, as they are trained on. Raises UserError like `read_weights`."""
    return _of_checkpoint(_read_saved(folder, say))


def _read_saved(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    saved = read_checkpoint(folder, say)
    if saved is None:
        raise UserError(f"{folder}: neither a checkpoint nor {BUNDLED} there: name a run that has saved, or a bundle")
    return saved


def _of_checkpoint(saved: dict[str, Any]) -> Weights:
    return Weights(saved["model"], saved["progress"]["update"], saved["extra"].get("vocabulary"))


def read_bundled(folder: Path) -> Weights | None:
    """The weights of weights.safetensors, or None. Raises UserError where they cannot be read."""
    path = folder / BUNDLED
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        averaged = tuple(map(int, about.get("averaged_updates", "").split()))
        return Weights(state, int(about["update"]), about.get("vocabulary"), averaged)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not written by scripts.report --bundle ({error}): get it anew") from None


def write_weights(folder: Path, weights: Weights, **about: str) -> None:
    """Write weights.safetensors, with `about` in its metadata."""
    about["update"] = str(weights.update)
    if weights.vocabulary:
        about["vocabulary"] = weights.vocabulary
    if weights.averaged:
        about["averaged_updates"] = " ".join(map(str, weights.averaged))
    # safetensors takes no tensors that share memory, as tied weights do.
    state = {name: tensor.contiguous().clone() for name, tensor in weights.state.items()}
    temporary = folder / f"{BUNDLED}.tmp"
    try:
        save_file(state, temporary, metadata=about)
        temporary.chmod(0o644)  # safetensors lets only its owner read it
        os.replace(temporary, folder / BUNDLED)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{folder / BUNDLED} cannot be written: {error}") from None
