"""Base class of dialects, and what they make of a prompt: conditionals that may change from call to call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch

from minidiff.config import check
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline.dialects.chunks import Chunk, Encoded, Reader

Texts = Sequence[str]
"""A prompt: its text for each encoder."""


class Part(NamedTuple):
    """One conditional of a prompt, with its weight among those joined by AND, and what it is as the run goes on: pairs
    of the last model call, counted from 0, that reads it, and the encoded text. The first pair that fits counts; if
    none does, the first of all."""

    weight: float
    ways: tuple[tuple[int, Encoded], ...]

    def at(self, call: int) -> Encoded:
        """Return the encoded text that a model call reads."""
        return next((way for last, way in self.ways if call <= last), self.ways[0][1])


class Model(NamedTuple):
    """A model as a dialect sees it: its text encoders, in order, whether the UNet reads a ``pooled`` text (SDXL), and
    whether zeros stand for a negative prompt that is not given."""

    readers: Sequence[Reader]
    pooled: bool
    zero_empty: bool


class Reading(NamedTuple):
    """One text of a prompt as one encoder gets it, for people: ``what`` it is, and its ``chunks``."""

    what: str
    chunks: list[Chunk]


class Dialect(ABC):
    """A program's way with prompts.

    ``second``: the second encoder may get a text of its own. ``silent``: with a model trained that way, zeros stand for
    a negative prompt that is not given; otherwise it is the empty text. ``calls``: the model calls of a full run, which
    is what a schedule in a prompt counts.
    """

    name: ClassVar[str]
    second: ClassVar[bool] = False
    silent: ClassVar[bool] = False

    @abstractmethod
    def chunks(self, text: str, tokenizer: Tokenizer) -> list[Chunk]:
        """Return a text without a schedule in weighted chunks. Raises :class:`ConfigError` for what the program does
        not take, or minidiff does not do."""

    def conditionals_of(self, text: str) -> int:
        """Return the number of conditionals that a prompt is split into."""
        return 1

    @abstractmethod
    def parts(self, model: Model, texts: Texts, calls: int, negative: bool) -> list[Part]:
        """Encode a prompt."""

    def readings(self, text: str, tokenizer: Tokenizer, calls: int, negative: bool = False) -> Iterator[Reading]:
        """Yield what an encoder gets for a text, one after the other."""
        yield Reading("", self.chunks(text, tokenizer))

    def pair(
        self, model: Model, prompt: Texts, negative: Texts | None, calls: int
    ) -> tuple[list[Part], list[Part] | None]:
        """Encode a prompt, and its negative prompt unless that is None."""
        positive = self.parts(model, prompt, calls, negative=False)
        return positive, None if negative is None else self.parts(model, negative, calls, negative=True)

    def check_texts(self, texts: Texts) -> None:
        """Raise :class:`ConfigError` if the second encoder has a text of its own, and the program has one for both."""
        same = self.second or len(set(texts)) == 1
        check(same, f"{self.name} has one text for both encoders; leave out prompt_2 and negative_prompt_2")


def always(encoded: Encoded) -> list[Part]:
    """Return a prompt that is one text from beginning to end."""
    return [Part(1.0, ((0, encoded),))]


def zeros(like: Encoded) -> Encoded:
    """Return zeros in place of an encoded text."""
    return Encoded(torch.zeros_like(like.context), torch.zeros_like(like.pooled))


def side_by_side(each: Sequence[Encoded]) -> Encoded:
    """Join what several encoders give: contexts side by side, as far as the shortest reaches, and the last pooled."""
    if len(each) == 1:
        return each[0]
    length = min(one.context.shape[1] for one in each)
    return Encoded(torch.cat([one.context[:, :length] for one in each], dim=-1), each[-1].pooled)
