"""The mean of the last weights that a run has kept, to which the published scores of translation belong.

They are kept in RUN/averaging/<update>/. A resumed run writes the same files.
"""

import shutil
from pathlib import Path

import torch

from engine.checkpoint import different_shapes, read_checkpoint, write_checkpoint
from engine.errors import UserError


def keep_weights(run_dir: Path, update: int, model: torch.nn.Module, vocabulary: str | None, last: int) -> None:
    """Write this update's weights with the vocabulary's digest, if any. Only the `last` newest stay."""
    folder = run_dir / "averaging" / f"{update:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, {"model": model.state_dict(), "codec": vocabulary}, keep=1)
    for old in _kept(run_dir)[:-last]:
        shutil.rmtree(old)


def average_weights(run_dir: Path, last: int, vocabulary: str | None) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The mean of the `last` newest kept weights, or of fewer, and their updates.

    Raises UserError if there are none, or if their models or vocabularies differ.
    """
    folders = _kept(run_dir)[-last:]
    if not folders:
        raise UserError(f"{run_dir} holds no weights yet: train to the end of an epoch, or average.every updates")
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        saved = read_checkpoint(folder, say=lambda text: None)
        if saved is None:
            raise UserError(
                f"{folder} holds no checkpoint.pt: delete the folder, or the last averages fewer (average.last)"
            )
        if saved["codec"] != vocabulary:
            raise UserError(f"{folder} was trained with another vocabulary than the rest of the run")
        weights = {name: tensor.double() for name, tensor in saved["model"].items()}
        if total and (different := different_shapes(weights, total)):
            name, here, there = different
            raise UserError(
                f"{folder} and {folders[0].name} are of different models ({name}: {here} and {there}): only the "
                "weights of one run can be averaged"
            )
        total = {name: total[name] + tensor for name, tensor in weights.items()} if total else weights
    mean = {name: (tensor / len(folders)).float() for name, tensor in total.items()}
    return mean, [int(folder.name) for folder in folders]


def _kept(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "averaging").glob("[0-9]*") if path.is_dir())
