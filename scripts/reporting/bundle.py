"""Makes the bundle for a release of a trained model.

    config.yaml  environment.json  metrics.jsonl  result.json     as the run left them
    weights.safetensors     the state_dict that gave the run's score: float32 as trained, of the optimizer's eval mode,
                            or averaged. The metadata name run, update and vocabulary
    codec.json              the vocabulary of a translation run
    SHA256SUMS              for `sha256sum -c SHA256SUMS`

No file in it is a pickle.
"""

import shutil
from pathlib import Path

from engine.averaging import average_weights
from engine.download import digest_of
from engine.errors import UserError
from engine.files import write_atomically
from engine.weights import BUNDLED, Weights, read_trained, read_weights, write_weights
from scripts.runs import Run, read_runs

COPIED = ("config.yaml", "environment.json", "metrics.jsonl", "result.json", "codec.json")


def write_bundle(run_dir: Path, into: Path) -> Path:
    """Write the bundle of `run_dir` to a new folder in `into`.

    Raises UserError if the run is incomplete or has no checkpoint, or the folder exists.
    """
    runs, problems = read_runs(run_dir)
    run = next((run for run in runs if run.folder == run_dir), None)
    if run is None or not run.result or run.result.diverged:
        reason = problems[0] if problems else "no complete run there"
        raise UserError(f"{run_dir}: {reason}; a bundle is made of a run that has ended")
    weights = _weights(run)
    folder = into / f"{run.table}_{run.row}_{run.schedule}_seed{run.seed}"
    if folder.exists():
        raise UserError(f"{folder} exists already: delete it, or choose another folder with --out")
    folder.mkdir(parents=True)
    for name in COPIED:
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, folder / name)
    write_weights(folder, weights, table=run.table, row=run.row, schedule=run.schedule, seed=str(run.seed))
    sums = [f"{digest_of(path, 'sha256')}  {path.name}\n" for path in sorted(folder.iterdir())]
    write_atomically(folder / "SHA256SUMS", "".join(sums))
    return folder


def _weights(run: Run) -> Weights:
    if not run.config.get("average") or (run.folder / BUNDLED).exists():
        return read_weights(run.folder, say=print)
    weights = read_trained(run.folder, say=print)
    mean, updates = average_weights(run.folder, run.config["average"]["last"], weights.vocabulary)
    return weights._replace(state=mean, averaged=tuple(updates))
