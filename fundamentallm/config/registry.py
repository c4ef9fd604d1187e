"""Names in a config become objects: an entry of a plain dict, or `module:name` for code outside the package."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fundamentallm.errors import ConfigError, Problem


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "Did you mean ...?" with the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def not_one_of(setting: str, value: str, known: Iterable[str], allowed: str = "", text: str = "") -> Problem:
    """Returns the problem with a value that is not one of the known, and names the nearest."""
    known = list(known)
    return Problem(setting, value, allowed or ", ".join(known), did_you_mean(value, known), text=text)


def unknown_name(setting: str, name: str, known: Iterable[str]) -> Problem | None:
    """Returns the problem with `name`, or None if it is known or has the form `module:name`."""
    known = sorted(known)
    if name in known or ":" in name:
        return None
    return not_one_of(setting, name, known, ", ".join([*known, "or 'module:name'"]) if known else "'module:name'")


def resolve(setting: str, name: str, known: Mapping[str, Any]) -> Any:
    """Returns the entry of `known` called `name`, or the object that `module:name` imports.

    Raises:
        ConfigError: if the name is not known, or the module or its attribute cannot be imported.
    """
    if problem := unknown_name(setting, name, known):
        raise ConfigError(problem)
    if name in known:
        return known[name]
    module_name, _, attribute = name.partition(":")
    # A user's module usually lies in the working directory, which `accelerate launch -m` and console scripts leave
    # out of the path.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        advice = "Give 'module:name' of something that can be imported from the working directory."
        raise ConfigError(Problem(setting, name, "", advice, f"which cannot be imported ({error})")) from error
