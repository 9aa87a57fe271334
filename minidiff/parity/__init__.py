"""Comparison of two implementations: recordings, differences, and the finder behind ``minidiff parity``.

from minidiff import parity
report = parity.compare(module_a, module_b, inputs, names)
print(report)                       # report.equal, report.first, report.rows; parity.page(report) is HTML
"""

from minidiff.parity.difference import Difference, difference
from minidiff.parity.engine import Judgement, Row
from minidiff.parity.modules import compare
from minidiff.parity.page import page
from minidiff.parity.report import Report

__all__ = ["Difference", "Judgement", "Report", "Row", "compare", "difference", "page"]
