"""Textual inversion: learned words, whose vectors are the only thing that was trained (Gal et al. 2022).

A word such as "<cat-toy>" has one vector, or several in a row, in every text encoder of the model. Adding it extends
the embedding table, the tokenizer and the model's config, so that it is saved with the model.
``weights_convert.read_embedding`` reads a :class:`Word` from a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minidiff.config import ModelConfig, check, quote
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.models.tokenizer import Tokenizer
from minidiff.models.undo import set_all
from minidiff.models.unicode_tables import normalize
from minidiff.storage.identity import taught
from minidiff.storage.low_memory import check_present

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@dataclass(frozen=True)
class Word:
    """A learned word: its ``vectors`` by text encoder, each float (n, width).

    ``others``: words of the same file, which are added together with this one. ``file``: its name, for recipes.
    """

    name: str
    vectors: Mapping[str, Tensor]
    others: tuple[Word, ...] = ()
    file: str = ""


@torch.no_grad()
def add(sd: StableDiffusion, word: Word) -> None:
    """Add a word to ``sd`` in place. It can then be used in prompts, in upper or lower case.

    If an error is raised, the model is unchanged. Raises :class:`ConfigError` for a name that is not a single word or
    already exists, :class:`CheckpointError` for vectors of the wrong width or an encoder without vectors, and
    :class:`UnsupportedError` for a model that has vectors for some words only.
    """
    words = (word, *word.others)
    config = sd.config
    for each in words:
        config = _taught(sd, config, each)
    named = {f"{each.name} {part}": vectors for each in words for part, vectors in sorted(each.vectors.items())}
    source = taught(sd.source, named) if sd.source else ""
    # The model is no longer that of its file.
    changes: list[tuple[object, str, Any]] = [(sd, "config", config), (sd, "hash", ""), (sd, "source", source)]
    note = (os.path.basename(word.file or word.name), word.name, taught("", named)[:16])
    changes.append((sd, "words", (*sd.words, note)))
    for part, tokenizer in TOKENIZERS.items():
        if getattr(config, part) is not None:
            encoder = getattr(sd, part)
            vectors = torch.cat([each.vectors[part].to(encoder.token.weight) for each in words])
            rows = grown(encoder.token.weight, vectors, getattr(sd, tokenizer).size)
            changes += [(encoder.token, "weight", rows), (encoder.token, "num_embeddings", len(rows))]
            changes += [(encoder, "config", getattr(config, part))]
            changes += [(sd, tokenizer, Tokenizer(getattr(config, tokenizer)))]
    set_all(changes)


def _taught(sd: StableDiffusion, config: ModelConfig, word: Word) -> ModelConfig:
    """Return ``config`` with ``word``, after checking it."""
    shown = word.name if len(word.name) <= 60 else f"{word.name[:57]}..."
    name, parts = word.name, [part for part in TOKENIZERS if getattr(config, part) is not None]
    if not parts:
        raise UnsupportedError(f"{shown}: a {config.family} model reads no text; no word can be added")
    # A refiner has the second of SDXL's encoders only, and takes the words of both.
    beyond = [part for part in word.vectors if part not in parts and part != "text_encoder"]
    if beyond:
        raise CheckpointError(f"{shown}: has vectors for a {beyond[0]}, which this {config.family} model does not have")
    for part in parts:
        text, tokenizer = getattr(config, part), TOKENIZERS[part]
        if text.kept is not None:
            raise UnsupportedError(f"{shown}: this {config.family} model has a fixed vocabulary; no word can be added")
        if part not in word.vectors:
            raise CheckpointError(f"{shown}: has no vectors for the {part} of this {config.family} model")
        table = getattr(sd, part).token.weight
        check_present(table, shown)
        vectors = word.vectors[part]
        if vectors.ndim != 2 or len(vectors) == 0 or vectors.shape[1] != text.width:
            shape = tuple(vectors.shape)
            raise CheckpointError(
                f"{shown}: vectors of shape {shape}; the {part} of this model has vectors of width {text.width}"
            )
        if not vectors.to(table).isfinite().all():
            raise CheckpointError(f"{shown}: its vectors hold NaN or infinite values")
        one = name != "" and not any(c.isspace() for c in name)
        check(one, f"{quote(name)} must be one word; give it another name, as in --embedding FILE=WORD")
        before = getattr(config, tokenizer)
        check(
            normalize(name) not in Tokenizer(before).added, f"{shown}: this word already exists; give it another name"
        )
        after = replace(before, added=(*before.added, (name, len(vectors))))
        spoken = Tokenizer(after)
        ids = list(range(spoken.size - len(vectors), spoken.size))
        check(spoken.encode(name) == ids, f"{quote(name)}: no prompt can contain this word; give it another name")
        config = replace(config, **{part: replace(text, vocab=max(text.vocab, spoken.size)), tokenizer: after})
    return config


def grown(weight: nn.Parameter, vectors: Tensor, first: int) -> nn.Parameter:
    """Return a table with ``vectors`` from row ``first`` on; rows beyond its end are added."""
    rows = torch.cat([weight[:first], vectors.to(weight), weight[first + len(vectors) :]])
    return nn.Parameter(rows, requires_grad=weight.requires_grad)
