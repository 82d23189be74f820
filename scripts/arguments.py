"""What the command lines of the scripts have in common."""

import argparse
from typing import NoReturn

from overrides import override

from engine.errors import UserError


class Parser(argparse.ArgumentParser):
    """Its errors are UserErrors: one line, exit status 2. Options are not abbreviated."""

    def __init__(self, **settings: str) -> None:
        super().__init__(allow_abbrev=False, **settings)

    @override
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def seeds(text: str) -> list[int]:
    """`"1 101"` as [1, 101]; each seed once."""
    numbers = list(dict.fromkeys(int(word) if word.isdecimal() else -1 for word in text.split()))
    if not numbers or -1 in numbers:
        raise argparse.ArgumentTypeError(f'seeds are whole numbers, as in "1 101", not "{text}"')
    return numbers


def words(text: str) -> list[str]:
    if not text.split():
        raise argparse.ArgumentTypeError("no name given")
    return text.split()
