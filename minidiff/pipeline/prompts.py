"""Conditioning of the UNet by a prompt: the encoded text, and for SDXL also the pooled text and the picture's sizes.

SD1 and SD2 read one text encoder's last layer. SDXL reads the last but one of two encoders side by side, the second
one's pooled output, and six numbers (Podell et al. 2023, section 2.2): how large the picture was before it was resized,
where it was cropped, and how large it is wanted; so a model that has seen small pictures and cut-off heads can be asked
for neither. Its refiner has the second encoder alone, and instead of the wanted size a score of how pleasing the
picture is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minidiff.config import ModelConfig, check
from minidiff.console import warn
from minidiff.models.clip import CLIPText, TextOutput
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline.request import Sizes, Text, texts

Encoder = tuple[Tokenizer, CLIPText]

# What the reference tells the refiner where nothing else is said: with the prompt, and with the negative prompt.
SCORE, NEGATIVE_SCORE = 6.0, 2.5
MOST_WORDS = 10  # that a warning names


class UnknownWords(UserWarning):
    """Words of a prompt, ``strange``, that a model with a small vocabulary reads as gaps. ``known``: all its words."""

    def __init__(self, strange: Sequence[str], known: Sequence[str]) -> None:
        self.strange, self.known = strange, known
        super().__init__(f"{self._named(strange)}; its words are: {' '.join(known)}")

    def after(self, before: Sequence[UnknownWords]) -> str:
        """Return what is to be said after others in the same run: what is new, if anything, without the list."""
        same = [other for other in before if other.known == self.known]
        named = {word for other in same for word in other.strange}
        return self._named([word for word in self.strange if word not in named]) if same else str(self)

    def _named(self, strange: Sequence[str]) -> str:
        more = f" and {len(strange) - MOST_WORDS:,} words more" if len(strange) > MOST_WORDS else ""
        return f"this model does not know {', '.join(map(repr, strange[:MOST_WORDS]))}{more}" if strange else ""


class Prompt(NamedTuple):
    """Encoded prompts: ``context`` (P, L, D), ``pooled`` (P, D') where the UNet reads it, and the texts, or None for
    what was encoded outside; ``texts_2`` where the second encoder was given others."""

    context: Tensor
    pooled: Tensor | None
    texts: list[str | None]
    texts_2: list[str] | None = None

    def second(self, k: int) -> str | None:
        """Return the second encoder's text for prompt ``k``, if it differs from the first encoder's."""
        return None if self.texts_2 is None else self.texts_2[k % len(self.texts_2)]

    def matching(self, positive: Prompt) -> Prompt:
        """Return this negative prompt with one row for every positive one; a single row is expanded to all."""
        context, pooled = self.context, self.pooled
        if len(context) == 1:
            context = context.expand(len(positive.context), -1, -1)
            pooled = None if pooled is None else pooled.expand(len(context), -1)
        shapes = f"{tuple(context.shape)} and {tuple(positive.context.shape)}"
        fits = context.shape == positive.context.shape
        check(fits, f"negative and positive prompt differ in shape, {shapes}; give one for each")
        return self._replace(context=context, pooled=pooled)


def texts_of(prompt: Text) -> list[str]:
    """Return the texts of a prompt as a list. Raises :class:`ConfigError` for anything else, and an empty list."""
    texts("prompt", prompt)
    return [prompt] if isinstance(prompt, str) else list(prompt)


def encode(
    encoders: Sequence[Encoder], texts: Sequence[Sequence[str]], layer: Literal["last", "penultimate"], skip: int = 0
) -> tuple[Tensor, Tensor]:
    """Encode P ``texts`` for each encoder: context (P, L, sum of widths), and the last encoder's pooled (P, D').

    ``skip``: read that many layers earlier. Raises :class:`ConfigError` for more layers than the encoders have.
    """
    contexts: list[Tensor] = []
    for (tokenizer, encoder), own in zip(encoders, texts, strict=True):
        checked_skip(encoder, skip)
        warn_of_unknown_words(tokenizer, encoder, own)
        out: TextOutput = encoder(tokenizer(own).to(encoder.token.weight.device), skip)
        contexts.append(getattr(out, layer))
    return torch.cat(contexts, dim=-1) if len(contexts) > 1 else contexts[0], out.pooled


def checked_skip(encoder: CLIPText, skip: int) -> int:
    """Return ``skip``. Raises :class:`ConfigError` unless it is a number of layers that the encoder can do without."""
    most = encoder.config.layers - 1
    whole = isinstance(skip, int) and not isinstance(skip, bool)
    check(whole and 0 <= skip <= most, f"clip_skip={skip!r} must be a whole number in 0..{most}, for this encoder")
    return skip


def warn_of_unknown_words(tokenizer: Tokenizer, encoder: CLIPText, texts: Sequence[str]) -> None:
    """Warn, in one line, of words that a model with a small vocabulary reads as gaps."""
    kept = encoder.config.kept
    strange = [] if kept is None else tokenizer.unknown(" ".join(texts), kept)
    if kept is not None and strange:
        warn(UnknownWords(strange, known_words(tokenizer, kept)), stacklevel=2)


def known_words(tokenizer: Tokenizer, kept: Sequence[int]) -> list[str]:
    """Return the words that can be written with the tokens ``kept``, sorted.

    A token that is a word by itself counts as one, and a beginning ("tri") does not. Two tokens are a word if they
    lengthen another one, as "tri" and "angles" do "triangle"; such an end is then not taken for a word.
    """
    named = {text: i for i in kept if (text := tokenizer.decode([i])).isalnum()}
    whole = {word for word, i in named.items() if tokenizer.encode(word) == [i]}
    pairs = {(first, last) for first in {*named} - whole for last in whole}
    longer = {
        (first + last, last)
        for first, last in pairs
        if any((first + last).startswith(word) for word in whole if len(word) > len(first))
        and tokenizer.encode(first + last) == [named[first], named[last]]
    }
    return sorted(whole - {last for _, last in longer} | {word for word, _ in longer})


def size_ids(config: ModelConfig, sizes: Sizes, height: int, width: int, score: float) -> list[float]:
    """Return the numbers that the UNet of ``config`` is told: original size, crop, and target size or score."""
    own = (height, width)
    shared = [*(sizes.original or own), *sizes.crop]
    if config.reads_score:
        return [*shared, score if sizes.score is None else sizes.score]
    check(sizes.score is None, f"sizes: score={sizes.score} is given; only a refiner reads one")
    return [*shared, *(sizes.target or own)]
