"""Errors for the user: one line that says what is wrong and what to do."""

import errno
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(Exception):
    """Something that only the user can put right."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """`" (did you mean 'epochs'?)"` for the closest of `valid`, or `""`."""
    matches = get_close_matches(word, list(valid), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


@contextmanager
def settings_of(what: str) -> Iterator[None]:
    """Turn ValueError, TypeError and ImportError into a UserError that names `what`."""
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        prefix = "" if str(error).startswith(f"{what} ") else f"{what}: "
        raise UserError(f"{prefix}{error}") from error


def one_line(text: object) -> str:
    return " ".join(str(text).split())


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Exit with the status of `main(argv)`; a UserError becomes one line on stderr and status 2."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        _print_error(error)
    except OSError as error:  # e.g. a full disk
        if not error.strerror:
            raise
        _print_error(f"{error.filename or 'reading or writing'}: {explain(error)}")
    sys.exit(2)


def explain(error: OSError) -> str:
    """What the system reports, and what helps."""
    advice = {
        errno.ENOSPC: "free some space, then run the same command again",
        errno.EDQUOT: "free some space, then run the same command again",
        errno.EROFS: "choose a place that can be written to",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }.get(error.errno or 0)
    return f"{error.strerror}; {advice}" if advice else error.strerror or str(error)


def _print_error(error: object) -> None:
    rank = f"[rank {os.environ['RANK']}] " if os.environ.get("RANK") and os.environ.get("WORLD_SIZE") != "1" else ""
    print(f"{rank}error: {one_line(error)}", file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """A number above 0 from the command line, as a type for argparse."""
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"a whole number above 0, not {text}")
    return int(text)
