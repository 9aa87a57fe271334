"""Every public name with its signature, compared with tests/fixtures/api.txt.

A change here is a change for users: it belongs in the CHANGELOG, and names grow compatibly (new keyword arguments with
defaults). Write the file anew with

    python -m tests.unit.test_api
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "fixtures" / "api.txt"
# Modules with an __all__, and the names that the pages of the documentation import from others.
MODULES: dict[str, tuple[str, ...]] = {
    "minidiff": (),
    "minidiff.samplers": (),
    "minidiff.programs": ("Convention", "read"),
    "minidiff.adapters.words": ("Word", "add"),
    "minidiff.fast": ("approximate", "offload", "optimize", "restore", "tiled"),
    "minidiff.adapters.lora": ("Adapter", "Applied", "apply"),
    "minidiff.parity": (),
    "weights_convert": (),
}


def public() -> Iterator[str]:
    """One line for each name: functions and classes with their signatures, classes followed by their members."""
    for module_name, names in MODULES.items():
        module = import_module(module_name)
        for name in sorted(names or module.__all__):
            value = getattr(module, name)
            yield f"{module_name}.{name}{signature(value)}"
            if inspect.isclass(value):
                yield from (f"    {member}" for member in members(value))


def members(kind: type) -> Iterator[str]:
    """The public attributes of a class that are defined in minidiff."""
    for name in sorted(n for n in dir(kind) if not n.startswith("_")):
        value = inspect.getattr_static(kind, name)
        owner = next(k for k in kind.__mro__ if name in k.__dict__)
        if owner.__module__.split(".")[0] not in ("minidiff", "weights_convert"):
            continue
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        yield name + (signature(value) if callable(value) else "")


def signature(value: Any) -> str:
    """The signature as it is written, in words that no version of Python changes; "" for what is not called."""
    if not (inspect.isfunction(value) or inspect.isclass(value)) or is_error(value):
        return ""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))
    return re.sub(r"ForwardRef\(('[^']*')[^)]*\)", r"\1", text)


def is_error(value: Any) -> bool:
    """Return True for a class of errors, which take what every error takes."""
    return inspect.isclass(value) and issubclass(value, BaseException)


def test_the_public_names_are_those_of_the_file() -> None:
    """Shows the lines that differ."""
    kept, now = FILE.read_text(encoding="utf-8").splitlines(), list(public())
    assert [line for line in kept if line not in now] == [line for line in now if line not in kept] == []
    assert kept == now


if __name__ == "__main__":
    FILE.write_text("\n".join(public()) + "\n", encoding="utf-8")
