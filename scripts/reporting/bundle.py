"""What one attaches to a release of a trained model: settings, environment, metrics, result, weights, checksums.

    config.yaml  environment.json  metrics.jsonl  result.json     as the run left them
    weights.safetensors     the model's state_dict under its own names, float32 as trained; for a translation run the
                            average that its score is that of. Its metadata say which run, update and vocabulary
    codec.json              of a translation run: its vocabulary
    SHA256SUMS              for `sha256sum -c SHA256SUMS`

No file in it is a pickle.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import read_checkpoint
from engine.errors import UserError
from engine.files import write_atomically
from nmt.averaging import average_weights
from scripts.runs import Run, read_runs

COPIED = ("config.yaml", "environment.json", "metrics.jsonl", "result.json", "codec.json")


def write_bundle(run_dir: Path, into: Path) -> Path:
    """Write the bundle of the complete run in `run_dir` to a folder of its own in `into`, and return that folder.

    Raises UserError where there is no complete run with a checkpoint, where the folder exists, or without safetensors.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("--bundle needs the safetensors package: pip install safetensors") from None
    runs, problems = read_runs(run_dir)
    run = next((run for run in runs if run.folder == run_dir), None)
    if run is None or not run.result or run.result.diverged:
        reason = problems[0] if problems else "no complete run there"
        raise UserError(f"{run_dir}: {reason}; a bundle is made of a run that has ended")
    weights, about = _weights(run)
    folder = into / f"{run.table}_{run.row}_{run.schedule}_seed{run.seed}"
    if folder.exists():
        raise UserError(f"{folder} exists already: delete it, or choose another folder with --out")
    folder.mkdir(parents=True)
    for name in COPIED:
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, folder / name)
    save_file(weights, folder / "weights.safetensors", metadata=about)
    sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    write_atomically(folder / "SHA256SUMS", "".join(sums))
    return folder


def _weights(run: Run) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of the state_dict that the run's final value belongs to, and what is said about them."""
    saved = read_checkpoint(run.folder, say=print)
    if saved is None:
        raise UserError(f"{run.folder}: no checkpoint there, so there are no weights to write")
    extra: dict[str, Any] = saved["extra"]
    about = {"table": run.table, "row": run.row, "schedule": run.schedule, "seed": str(run.seed)}
    about |= {"update": str(saved["progress"]["update"])}
    about |= {name: str(extra[name]) for name in ("vocabulary", "codec") if name in extra}
    weights = saved["model"]
    if "average" in run.config:
        weights, updates = average_weights(run.folder, run.config["average"]["last"], extra["codec"])
        about["averaged_updates"] = " ".join(map(str, updates))
    # safetensors takes no tensors that share memory, and tied weights do.
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}, about


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
