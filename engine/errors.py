"""Errors meant for the person at the keyboard: one line that says what is wrong and what to do."""

import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """Something only the user can put right; `run_main` prints its one line instead of a traceback."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """`" (did you mean 'epochs'?)"` for the closest of `valid`, or `""` where nothing is close."""
    matches = get_close_matches(word, list(valid), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


@contextmanager
def settings_of(what: str) -> Iterator[None]:
    """Turn a ValueError, TypeError or ImportError about the settings of `what` into a UserError that names it."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        prefix = "" if str(error).startswith(f"{what} ") else f"{what}: "
        raise UserError(f"{prefix}{error}") from error


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run a command's `main(argv)` and exit with its status; a UserError becomes one line on stderr and status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        _print_error(error)
    except OSError as error:  # a full disk can strike at any write
        if error.errno != errno.ENOSPC:
            raise
        _print_error(
            f"{error.strerror}: {error.filename or 'while writing'}; free some space, then run the same command again"
        )
    sys.exit(2)


def _print_error(error: object) -> None:
    rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{rank}error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
