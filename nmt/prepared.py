"""The folder of prepared data.

manifest.json                      recipe, line counts, vocabulary, checksums; written last
codec.json                         the joint BPE (nmt/codec.py)
<split>.<language>.bin             ids of all sentences end to end, each with its </s>; uint16 or uint32, little endian
<split>.<language>.offsets         each sentence's start, and the end: int64
valid|test.<language>.txt          the raw text, for sacreBLEU
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.files import write_atomically
from engine.manifest import read_manifest
from nmt.prepare.recipes import GRAMMAR, WMT14

SPLITS = ("train", "valid", "test")
EVALUATED = ("valid", "test")
COMMANDS = {
    GRAMMAR.name: "python -m nmt.prepare grammar {}",
    WMT14.name: "bash scripts/prepare.sh wmt14 SOURCE {}",
}


def finished(folder: Path, recipe: str = "") -> dict[str, Any] | None:
    """The manifest in `folder`, or None. UserError, with the `recipe`'s command, if a field is missing or wrong."""
    command = command_of(recipe, folder)
    manifest = read_manifest(folder, dict.fromkeys(("recipe", "source", "target", "codec"), str), command)
    if manifest is None:
        return None
    side = {"tokens": int, "token_bytes": int}
    split = {"pairs": int, "sha256": dict, manifest["source"]: side, manifest["target"]: side}
    return read_manifest(folder, {"splits": dict.fromkeys(SPLITS, split)}, command)


def command_of(recipe: str, folder: Path) -> str:
    """The command that prepares `folder`."""
    return COMMANDS.get(recipe, "python -m nmt.prepare --help").format(folder)


def paths_of(folder: Path, split: str, languages: Sequence[str]) -> list[Path]:
    kinds = ("bin", "offsets", "txt") if split in EVALUATED else ("bin", "offsets")
    return [folder / f"{split}.{language}.{kind}" for language in languages for kind in kinds]


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1))
