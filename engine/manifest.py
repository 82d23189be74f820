"""The manifest of prepared data: a JSON file that is written last. If it exists, everything else is whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError, explain

MANIFEST = "manifest.json"


def read_manifest(folder: Path, keys: Sequence[str] = (), version: int | None = None) -> dict[str, Any] | None:
    """The manifest in `folder`, or None if there is none: then the data there are not finished.

    Raises UserError if it cannot be read, if its `format` is not `version`, or if one of `keys` is missing.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {explain(error)}") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(manifest, dict):
        raise _damaged(path, "it is not a mapping")
    if manifest.get("format", version) != version:
        raise UserError(
            f"{path} is of format {manifest['format']} and this program reads format {version}: prepare the data "
            "again, in another folder"
        )
    if missing := [key for key in keys if key not in manifest]:
        raise _damaged(path, f"it lacks {', '.join(missing)}")
    return manifest


def _damaged(path: Path, how: str) -> UserError:
    return UserError(f"{path} is damaged ({how}): delete it, then prepare the data again")
