"""A small cell of nmt/train.py with a few hundred generated sentences."""

from pathlib import Path

from nmt.prepare.command import main as prepare
from nmt.prepare.toy_text import generate

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
    """Make prepared data in folder/data, and folder/cell.yaml. Returns the folder."""
    pairs = iter(generate(sum(SIZES.values())))
    for split, size in SIZES.items():
        sides = zip(*(next(pairs) for _ in range(size)), strict=True)
        for language, lines in zip(("en", "de"), sides, strict=True):
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    prefixes = [word for split in SIZES for word in (f"--{split}", str(folder / split))]
    prepare(["files", str(folder / "data"), "--name", "small", "--merges", str(merges), "--workers", "1", *prefixes])
    (folder / "cell.yaml").write_text(CONFIG.format(root=folder / "data"))
    return folder
