"""The end of an error message about an unknown name: the nearest valid one, then all of them."""

import difflib
from collections.abc import Iterable


def suggest(name: object, valid: Iterable[str]) -> str:
    """'; did you mean X? valid: X, Y' for an unknown `name`, without the question where nothing is near."""
    valid = list(valid)
    near = difflib.get_close_matches(str(name).lower(), [v.lower() for v in valid], n=1)
    hint = f" did you mean {next(v for v in valid if v.lower() == near[0])!r}?" if near else ""
    return f";{hint} valid: {', '.join(valid)}"
