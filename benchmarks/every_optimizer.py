"""Tries every optimizer that pytorch_optimizer exports, with its default settings, for 20 updates on the digits.

    python -m benchmarks.every_optimizer [NAME ...]      default: all; writes docs/results/outside_optimizers.md then

Each trains a very small network by classification.train. Then the same command reads the last checkpoint. This works,
or ends with the one line that a user would read; after a traceback the exit status is 1.
"""

import gc
import io
import json
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import torch
from pytorch_optimizer import optimizer as others
from tqdm import tqdm

from classification.config import Config
from classification.train import train
from engine.config import load_config
from engine.distributed import setup
from engine.errors import UserError
from engine.files import write_atomically
from engine.metrics import DIVERGED

CONFIG = """
table: digits
row: outside
epochs: 1
batch: 14                                # 20 updates an epoch
data: {name: digits, validation: 0.8}    # trained on 288 images
model: {name: resnet, depth: 8}
device: cpu
optimizer: {name: sgd, lr: 0.1}
"""
CLOSURE, BASE = "optimizer.needs=closure", "optimizer.base_optimizer=sgd"
BOTH = "optimizer.groups=[{match: 4, use_muon: true}, {match: '', use_muon: false}]"
GIVEN = {  # what has no default, and what the class's documentation asks for
    "SAM": [BASE, CLOSURE],
    "BSAM": ["optimizer.num_data=1442", CLOSURE],
    "FriendlySAM": [BASE, CLOSURE],
    "LookSAM": [BASE, CLOSURE],
    "AliG": [CLOSURE],
    "AdaHessian": ["optimizer.needs=create_graph"],
    "SophiaH": ["optimizer.needs=create_graph"],
    "Ranger21": ["optimizer.num_iterations=20"],
    **{name: [BOTH] for name in ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")},
    **{name: ["channels_last=false"] for name in ("AdamP", "Nero", "SGDP", "SWATS")},
    "LBFGS": ["channels_last=false"],
}
MEMORY = 8 << 30  # bytes of address space; the system refuses more
KINDS = ("worked", "diverged", "refused", "broken")
RESULTS = Path("docs/results/outside_optimizers.md")
HEAD = """# Optimizers of pytorch_optimizer {version}, tried on digits

Written by `python -m benchmarks.every_optimizer`, with torch {torch} on a CPU. Each class that the package exports
trained a ResNet-8 by `classification.train` with its default settings for 20 updates of 14 images. Then the same
command read the checkpoint again. The last column has the line with which it was refused. The loss is that of the 20
updates on average (chance: 2.30). It tells that the optimizer runs, and not how good it is: the settings are defaults.

{worked} of {all} worked, {diverged} diverged at their default learning rate, {refused} were refused, {broken} ended in
a traceback.

| Optimizer | Given besides its defaults | Outcome | Loss | The line |
|---|---|---|---:|---|
"""


def main(names: Sequence[str]) -> int:
    known = sorted((name for name in others.__all__ if isinstance(getattr(others, name), type)), key=str.lower)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "digits.yaml"
        config.write_text(CONFIG)
        outcomes = {name: outcome_of(name, config) for name in tqdm(names or known, file=sys.__stderr__)}
    rows = [(name, ", ".join(GIVEN.get(name, [])), *outcome) for name, outcome in outcomes.items()]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    counts = {kind: sum(kind == outcome[0] for outcome in outcomes.values()) for kind in KINDS}
    if names:
        print(table, end="")
    else:
        versions = {"version": version("pytorch_optimizer"), "torch": torch.__version__}
        write_atomically(RESULTS, HEAD.format(**versions, all=len(outcomes), **counts) + table)
    return int(counts["broken"] > 0)


def outcome_of(name: str, config: Path) -> tuple[str, str, str]:
    """One of KINDS, the training loss, and the line of the error."""
    run_dir = config.parent / name
    overrides = [f"run_dir={run_dir}", f"optimizer={{name: pytorch_optimizer.{name}}}", *GIVEN.get(name, [])]
    silence = io.StringIO()
    try:
        with redirect_stderr(silence), redirect_stdout(silence), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded, world = load_config(Config, config, overrides), setup("cpu")
            train(loaded, world)
            loss = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["train_loss"]
            (run_dir / "result.json").unlink()
            train(loaded, world)  # reads the checkpoint of the last update
    except UserError as error:
        line = " ".join(str(error).split()).replace(f"{Path(torch.__file__).parent.parent}/", "").replace("|", "\\|")
        return "diverged" if DIVERGED in line else "refused", "", line.replace(f"{config.parent}/", "")
    except Exception as error:  # what a user would read as a traceback
        traceback.print_exc()
        return "broken", "", f"{type(error).__name__}: {error}"
    finally:
        gc.collect()  # gradients with a graph, and some optimizers, hold themselves
    return "worked", f"{loss:.2f}", ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
