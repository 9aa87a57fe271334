"""Report of a conversion, as data that prints as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from minidiff.config import ModelConfig
from minidiff.console import escaped
from minidiff.storage.files import Lazy
from weights_convert.engine import Drop


@dataclass
class Report:
    """Report of one conversion.

    ``mapped``: number of tensors by component; ``dropped``: (what, how many, why) for every rule that applied;
    ``evidence``: how layout and family were recognized; ``notes``: what was decided rather than read.
    """

    source: str
    layout: str
    family: str
    evidence: list[str] = field(default_factory=list)
    mapped: dict[str, int] = field(default_factory=dict)
    dropped: list[tuple[str, int, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    target: str | None = None
    hash: str | None = None

    def drop(self, dropped: Mapping[Drop, Iterable[str]]) -> None:
        """Add the keys that named rules dropped."""
        self.dropped += [(rule.name, len(list(keys)), rule.reason) for rule, keys in dropped.items()]

    def __repr__(self) -> str:
        mapped, dropped = sum(self.mapped.values()), sum(n for _, n, _ in self.dropped)
        counts = f"{mapped:,} tensors mapped, {dropped:,} dropped"
        return f"Report: {self.source}, {self.layout} layout, {self.family}, {counts}"

    def __str__(self) -> str:
        lines: list[tuple[str, str | None]] = [
            ("source", self.source),
            ("layout", self.layout),
            ("family", self.family),
        ]
        lines += [("", f"because {e}") for e in self.evidence]
        lines += [("mapped", f"{n:6d}  {part}") for part, n in self.mapped.items()]
        lines += [("dropped", f"{n:6d}  {name}: {reason}") for name, n, reason in self.dropped]
        lines += [("note", note) for note in self.notes]
        lines += [("written", self.target)] * (self.target is not None)
        lines += [("hash", self.hash)] * (self.hash is not None)
        return page(lines)


def page(lines: Iterable[tuple[str, str | None]]) -> str:
    """Format lines of a word and a text; each stays one line, whatever a file or a path contains."""
    return "\n".join(f"{word:<10}{escaped(text or '')}" for word, text in lines)


@dataclass
class Source:
    """A whole checkpoint under minidiff's names ("unet.conv_in.weight"), not read yet."""

    config: ModelConfig
    tensors: dict[str, Lazy]
    report: Report
