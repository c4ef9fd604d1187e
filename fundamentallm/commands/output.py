"""How the verbs write lines and tables, also of what a stranger's file says."""

from __future__ import annotations

from collections.abc import Iterable

WIDTH = 100
"""Columns that a line of text is cut to."""


def say(text: str) -> None:
    """Print the text, in its lines, `printable`."""
    print(printable(text, keep="\n\t"), flush=True)


def printable(text: str, keep: str = "") -> str:
    """The text with whatever could steer a terminal, or not be printed at all, as an escape; but for `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, width: int) -> str:
    """One line of at most `width` characters, line ends as escapes."""
    line = printable(text[:width].replace("\\", "\\\\"))
    return line if len(text) <= width and len(line) <= width else line[: width - 3] + "..."


def say_table(rows: Iterable[tuple[str, ...]], sides: str) -> None:
    """Print columns as wide as what is in them, two spaces apart; `sides` has '<' or '>' for each."""
    rows = [tuple(printable(cell).replace("\n", "\\n").replace("\t", "\\t") for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        say("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip())


def size_text(num_bytes: int) -> str:
    """12345678 as 12.3 MB."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"
