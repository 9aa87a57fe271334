"""Options of the samplers: types and rules as annotations of their fields, and one check of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from minidiff.config import check, one_of, quote, within

LARGEST = 1e9  # bound of numeric options: the square and more must be finite in float32


class Rule(NamedTuple):
    """A further condition on an option, and the end of the message about a value that does not meet it. None does."""

    fits: Callable[[Any], bool]
    text: str


POSITIVE = Rule(lambda v: v > 0, "must be positive")
NotNegative = Annotated[float, Rule(lambda v: v >= 0, "must not be negative")]
AboveZero = Annotated[float | None, Rule(lambda v: v > 0, "must be positive, or None")]
Share = Annotated[float, Rule(lambda v: 0 < v < 1, "must lie between 0 and 1")]
UpTo3 = Annotated[int, Rule(lambda v: 1 <= v <= 3, "must be 1, 2 or 3")]


def check_options(method: Any) -> None:
    """Raise ConfigError unless every option of ``method`` has its type and, after that, meets its rules."""
    options = {name: (kind, getattr(method, name)) for name, kind in _option_types(method.__class__).items()}
    for name, (kind, value) in options.items():
        _check_option(f"{type(method).__name__}.{name}", value, kind)
    for name, (kind, value) in options.items():
        for rule in getattr(kind, "__metadata__", ()) if value is not None else ():
            check(rule.fits(value), f"{name}={value} {rule.text}")


@lru_cache
def _option_types(method: Any) -> dict[str, Any]:
    hints = get_type_hints(method, include_extras=True)
    return {name: kind for name, kind in hints.items() if get_origin(kind) is not ClassVar}


def _check_option(name: str, value: Any, kind: Any) -> None:
    """Raise ConfigError unless ``value`` is of type ``kind``: a Literal, bool, int, float, one of these or None, or a
    tuple of one of these."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(kind) is Literal:
        known = get_args(kind)
        return one_of(known, **{name: value})
    if get_origin(kind) is tuple:  # of any length, of one type
        check(isinstance(value, tuple), f"{name}={quote(value)} must be a tuple")
        for entry in value:
            _check_option(name, entry, get_args(kind)[0])
        return None
    kinds = get_args(kind) or (kind,)
    if float in kinds:
        kinds = (*kinds, int)
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    check(fits, f"{name}={quote(value)} must be of type {getattr(kind, '__name__', kind)}")
    if isinstance(value, (int, float)):
        within(*((-LARGEST, LARGEST) if float in kinds else (-(2**63), 2**63 - 1)), **{name: value})
    return None
