"""Variants of a model's networks that a caller names as ``MODULE:FUNCTION``: found, called, and checked.

The module is looked for in the working directory, and then where Python looks. ``sys.path`` stays as it is: other
threads import by it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from types import ModuleType

from torch import nn

from minidiff.config import check
from minidiff.errors import ConfigError
from minidiff.pipeline import StableDiffusion, Unconditional


def is_function(text: str) -> bool:
    """Return True for ``MODULE:FUNCTION``, unless a file or folder has that name."""
    module, colon, name = text.rpartition(":")
    return (
        bool(colon)
        and name.isidentifier()
        and not os.path.lexists(text)
        and all(part.isidentifier() for part in module.split("."))
    )


def variant(pipe: StableDiffusion | Unconditional, text: str) -> dict[str, nn.Module]:
    """Call the function ``MODULE:FUNCTION``, and return the networks that it makes. Raises :class:`ConfigError` if it
    is not there, or returns other things."""
    module, _, name = text.rpartition(":")
    try:
        function = getattr(_imported(module), name, None)
    except ModuleNotFoundError as e:
        sought = e.name is not None and f"{module}.".startswith(f"{e.name}.")
        told = "it is" if sought else f"{module} needs it; what a file needs beside itself is"
        where = "looked for in this folder and" if sought else "found in a package with it, or"
        raise ConfigError(f"--against {text}: {e}; {told} {where} where Python looks") from None
    check(callable(function), f"--against {text}: {module} has no function {name}")
    parts = function(pipe)  # type: ignore[misc]
    known = (
        isinstance(parts, Mapping)
        and bool(parts)
        and all(name in pipe.parts and isinstance(part, nn.Module) for name, part in parts.items())
    )
    check(known, f"--against {text}: it should return networks by the names of parts: {', '.join(pipe.parts)}")
    return dict(parts)


def _imported(name: str) -> ModuleType:
    """Import a module, from the working directory if it is there."""
    top = name.partition(".")[0]
    if top not in sys.modules:
        spec = FileFinder(os.getcwd(), (SourceFileLoader, SOURCE_SUFFIXES)).find_spec(top)
        # a folder without __init__.py stands back for whatever else has the name, as it does for Python
        if spec is not None and (spec.loader is not None or importlib.util.find_spec(top) is None):
            sys.modules[top] = made = importlib.util.module_from_spec(spec)
            try:
                if spec.loader is not None:
                    spec.loader.exec_module(made)
            except BaseException:
                del sys.modules[top]
                raise
    return importlib.import_module(name)
