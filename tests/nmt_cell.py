"""A small cell of nmt/train.py, on a few hundred generated sentences, and what the tests do with its run folders."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from nmt.prepare.command import main as prepare
from nmt.prepare.toy_text import generate
from nmt.train import main as train

CONFIG = """
table: small
row: apollo
updates: 24
batch: 512
data: {{name: small, root: {root}}}
model: {{width: 32, inner_width: 64, heads: 2, encoder_layers: 1, decoder_layers: 1}}
optimizer: {{name: apollo, lr: 5.0, eps: 1.0e-4, weight_decay: 1.0e-8}}
schedule: {{name: milestone, milestones: [20], decay_rate: 0.1, warmup_updates: 10, init_lr: 0.01}}
validate_every: 10
average: {{every: 4, last: 3}}
decoding: {{beam: 1}}
log_every: 1
checkpoint: {{minutes: 0, keep: 2}}      # a checkpoint after every update: a kill often hits the middle of one
"""
SIZES = {"train": 600, "valid": 40, "test": 50}


def make_cell(folder: Path, merges: int = 300) -> Path:
    """Prepared data in folder/data, and folder/cell.yaml; returns the folder."""
    pairs = iter(generate(sum(SIZES.values())))
    for split, size in SIZES.items():
        sides = zip(*(next(pairs) for _ in range(size)), strict=True)
        for language, lines in zip(("en", "de"), sides, strict=True):
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    prefixes = [word for split in SIZES for word in (f"--{split}", str(folder / split))]
    prepare(["files", str(folder / "data"), "--name", "small", "--merges", str(merges), "--workers", "1", *prefixes])
    (folder / "cell.yaml").write_text(CONFIG.format(root=folder / "data"))
    return folder


def command(folder: Path, name: str, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    cell = [str(folder / "cell.yaml"), f"run_dir={folder / name}", *overrides]
    return [sys.executable, *launcher, "-m", "nmt.train", *cell]


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments, **settings), capture_output=True, text=True, timeout=300)


def complete(folder: Path, name: str, *overrides: str, **settings) -> Path:
    done = run(folder, name, *overrides, **settings)
    assert done.returncode == 0, done.stderr
    return folder / name


def result(run_dir: Path) -> dict:
    return json.loads((run_dir / "result.json").read_text())


def one_line_error(done: subprocess.CompletedProcess) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


def train_here(folder: Path, name: str, *overrides: str) -> Path:
    """The same as `complete`, in this process: starting another takes longer than most of these runs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert train([str(folder / "cell.yaml"), f"run_dir={folder / name}", *overrides]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return folder / name
