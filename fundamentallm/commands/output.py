"""Lines and tables that commands print, including text from untrusted files."""

from collections.abc import Iterable

from fundamentallm.errors import printable

WIDTH = 100
"""Columns that a line of text is cut to."""


def say(text: str) -> None:
    """Print text, which may have several lines, with its control characters escaped."""
    print(printable(text), flush=True)


def shortened(text: str, width: int) -> str:
    """Returns one line of at most `width` characters, with line ends escaped."""
    line = printable(text[:width].replace("\\", "\\\\"), keep="")
    return line if len(text) <= width and len(line) <= width else line[: width - 3] + "..."


def say_table(rows: Iterable[tuple[str, ...]], sides: str) -> None:
    """Print aligned columns, two spaces apart; `sides` has '<' or '>' for each column."""
    rows = [tuple(printable(cell, keep="") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip())
