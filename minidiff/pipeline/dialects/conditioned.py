"""A model with prompts in a dialect: every picture's conditionals, their weights, and how both change on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.pipeline import dialects, prompts
from minidiff.pipeline.dialects.chunks import Reader
from minidiff.pipeline.dialects.dialect import Dialect, Model, Part, always, zeros
from minidiff.pipeline.guidance import Conditioned, predictor
from minidiff.pipeline.prompts import NEGATIVE_SCORE, SCORE, Prompt
from minidiff.pipeline.request import Request, Text

if TYPE_CHECKING:
    from minidiff.pipeline.stable_diffusion import StableDiffusion
    from minidiff.programs import Program

LONGEST = 1 << 14  # tokens to which contexts of different lengths are repeated

Side = list[list[Part]]
"""Prompts, or negative prompts: for each its conditionals."""


def in_dialect(
    sd: StableDiffusion, request: Request, program: Program, shape: tuple[int, ...], calls: int, made: int
) -> Conditioned:
    """Return the UNet of ``sd`` with the prompts of a request, read as its ``prompt_style`` says.

    ``calls``: the model calls of a full run, which schedules in a prompt count; ``made``: those of this run. Raises
    :class:`ConfigError` for what the dialect, or the model, does not take.
    """
    dialect = dialects.read(str(request.prompt_style))
    check(request.prompt is not None, f"prompt is None, and prompt_style={dialect.name} reads a text")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        check(getattr(request, name) is None, f"prompt_style={dialect.name} reads a text, and {name} is given")
    positive, negative = _sides(sd, request, dialect, calls)
    scale = sd.own_scale if request.guidance_scale is None else float(request.guidance_scale)
    count = max(map(len, positive))
    # A picture with fewer conditionals than another repeats its first, which counts nothing.
    weights = [[parts[j].weight if j < len(parts) else 0.0 for parts in positive] for j in range(count)]
    layers = [[parts[j if j < len(parts) else 0] for parts in positive] for j in range(count)]
    plain = weights == [[1.0] * len(positive)]
    distilled = sd.unet.config.guidance_dim is not None
    check(plain or not distilled, "AND and its weights need guidance, and this model takes its scale as an input")
    # Where guidance cancels out it is left out; several conditionals do not cancel it out at any scale.
    guided = (program.guided(scale) or not plain) and not distilled
    each = shape[0] // len(positive)
    counts = None if plain else [[w for w in own for _ in range(each)] for own in weights]
    sizes = request.negative_sizes or (request.sizes and replace(request.sizes, score=None))
    told = [_told(request, k // request.num_images, scale) for k in range(shape[0])]

    def stage(call: int) -> Conditioned:
        sides = [*layers, [parts[0] for parts in negative]] if guided else layers
        batches = _equally_long([_batch(sd, side, call) for side in sides])
        ours = [sd._conditions(batch, shape, request.sizes, SCORE) for batch in batches[:count]]
        theirs = sd._conditions(batches[count], shape, sizes, NEGATIVE_SCORE) if guided else None
        rescaled = request.guidance_rescale
        return Conditioned(
            predict=lambda unet, beside: predictor(unet, ours, theirs, scale, beside, rescaled, counts),
            alone=lambda unet, beside: predictor(unet, ours, None, scale, beside, 0.0, counts),
            told=told,
            text=True,
            guided=guided,
        )

    ways = [tuple(id(part.at(call)) for side in (*positive, *negative) for part in side) for call in range(made)]
    stages = {way: stage(ways.index(way)) for way in dict.fromkeys(ways)}
    return replace(stages[ways[0]], later={k: stages[way] for k, way in enumerate(ways) if way != ways[0]})


def measured(sd: StableDiffusion, request: Request) -> tuple[int, int]:
    """Return how many conditionals a picture has at the most, and the most tokens of one, without encoding any."""
    dialect, calls = dialects.read(str(request.prompt_style)), request.steps
    texts, against = (prompts.texts_of(text or "") for text in (request.prompt, request.negative_prompt))
    lengths = [
        sum(len(chunk.ids) for chunk in reading.chunks)
        for tokenizer, _ in sd.encoders
        for negative, side in enumerate((texts, against))
        for text in side
        for reading in dialect.readings(text, tokenizer, calls, bool(negative))
    ]
    return max(map(dialect.conditionals_of, texts)), max(lengths)


def _sides(sd: StableDiffusion, request: Request, dialect: Dialect, calls: int) -> tuple[Side, Side]:
    """Encode prompts and negative prompts, pair by pair."""
    readers = [
        Reader(tokenizer, encoder, sd.config.text_layer, prompts.checked_skip(encoder, request.clip_skip))
        for tokenizer, encoder in sd.encoders
    ]
    model = Model(readers, sd.unet.config.added_dim is not None, sd.config.zero_empty)
    assert request.prompt is not None
    texts = sd._texts(request.prompt, request.prompt_2)
    silent = request.negative_prompt is None and dialect.silent and model.zero_empty
    said = request.negative_prompt_2 is not None
    check(not silent or not said, "negative_prompt_2 is given and negative_prompt is not: zeros stand for both")
    against = sd._texts(request.negative_prompt or "", request.negative_prompt_2)
    check(len(against) in (1, len(texts)), f"{len(against)} negative prompts for {len(texts)} prompts")
    positive: Side = []
    negative: Side = []
    for k, prompt in enumerate(texts):
        other = against[k % len(against)]
        for reader, *both in zip(readers, prompt, other, strict=True):
            for text in both:
                _warn(reader, dialect, text, calls)
        here, there = dialect.pair(model, prompt, None if silent else other, calls)
        positive.append(here)
        negative.append(always(zeros(here[0].at(0))) if there is None else there)
    return positive, negative


def _batch(sd: StableDiffusion, parts: Sequence[Part], call: int) -> Prompt:
    """Return one conditional of every prompt as a batch."""
    each = [part.at(call) for part in parts]
    context = torch.cat(_repeated([way.context for way in each]))
    pooled = torch.cat([way.pooled for way in each]).to(sd.device, sd.dtype)
    return Prompt(context.to(sd.device, sd.dtype), pooled if sd.unet.config.added_dim is not None else None, [])


def _equally_long(batches: Sequence[Prompt]) -> list[Prompt]:
    contexts = _repeated([batch.context for batch in batches])
    return [batch._replace(context=context) for batch, context in zip(batches, contexts, strict=True)]


def _repeated(contexts: Sequence[Tensor]) -> list[Tensor]:
    """Repeat contexts (B, L, D) of different lengths until they are equally long.

    What attention to them gives stays the same: each of n equal keys gets an n-th of the weight.
    """
    lengths = sorted({context.shape[1] for context in contexts})
    length = math.lcm(*lengths)
    shown = ", ".join(map(str, lengths))
    fits = length <= LONGEST or len(lengths) == 1
    check(fits, f"texts of {shown} tokens do not fit into one batch; make their pictures one by one, or shorten one")
    return [context.repeat(1, length // context.shape[1], 1) for context in contexts]


def _told(request: Request, k: int, scale: float) -> dict[str, object]:
    """Return the fields of the request that make prompt ``k`` alone."""

    def one(texts: Text | None) -> str | None:
        return texts if texts is None or isinstance(texts, str) else texts[k % len(texts)]

    names = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
    return {**{name: one(getattr(request, name)) for name in names}, "guidance_scale": scale}


def _warn(reader: Reader, dialect: Dialect, text: str, calls: int) -> None:
    """Warn of words that a model with a small vocabulary reads as gaps."""
    if reader.encoder.config.kept is not None:
        tokenizer = reader.tokenizer
        marks = {tokenizer.start, tokenizer.end, tokenizer.pad}
        rows = [chunk.ids for reading in dialect.readings(text, tokenizer, calls) for chunk in reading.chunks]
        spoken = " ".join(tokenizer.decode([i for i in row if i not in marks]) for row in rows)
        prompts.warn_of_unknown_words(tokenizer, reader.encoder, [spoken])
