"""Sizes and durations as text."""


def size_text(num_bytes: float) -> str:
    """12345678 as 12.3 MB."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def duration_text(seconds: float) -> str:
    """0.0123 as 12.3 ms, 7260 as 2.0 h."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds * 1000:.3g} ms"
