"""The folder that a user probably meant: the nearest one that holds what is needed."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from engine.errors import UserError

ABOVE, BELOW = 2, 3  # levels
MOST = 1_000  # folders searched


def nearest_folder(place: Path, fits: Callable[[Path], object]) -> Path | None:
    """The nearest folder to `place` for which `fits` is true, or None; those above come before those below.

    If `place` is no folder, the search begins with its parent. `fits` may raise OSError or UserError for a wrong one.
    """
    level = [place if place.is_dir() else place.parent]
    above = level if level[0] != place else []
    above = [*above, *level[0].parents[:ABOVE]]
    if found := _first(above, fits):
        return found
    seen = 0
    for _ in range(BELOW):
        level = [path for folder in level for path in _folders(folder)][: MOST - seen]
        seen += len(level)
        if found := _first(level, fits):
            return found
    return None


def _first(folders: Iterable[Path], fits: Callable[[Path], object]) -> Path | None:
    for folder in folders:
        with suppress(OSError, UserError):
            if fits(folder):
                return folder
    return None


def _folders(folder: Path) -> list[Path]:
    """The folders in `folder`, without hidden ones, sorted; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and entry.name[0] != ".")
    except OSError:
        return []
