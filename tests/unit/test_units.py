"""Sizes and durations as text."""

import pytest

from fundamentallm.config.units import duration_text, size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (3e15, "3,000.0 TB")],
)
def test_size_text(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (1.5, "1.5 s"), (120, "2.0 min"), (7260, "2.0 h"), (172_800, "2.0 days")],
)
def test_duration_text(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
