"""An assertion for the tests of other projects: a recording is equal to a reference, or within a tolerance of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

from minidiff.parity.comparing import compare
from minidiff.parity.importers import open_source
from minidiff.parity.report import Report, text

if TYPE_CHECKING:
    from minidiff.parity.recording import Recording

Recorded: TypeAlias = "str | os.PathLike[str] | Recording"


def assert_recording(
    actual: Recorded,
    expected: Recorded,
    tolerance: float = 0.0,
    *,
    names: Mapping[str, str] | None = None,
    judge: Recorded | None = None,
) -> Report:
    """Raise AssertionError, with the report, unless all stages that both recordings have are within ``tolerance``.

    ``actual``, ``expected``: files, of any kind that ``minidiff parity compare`` reads, or recordings in memory.
    ``tolerance``: largest allowed difference of a stage relative to the largest value of ``expected``; 0 requires equal
    values. ``names``: the stage's name in ``expected`` -> its name in ``actual``, where they differ. ``judge``: a
    recording in float64. Returns the report, of ``expected`` as A and ``actual`` as B.

    Needs numpy and safetensors alone. Raises :class:`CheckpointError` for a file that is none, :class:`ConfigError` for
    recordings of different runs.
    """
    with ExitStack() as stack:
        a, b = (stack.enter_context(open_source(thing)) for thing in (expected, actual))
        judges = [] if judge is None else [stack.enter_context(open_source(judge))]
        report = compare(a, b, tolerance, judges, names=names)
    if not report.equal:
        raise AssertionError(f"the recordings differ\n{text(report)}")
    return report
