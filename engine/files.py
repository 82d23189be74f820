"""Files that are whole or not there at all, and folders that one process at a time works in."""

import fcntl
import os
from pathlib import Path
from typing import IO

from engine.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write `text` (UTF-8): a kill at any moment leaves the file that was there before, or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def hold(folder: Path, doing: str, wait: bool = False) -> IO[str]:
    """Hold `folder` until the file returned is closed, or the process ends; `doing` says for what, e.g. "training".

    Two processes would destroy each other's files: where another one holds it, `wait`, or raise UserError. lockf's lock
    belongs to the process, where flock's would be inherited by its workers and live on with them for the moment by
    which they outlive a kill.
    """
    file = open(folder / ".lock", "w")  # noqa: SIM115 - the lock lives as long as the file is open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise UserError(f"{folder}: another process is {doing} there: wait for it, or choose another folder") from None
    return file
