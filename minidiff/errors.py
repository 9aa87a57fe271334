"""Exceptions: three kinds of error that a caller can tell apart.

Every message is one line: what is wrong, with the values, and what to do about it.
"""


class MinidiffError(Exception):
    """The root of every error that minidiff raises on purpose."""


class ConfigError(MinidiffError):
    """A setting that cannot work: a value out of range, two options that exclude each other, a limit of a method."""


class CheckpointError(MinidiffError):
    """A file that is missing, damaged, or does not hold what it should."""


class Cancelled(MinidiffError):
    """A run that was cancelled, by :meth:`Run.cancel` or :meth:`Step.cancel`."""


class UnsupportedError(MinidiffError):
    """Something real that minidiff does not do, such as flow-matching models."""
