"""Options of the samplers: types and rules as annotations of their fields, and one check of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints

from minidiff.config import check, quote, read_value, within

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
    options = {name: (getattr(method, name), *known) for name, known in _options(method.__class__).items()}
    for name, (value, kind, _) in options.items():
        where = f"{type(method).__name__}.{name}"
        check(not isinstance(value, list), f"{where}={quote(value)} must be a tuple")  # a list has no hash
        read_value(kind, value, where)
        if isinstance(value, (int, float)):
            fractional = float in (kind, *get_args(kind))
            within(*((-LARGEST, LARGEST) if fractional else (-(2**63), 2**63 - 1)), **{where: value})
    for name, (value, _, rules) in options.items():
        for rule in rules if value is not None else ():
            check(rule.fits(value), f"{name}={value} {rule.text}")


@lru_cache
def _options(method: Any) -> dict[str, tuple[Any, tuple[Rule, ...]]]:
    """Return the type and the rules of each option."""
    kinds, noted = get_type_hints(method), get_type_hints(method, include_extras=True)
    own = {name: hint for name, hint in noted.items() if get_origin(hint) is not ClassVar}
    return {name: (kinds[name], getattr(hint, "__metadata__", ())) for name, hint in own.items()}
