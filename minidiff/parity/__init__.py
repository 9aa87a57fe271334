"""Comparison of two implementations: recordings, differences, and the finder behind ``minidiff parity``.

from minidiff import parity
report = parity.compare(module_a, module_b, inputs, names)
print(report)                       # report.equal, report.first, report.rows; parity.page(report) is HTML
parity.assert_recording("mine.safetensors", "reference.safetensors", tolerance=2e-6)      # needs no torch

Public names are imported on first use: recordings are written and compared where there is no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidiff.parity.asserting import assert_recording
    from minidiff.parity.difference import Difference, difference
    from minidiff.parity.modules import compare
    from minidiff.parity.page import page
    from minidiff.parity.report import Report
    from minidiff.parity.rows import Judgement, Row
    from minidiff.parity.writer import Writer

HOMES = {
    "asserting": ("assert_recording",),
    "difference": ("Difference", "difference"),
    "modules": ("compare",),
    "page": ("page",),
    "report": ("Report",),
    "rows": ("Judgement", "Row"),
    "writer": ("Writer",),
}

__all__ = [
    "Difference",
    "Judgement",
    "Report",
    "Row",
    "Writer",
    "assert_recording",
    "compare",
    "difference",
    "page",
]


class _Package(ModuleType):
    """This package: its modules ``difference`` and ``page`` do not hide the functions of these names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'minidiff.parity' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
