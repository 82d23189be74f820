"""Files that are whole or absent, and folders for one process at a time."""

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from engine.errors import UserError, explain

HELD = (BlockingIOError, PermissionError)  # EAGAIN and EACCES: another process has lockf's lock
LOOK_S = 0.1  # another process's `is_held` holds a lock for less
# What lockf reports on Lustre without `flock`, NFS without a lock daemon, and the like.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` (UTF-8): a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def wait_for_disk(path: Path) -> None:
    """Wait until a file is on the disk: before it gets its name, or another file says that it is whole."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_json(path: Path, advice: str = "delete it, then run the same command again") -> dict[str, Any] | None:
    """The mapping in a JSON file, or None without the file. Raises UserError, with `advice`, where it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {explain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): {advice}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged (it is no mapping): {advice}")
    return values


def hold(folder: Path, doing: str, wait: bool = False) -> IO[str]:
    """Hold `folder` until the returned file is closed; `doing` says for what, e.g. "training".

    Raises UserError where another process holds it (unless `wait`), it cannot be written to, or its file system has no
    locks. Unlike flock's, lockf's lock does not pass to workers, which outlive a kill for a moment.
    """
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 - an open file holds the lock
    except OSError as error:
        raise UserError(f"{folder}/.lock cannot be written ({error.strerror}): choose another folder") from None
    how = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    try:
        try:
            fcntl.lockf(file, how)
        except HELD:
            time.sleep(LOOK_S)
            fcntl.lockf(file, how)
    except OSError as error:
        file.close()
        if isinstance(error, HELD):
            advice = f"another process is {doing} there: wait for it, or choose another folder"
        elif error.errno in NO_LOCKS:
            advice = f"its file system has no locks ({error.strerror}): choose a folder on another one, a local disk's"
        else:
            advice = f"it cannot be locked ({error.strerror})"
        raise UserError(f"{folder}: {advice}") from None
    return file


def is_held(folder: Path) -> bool:
    """Whether another process holds `folder`; False if unknown, as `hold` will say why."""
    try:
        file = open(folder / ".lock", "r+")  # noqa: SIM115
    except OSError:
        return False
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return isinstance(error, HELD)
    return False
