"""Result of reading another program's recipe, before it is checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minidiff.config import quote
from minidiff.programs.profiles import PROFILES
from minidiff.samplers.elsewhere import meant


@dataclass
class Theirs:
    """Values that a recipe of ``program`` gives, as a recipe of minidiff's has them.

    ``asked``: fields of a Request; ``sampler``, ``scheduler`` (noise levels, by the program's name) and ``device`` (of
    the noise) become two more, "sampler" and "like". ``lora``: (name, strength). ``words``: names of embeddings.
    ``pictures``: names of the files that it began from, by option. ``notes``: what is not done, a few words each.
    """

    program: str
    asked: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] | None = None
    scheduler: str | None = None
    device: str | None = None
    lora: list[tuple[str, float]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    pictures: dict[str, str | None] = field(default_factory=dict)
    model: str | None = None
    notes: list[str] = field(default_factory=list)

    def set_sampler(self, name: str, levels: str | None) -> None:
        """Take the sampler that the program calls ``name``, with its noise levels ``levels`` (None: its default); note
        what is not here."""
        profile = PROFILES[self.program]
        found = meant(name, profile.methods)
        if found is None:
            self.notes.append(f"sampler {quote(name)}")
            return
        sampler, options = found
        levels = options.pop("sigma_spacing", levels)  # of a name such as "DPM++ 2M Karras"
        self.sampler = {"name": sampler, **options}
        method = profile.methods[sampler]
        strided = sampler in ("ddim", "pndm") and method.sampler == sampler  # which have timesteps, and no levels
        if levels is None or levels == profile.schedulers[0] or strided:
            return
        if levels in profile.schedulers:
            self.scheduler = levels
        else:
            self.notes.append(f"noise levels {quote(levels)}")

    def fields(self) -> dict[str, Any]:
        """Return the fields of the request."""
        like = ":".join(filter(None, [self.program, self.scheduler, self.device]))
        return {**self.asked, "like": like, **({} if self.sampler is None else {"sampler": self.sampler})}


def number(text: object) -> float | None:
    """Return a number that is written as text or as itself; None for anything else."""
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        return None
    try:
        return float(text)
    except (ValueError, OverflowError):
        return None


def whole(text: object) -> int | None:
    """Return a whole number that is written as text or as itself; None for anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if isinstance(text, str) and len(text) <= 24 and text.strip().removeprefix("-").isdecimal():
        return int(text)
    return None
