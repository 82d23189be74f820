"""The weights of a trained model: those of its run folder, or of a bundle.

A bundle holds the model's state_dict in a file of the safetensors format.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.checkpoint import read_checkpoint
from engine.errors import UserError

BUNDLED = "weights.safetensors"


class Weights(NamedTuple):
    state: dict[str, torch.Tensor]  # the model's state_dict, on the CPU
    update: int  # updates that the run had taken
    vocabulary: str | None = None  # digest of the data's; None in a task without one
    averaged: tuple[int, ...] = ()  # updates whose weights they are the mean of


def read_weights(folder: Path, say: Callable[[str], None]) -> Weights:
    """The weights of the bundle, or of the newest checkpoint of the run folder; `say` gets the names of damaged ones.

    Raises UserError where there are none, or where they cannot be read.
    """
    if bundled := read_bundled(folder):
        return bundled
    saved = read_checkpoint(folder, say)
    if saved is None:
        raise UserError(f"{folder}: neither a checkpoint nor {BUNDLED} there: name a run that has saved, or a bundle")
    return Weights(saved["model"], saved["progress"]["update"], saved["extra"].get("vocabulary"))


def read_bundled(folder: Path) -> Weights | None:
    """The weights of the bundle; None where the folder is none. Raises UserError where they cannot be read."""
    path = folder / BUNDLED
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
        averaged = tuple(map(int, about.get("averaged_updates", "").split()))
        return Weights(state, int(about["update"]), about.get("vocabulary"), averaged)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged, or not written by scripts.report --bundle ({error}): get it anew") from None


def write_bundled(folder: Path, weights: Weights, about: dict[str, str]) -> None:
    """Write `weights` to a bundle. `about` goes to the file's metadata."""
    about = about | {"update": str(weights.update)}
    if weights.vocabulary:
        about["vocabulary"] = weights.vocabulary
    if weights.averaged:
        about["averaged_updates"] = " ".join(map(str, weights.averaged))
    # safetensors takes no tensors that share memory, and tied weights do.
    state = {name: tensor.contiguous().clone() for name, tensor in weights.state.items()}
    save_file(state, folder / BUNDLED, metadata=about)
    (folder / BUNDLED).chmod(0o644)  # safetensors lets nobody else read it
