"""Weighted chunks, which is what a dialect makes of a text, and a text encoder as a dialect reads it.

CLIP reads rows of 77 tokens: a start token, 75 of the text, an end token. Programs that take longer texts cut them into
several such rows, encode each by itself, and put the results one behind the other. A :class:`Chunk` is one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minidiff.config import quote
from minidiff.errors import ConfigError
from minidiff.models.clip import CLIPText, TextOutput
from minidiff.models.tokenizer import Tokenizer

LARGEST = 1e4  # weight

Fragment = tuple[str, float]
"""A piece of a text, and its weight."""


class Chunk(NamedTuple):
    """One row for the text encoder: ids with start, end and padding, and the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def weighted(self) -> bool:
        """True if a weight is not 1."""
        return any(w != 1.0 for w in self.weights)


class Encoded(NamedTuple):
    """An encoded text: ``context`` (1, L, D), and ``pooled`` (1, D') of the last encoder."""

    context: Tensor
    pooled: Tensor


class Reader:
    """One text encoder with its tokenizer, read at the ``layer`` that the UNet was trained with, ``skip`` earlier."""

    def __init__(
        self, tokenizer: Tokenizer, encoder: CLIPText, layer: Literal["last", "penultimate"], skip: int = 0
    ) -> None:
        self.tokenizer, self.encoder, self.layer, self.skip = tokenizer, encoder, layer, skip

    def __call__(self, rows: Sequence[Sequence[int]], mask: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Encode rows of ids (B, L) in one batch: context (B, L, D) and pooled (B, D').

        ``mask`` (L,): 0 for tokens that no other may attend to.
        """
        device = self.encoder.token.weight.device
        ids = torch.tensor([list(row) for row in rows], dtype=torch.int64, device=device)
        seen = None if mask is None or all(mask) else torch.tensor([list(mask)], dtype=torch.bool, device=device)
        out: TextOutput = self.encoder(ids, self.skip, seen)
        context: Tensor = getattr(out, self.layer)
        return context, out.pooled

    @cached_property
    def empty(self) -> Tensor:
        """The empty prompt's context, float32 (1, L, D)."""
        return self([row(self.tokenizer, [])])[0].float()


def row(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return ids between start and end, padded."""
    return [tokenizer.start, *ids, tokenizer.end, *[tokenizer.pad] * (tokenizer.length - 2 - len(ids))]


def spans(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield what belongs together in ``ids`` as (place, length): single tokens, and learned words."""
    words = {span.start: len(span) for span in tokenizer.added.values()}
    i = 0
    while i < len(ids):
        count = words.get(ids[i], 1)
        yield i, count
        i += count


def check_weight(text: str, weight: float) -> None:
    """Raise :class:`ConfigError` for a weight with which no picture could come out."""
    if not -LARGEST <= weight <= LARGEST:
        raise ConfigError(f"{quote(text)} has the weight {weight:g}, which does not lie in {-LARGEST:g}..{LARGEST:g}")
