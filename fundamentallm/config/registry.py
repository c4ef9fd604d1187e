"""Names in a config become objects: a plain dict of ours, or `module:name` for code outside."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fundamentallm.errors import ConfigError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str | None:
    """The problem with `name`, or None where it is known or has the form `module:name`."""
    known = sorted(known)
    if name in known or ":" in name:
        return None
    choices = ", or ".join([*([", ".join(known)] if known else []), "'module:name'"])
    return f"{kind} is {name!r}; allowed: {choices}.{did_you_mean(name, known)}"


def resolve(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """The entry of `known` called `name`, or the object that `module:name` imports.

    Raises:
        ConfigError: if the name is not known, or the module or its attribute cannot be imported.
    """
    problem = unknown_name(kind, name, known)
    if problem:
        raise ConfigError(problem)
    if name in known:
        return known[name]
    module_name, _, attribute = name.partition(":")
    # `accelerate launch -m` and console scripts do not put the working directory on the path, where a
    # user's own module usually lies.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{kind} is {name!r}, which cannot be imported: {error}. "
            "Give 'module:name' of something importable from the working directory."
        ) from error
