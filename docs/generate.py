"""What the pages of reference hold is made of the source as they are built: MkDocs calls this for each page."""

from __future__ import annotations

import itertools
from typing import Any

import fundamentallm
from fundamentallm.config.command_line import default_text, settings
from fundamentallm.config.schema import Config
from fundamentallm.config.validation import RANGES, allowed_values


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page's text, its marks replaced."""
    return markdown.replace("<!-- settings -->", settings_tables()).replace("<!-- api -->", api())


def settings_tables() -> str:
    """A table for each section of the config, with every setting's type, range, default and help text."""
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
    """What mkdocstrings makes the documentation of each public name of."""
    return "\n\n".join(f"::: fundamentallm.{name}" for name in fundamentallm.__all__)
