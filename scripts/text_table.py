"""A table as lines of text, with aligned columns; and a duration in words."""

from collections.abc import Sequence


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool = False) -> list[str]:
    """The header's line first; in Markdown with bars and a rule."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    texts = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in (header, *lines)]
    if not markdown:
        return ["  ".join(line).rstrip() for line in texts]
    texts.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in texts]


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h` or `2.1 d`."""
    for limit, unit, divisor, digits in ((120, "s", 1, 0), (7200, "min", 60, 0), (48 * 3600, "h", 3600, 1)):
        if seconds < limit:
            return f"{seconds / divisor:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} d"
