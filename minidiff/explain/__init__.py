"""One page that shows a run from the inside: ``minidiff explain``.

Three stages, one after another: :mod:`~minidiff.explain.collect` runs a request and keeps what it passes through;
the files of ``panels`` turn that into numbers, pictures and words; :mod:`~minidiff.explain.page` joins them to one file
of HTML. The arithmetic is minidiff's own, and nothing is said that the run does not show.
"""

from minidiff.explain.collect import Frame, Seen, collect
from minidiff.explain.page import explained

__all__ = ["Frame", "Seen", "collect", "explained"]
