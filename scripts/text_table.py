"""A table as lines of text, with aligned columns."""

from collections.abc import Sequence


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]], markdown: bool = False) -> list[str]:
    """The lines, the header first; in Markdown with bars and a rule."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    texts = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in (header, *lines)]
    if not markdown:
        return ["  ".join(line).rstrip() for line in texts]
    texts.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in texts]
