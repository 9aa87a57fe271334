"""Learned words: vectors that stand for a subject or a style, found by training nothing else (Gal et al. 2022).

A word such as "<cat-toy>" gets one vector, or several that stand one after the other, in every text encoder of the
model. Adding it grows the table of vectors and tells the tokenizer, and the model's config: saved, the model keeps it.
``weights_convert.read_embedding`` makes a :class:`Word` of a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff.config import check
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.models.tokenizer import Tokenizer
from minidiff.turns import check_present
from minidiff.undo import set_all

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class Word:
    """``vectors`` by the text encoder that they are for, each float (n, width)."""

    name: str
    vectors: Mapping[str, Tensor]


@torch.no_grad()
def add(sd: StableDiffusion, word: Word) -> None:
    """Teach ``sd`` a word, in place; from then on it may stand in prompts, in any capitals.

    All of it is done or, should anything be raised on the way, none. Raises :class:`ConfigError` for a name that is not
    one word, or is known already, :class:`CheckpointError` for vectors of another model's width or for an encoder that
    gets none, and :class:`UnsupportedError` for a model that keeps vectors for some words only.
    """
    config = sd.config
    for part, tokenizer in TOKENIZERS.items():
        text, table = getattr(config, part), getattr(config, tokenizer)
        if text is None:
            continue
        if text.kept is not None:
            raise UnsupportedError(
                f"{word.name}: this {config.family} model has a fixed vocabulary; no word can be added"
            )
        if part not in word.vectors:
            raise CheckpointError(f"{word.name}: has no vectors for the {part} of this {config.family} model")
        check_present(getattr(sd, part).token.weight, word.name)
        vectors, known = word.vectors[part], getattr(sd, tokenizer)
        if vectors.ndim != 2 or len(vectors) == 0 or vectors.shape[1] != text.width:
            shape = tuple(vectors.shape)
            raise CheckpointError(
                f"{word.name}: vectors of shape {shape}; the {part} of this model has {text.width} wide ones"
            )
        if not vectors.isfinite().all():
            raise CheckpointError(f"{word.name}: its vectors hold NaN or infinite values")
        new = replace(table, added=(*table.added, (word.name, len(vectors))))
        check(word.name.lower() not in known.added, f"{word.name}: this word is known already; give it another name")
        room = replace(text, vocab=max(text.vocab, Tokenizer(new).size))
        config = replace(config, **{part: room, tokenizer: new})
    if config is sd.config:
        raise UnsupportedError(f"{word.name}: a {config.family} model reads no text; no word can be added")
    changes: list[tuple[object, str, Any]] = [(sd, "config", config), (sd, "hash", "")]  # it is not that file any more
    for part, tokenizer in TOKENIZERS.items():
        if getattr(config, part) is not None:
            encoder = getattr(sd, part)
            rows = grown(encoder.token.weight, word.vectors[part], getattr(sd, tokenizer).size)
            changes += [(encoder.token, "weight", rows), (encoder.token, "num_embeddings", len(rows))]
            changes += [(encoder, "config", getattr(config, part))]
            changes += [(sd, tokenizer, Tokenizer(getattr(config, tokenizer)))]
    set_all(changes)


def grown(weight: nn.Parameter, vectors: Tensor, first: int) -> nn.Parameter:
    """A table with ``vectors`` in it from row ``first`` on; rows beyond its end are added."""
    rows = torch.cat([weight[:first], vectors.to(weight), weight[first + len(vectors) :]])
    return nn.Parameter(rows, requires_grad=weight.requires_grad)
