"""The manifest of prepared data: a JSON file, written last, so that all else is whole."""

from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.files import read_json

MANIFEST = "manifest.json"

Kind = type | dict[str, "Kind"] | list["Kind"]  # of a value; of each field of a mapping; of all elements of a list


def read_manifest(
    folder: Path, fields: dict[str, Kind], command: str, version: int | None = None
) -> dict[str, Any] | None:
    """The manifest in `folder`, or None where data are not finished.

    Raises UserError, with the `command` that prepares the data, if it cannot be read, its `format` is not `version`, or
    one of `fields` is missing or of another kind, at any depth.
    """
    path, advice = folder / MANIFEST, f"delete it, then prepare the data again: {command}"
    manifest = read_json(path, advice)
    if manifest is None:
        return None
    if manifest.get("format", version) != version:
        raise UserError(
            f"{path} is of format {manifest['format']} and this program reads format {version}: prepare the data "
            f"again, in another folder: {command}"
        )
    if field := _wrong_field(manifest, fields):
        raise UserError(f"{path} is damaged (its field {field} is missing or of a wrong kind): {advice}")
    return manifest


def _wrong_field(value: Any, kind: Kind, name: str = "") -> str | None:
    """The first field that is not of its kind, e.g. "shards.0.tokens", or None."""
    if not isinstance(value, kind if isinstance(kind, type) else type(kind)):
        return name
    inside = []
    if isinstance(kind, dict):
        inside = [(key, value.get(key), inner) for key, inner in kind.items()]
    elif isinstance(kind, list):
        inside = [(index, element, kind[0]) for index, element in enumerate(value)]
    wrong = (_wrong_field(part, inner, f"{name}.{key}".lstrip(".")) for key, part, inner in inside)
    return next(filter(None, wrong), None)
