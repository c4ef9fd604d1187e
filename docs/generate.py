"""Generates the reference pages from the source. MkDocs calls `on_page_markdown` for each page that it builds."""

from __future__ import annotations

import itertools
from typing import Any

import fundamentallm
from fundamentallm.config.command_line import default_text, settings
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import RANGES, allowed_values


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns the text of a page with its markers replaced."""
    return markdown.replace("<!-- settings -->", settings_tables()).replace("<!-- api -->", api())


def settings_tables() -> str:
    """Returns a table for each section of the config, with type, range, default and help text of each setting."""
    parts = []
    for section, group in itertools.groupby(settings(Config), lambda setting: setting[0].rpartition(".")[0]):
        parts.append(f"## {section or 'run'}\n\n| setting | values | default | |\n| --- | --- | --- | --- |")
        for name, hint, entry, text in group:
            of_range = RANGES.get(entry.name)
            values = allowed_values(hint) + (f", {of_range}" if of_range else "")
            cells = (f"`{name}`", values, f"`{default_text(entry)}`", text)
            parts[-1] += "\n| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"
    return "\n\n".join(parts)


def api() -> str:
    """Returns the directives from which mkdocstrings makes the documentation of each public name."""
    return "\n\n".join(f"::: fundamentallm.{name}" for name in fundamentallm.__all__)
