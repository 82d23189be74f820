"""The manifest of prepared data: a JSON file, written last, so that all else is whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import read_json

MANIFEST = "manifest.json"


def read_manifest(folder: Path, keys: Sequence[str] = (), version: int | None = None) -> dict[str, Any] | None:
    """The manifest in `folder`, or None where data are not finished.

    Raises UserError if it cannot be read, its `format` is not `version`, or one of `keys` is missing.
    """
    path, advice = folder / MANIFEST, "delete it, then prepare the data again"
    manifest = read_json(path, advice)
    if manifest is None:
        return None
    if manifest.get("format", version) != version:
        raise UserError(
            f"{path} is of format {manifest['format']} and this program reads format {version}: prepare the data "
            "again, in another folder"
        )
    if missing := [key for key in keys if key not in manifest]:
        raise UserError(f"{path} is damaged (it lacks {', '.join(missing)}): {advice}")
    return manifest
