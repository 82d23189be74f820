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

SPLITS = ("train", "valid", "test")
EVALUATED = ("valid", "test")
MANIFEST_KEYS = ("recipe", "source", "target", "codec", "splits")


def paths_of(folder: Path, split: str, languages: Sequence[str]) -> list[Path]:
    kinds = ("bin", "offsets", "txt") if split in EVALUATED else ("bin", "offsets")
    return [folder / f"{split}.{language}.{kind}" for language in languages for kind in kinds]


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1))
