"""Reader of peft's settings of an adapter: each is honoured, or refused by name if it would change the result.

They are in ``adapter_config.json`` beside the weights, or as JSON in the header of a file by diffusers, with the part's
name as a prefix ("unet.lora_alpha"). The fields are those of peft's ``LoraConfig``.

``rank_pattern`` and ``alpha_pattern`` set other values for some layers. Their keys are regular expressions, and an
expression from a file of unknown origin can keep Python's engine busy forever. :class:`Pattern` supports those in use
(names, ``.*``, ``|``, ``^`` and ``$``) in time linear in their length; any other is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minidiff.adapters.lora import LARGEST
from minidiff.config import quote
from minidiff.errors import CheckpointError, UnsupportedError

# The only values with which the adapter is W + scale * up @ down, and W the weight of the model.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # others change W as well
    "bias": (None, "none"),
    **dict.fromkeys(("use_dora", "use_qalora", "lora_bias"), (None, False)),
    **dict.fromkeys(
        (
            *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication"),
            *("layers_to_transform", "alora_invocation_tokens"),
        ),
        (None, []),
    ),
    **dict.fromkeys(
        (
            *("use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config", "megatron_config"),
            *("layers_pattern",),
        ),
        (None, [], ""),
    ),
}
# Settings of training, of loading, or of something refused above: they have no effect here.
INERT = frozenset(
    (
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("lora_dropout", "fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "corda_config"),
        *("lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    )
)
READ = frozenset(
    ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")
)
MOST_PATTERNS, LONGEST_PATTERN, MOST_CHARACTERS = 4096, 1000, 2**17
DEFAULT_ALPHA = 8.0  # peft's


class Alternative(NamedTuple):
    """One alternative of a pattern: pieces of fixed length with anything in between."""

    anchored: bool
    pieces: tuple[re.Pattern[str], ...]
    lengths: tuple[int, ...]

    def ends(self, name: str) -> bool:
        """Return True if ``name`` matches, or its part after one of its dots."""
        last = len(name) - self.lengths[-1]
        if len(self.pieces) == 1:
            at_name = last == 0 or (last > 0 and name[last - 1] == "." and not self.anchored)
            return at_name and self.pieces[0].match(name, last) is not None
        starts = [0] if self.anchored else [0, *(i + 1 for i, c in enumerate(name) if c == ".")]
        return any(self._from(name, start, last) for start in starts)

    def _from(self, name: str, start: int, last: int) -> bool:
        if self.pieces[0].match(name, start) is None:
            return False
        at = start + self.lengths[0]
        for piece in self.pieces[1:-1]:  # the leftmost position leaves the most room for the rest
            found = piece.search(name, at)
            if found is None:
                return False
            at = found.end()
        return at <= last and self.pieces[-1].match(name, last) is not None


class Pattern:
    """Key of ``rank_pattern`` or ``alpha_pattern``, matched as peft does: ``(.*\\.)?(KEY)$``.

    Raises :class:`UnsupportedError` for an expression of more than names, ``.`` (any character), ``.*``, ``|``, ``^``
    and ``$``; ``where`` starts the message.
    """

    def __init__(self, expression: str, where: str) -> None:
        if len(expression) > LONGEST_PATTERN:
            raise UnsupportedError(f"{where}: an expression of {len(expression)} characters; {LONGEST_PATTERN} at most")
        self.alternatives = tuple(_alternative(a, expression, where) for a in _parts(expression))

    def ends(self, name: str) -> bool:
        """Return True if ``name`` matches, as a whole or after one of its dots."""
        return any(a.ends(name) for a in self.alternatives)


def _parts(expression: str) -> Iterable[str]:
    return re.split(r"(?<!\\)\|", expression)


def _alternative(text: str, expression: str, where: str) -> Alternative:
    anchored = text.startswith("^")
    rest = text[1:] if anchored else text
    if rest.endswith("$") and not rest.endswith("\\$"):
        rest = rest[:-1]
    pieces: list[list[str]] = [[]]
    for token in re.findall(r"\.\*|\\.|.|\n", rest):
        if token == ".*":
            pieces.append([])
        elif token == "." or (len(token) == 2 and not token[1].isalnum()):
            pieces[-1].append(token)
        elif len(token) == 1 and token not in "\\*+?()[]{}^$|":
            pieces[-1].append(re.escape(token))
        else:
            raise UnsupportedError(
                f"{where}: {quote(expression)} is an expression that minidiff does not read; only names, '.*', '|', "
                "'^' and '$' are"
            )
    return Alternative(anchored, tuple(re.compile("".join(p)) for p in pieces), tuple(len(p) for p in pieces))


@dataclass(frozen=True)
class Settings:
    """Settings for the layers of one part; None if not set.

    ``default``: alpha if there are settings that do not mention it.
    """

    where: str = ""
    default: float | None = None
    rank: int | None = None
    alpha: float | None = None
    rank_stabilised: bool = False
    rank_pattern: Mapping[Pattern, float] = field(default_factory=dict)
    alpha_pattern: Mapping[Pattern, float] = field(default_factory=dict)
    targets: frozenset[str] | None = None
    excluded: Pattern | frozenset[str] | None = None

    def alpha_of(self, names: Iterable[str]) -> float | None:
        """Return the alpha of a layer with these ``names``: that of the first matching pattern, else the common one."""
        return _first(self.alpha_pattern, names, self.alpha)

    def check(self, names: tuple[str, ...], rank: int) -> None:
        """Raise :class:`CheckpointError` if the settings contradict an update of ``rank`` for such a layer."""
        told = _first(self.rank_pattern, names, self.rank)
        if told is not None and told != rank:
            raise CheckpointError(f"{self.where}: says that {names[0]} has rank {told:g}, and its matrices have {rank}")
        for group, wanted, what in (
            (self.targets, True, "target_modules leaves out"),
            (self.excluded, False, "exclude_modules names"),
        ):
            if group is not None and any(_meant(group, name) for name in names) is not wanted:
                raise CheckpointError(f"{self.where}: {what} {names[0]}, and there is an update of it")


def _first(patterns: Mapping[Pattern, float], names: Iterable[str], otherwise: float | None) -> float | None:
    names = tuple(names)
    return next((value for p, value in patterns.items() if any(p.ends(name) for name in names)), otherwise)


def _meant(group: Pattern | frozenset[str], name: str) -> bool:
    if isinstance(group, Pattern):
        return group.ends(name)
    parts = name.split(".")
    return any(".".join(parts[i:]) in group for i in range(len(parts)))


def settings_of(found: Mapping[str, Any], part: str, where: str) -> Settings:
    """Read the settings of ``part`` from those of a file: typed, each field honoured or refused.

    ``where`` (the file) starts each message. Raises :class:`CheckpointError` for a value of the wrong kind, and
    :class:`UnsupportedError` for one that makes the adapter more than a product of two matrices.
    """
    own = {key.removeprefix(f"{part}."): v for key, v in found.items() if key.startswith(f"{part}.") or "." not in key}
    if not own:
        return Settings(where)
    for name, value in own.items():
        if name in PLAIN and not any(value is v or (v not in (None, True, False) and value == v) for v in PLAIN[name]):
            raise UnsupportedError(f"{where}: {name}={quote(value)}, which minidiff does not apply; only plain LoRA is")
        if name not in PLAIN and name not in INERT and name not in READ and value not in (None, False, [], {}, ""):
            raise UnsupportedError(f"{where}: has {quote(name)}={quote(value)}, a setting that minidiff does not know")
    rank, alpha, stabilised = own.get("r"), own.get("lora_alpha"), own.get("use_rslora")
    if stabilised is not None and not isinstance(stabilised, bool):
        raise CheckpointError(f"{where}: use_rslora={quote(stabilised)}; it is true or false")
    targets = own.get("target_modules")
    if isinstance(targets, str):  # an expression for the layers to be trained; the trained ones are in the file
        targets = None
    return Settings(
        where,
        DEFAULT_ALPHA,
        None if rank is None else _rank(rank, f"{where}: r"),
        None if alpha is None else _number(alpha, f"{where}: lora_alpha"),
        bool(stabilised),
        _patterns(own.get("rank_pattern"), f"{where}: rank_pattern", _rank),
        _patterns(own.get("alpha_pattern"), f"{where}: alpha_pattern", _number),
        _names(targets, f"{where}: target_modules"),
        _excluded(own.get("exclude_modules"), f"{where}: exclude_modules"),
    )


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise CheckpointError(f"{where}={quote(value)}; it must be a finite number")
    return float(value)


def _rank(value: Any, where: str) -> int:
    if type(value) is not int or not 0 < value <= 2**31:
        raise CheckpointError(f"{where}={quote(value)}; it must be a whole number above 0")
    return value


def _patterns(found: Any, where: str, read: Any) -> dict[Pattern, float]:
    if found is None:
        return {}
    if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
        raise CheckpointError(f"{where}={quote(found)}; it must be an object of at most {MOST_PATTERNS} patterns")
    if sum(map(len, found)) > MOST_CHARACTERS:
        raise UnsupportedError(f"{where}: expressions of {sum(map(len, found))} characters; {MOST_CHARACTERS} at most")
    return {Pattern(key, where): read(value, f"{where}[{quote(key)}]") for key, value in found.items()}


def _names(found: Any, where: str) -> frozenset[str] | None:
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{where}={quote(found)}; it must be a list of names")
    return frozenset(found)


def _excluded(found: Any, where: str) -> Pattern | frozenset[str] | None:
    """Return True if a layer's name ends with a listed name, or matches the expression as a whole."""
    if isinstance(found, str) and found:
        return Pattern("|".join(f"^{a.removeprefix('^')}" for a in _parts(found)), where)
    return _names(found or None, where)
