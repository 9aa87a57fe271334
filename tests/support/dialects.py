"""What scripts/record_dialects.py records of other programs, and the tests of dialects hold ours to: texts and models.

The models are tiny, but with three layers in each text encoder, so that the last but one is not the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from minidiff.config import ModelConfig, TokenizerConfig
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.dialects import DIALECTS
from minidiff.pipeline.dialects.a1111 import A1111
from minidiff.pipeline.dialects.chunks import Reader
from minidiff.pipeline.dialects.compel_grammar import clauses
from minidiff.pipeline.dialects.dialect import Model, Part
from minidiff.pipeline.dialects.emphasis import fragments
from minidiff.pipeline.dialects.schedule import schedule
from tests.support.tiny import SD, XL, drawn

CALLS = 10  # model calls that a schedule counts

LONG = "a quiet harbour at dawn with wooden boats and nets drying on the quay " * 7
COMMAS = "portrait of an old sailor, weathered face, grey beard, woollen cap, pipe, " * 6

# Plain words, emphasis, what is left open or closed too often, escapes, long texts.
SHARED = (
    "",
    " ",
    "a red cat on a blue sofa",
    "an (important) word",
    "a ((very)) old [house] by (the sea:1.3)",
    "(unbalanced (once:1.2) more",
    "closed too often) here: and] there",
    r"a \(literal\) bracket, a \[square\] one and a \backslash",
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
    "(half:0.5) and (nothing:0) and (against:-0.7)",
    "wow!! (loud!:1.4) ünïcödé 雪, it's 3.5 o'clock",
    LONG,
    f"{LONG}, with (one word:1.5) more",
    COMMAS,
    f"({COMMAS}:0.8) and a tail",
)
TEXTS: dict[str, tuple[str, ...]] = {
    "a1111": (
        *SHARED,
        "a cat BREAK a (dog:1.2)",
        "(a cat BREAK a dog:1.2)",
        "BREAK",
        f"{COMMAS[:280]} BREAK {COMMAS}",
        "( spaced : 1.3 ) out",
        "a cat AND a (dog:1.2) :0.6 AND the sea:-1",
        f"a cat AND {LONG}",
        "the score: 9",
        "a [cat:dog:0.5] runs",
        "a [cat:3] and a [dog::7] [in snow:in rain:0.25]",
        "a [cat|dog|(bird:1.3)] sings",
        "[fe|]male [a:[b:c:6]:2]",
        "[(a:1.2):b:0.3] AND [c|d]:0.5",
        "a [b:c] and | a pipe [d:e:5]",
        f"a [cat:{LONG}:0.5]",
        f"{'cat ' * 55}, {'dog ' * 30}",  # a comma just near enough to the end of the chunk, and one just too far
        f"{'cat ' * 54}, {'dog ' * 30}",
    ),
    "comfyui": (
        *SHARED,
        "a cat BREAK a dog AND [more:less:0.5]",
        "(outer (inner:1.4) outer:1.2)",
        "((inner) more:1.5)",
        "(a:b:1.1) (no number:x) (:1.2)",
        f"a cat, ({LONG}:1.2)",
        f"{'a word ' * 36}(one two three four five six seven:1.1)",  # stays together, and one token more does not
        f"{'a word ' * 36}(one two three four five six seven eight:1.1)",
    ),
    "compel": (
        *SHARED,
        "a tall man picking apricots+",
        "a (tall thin)++ man picking (apricots)0.4 in-- sun-light",
        'a man (picking (apricots)1.3)1.1, and "more, of it"0.8',
        r"escaped \(brackets\)+ and (a \"quote\")-",
        "word.attend(1.3) (two words).attend(--)",
        '("a spider man", "a robot mech").blend(1, 0.8)',
        '("a spider+ man", "a robot, (mech)0.5", "the sea").blend(1, -0.3, 0.7, no_normalize)',
        f'("a cat", "{LONG.strip()}").blend(0.4, 0.6)',
        '("a distant galaxy, matte painting", "trending (on)1.3").and()',
        '("a distant galaxy", "a cat-").and(1, 0.5)',
        f"{LONG[:230]}. {LONG[:200]}, {LONG[:90]} (end)0.6",
        f"({LONG})0.7",
    ),
    "sd_embed": (
        *SHARED,
        "a cat BREAK a (dog:1.2)",
        "a [cat:dog:0.5] AND a bird",
        "( spaced : 1.3 ) out",
    ),
}
# Prompts with a negative prompt: shorter, longer, empty, weighted.
PAIRS: tuple[tuple[str, str], ...] = (
    ("a red cat", "blue"),
    ("a red cat", ""),
    ("a (red:1.3) cat", f"ugly, (blurry:1.2), {COMMAS}"),
    (LONG, "(bad:0.5) art"),
)


Tensors = dict[str, Tensor]


def pairs(name: str) -> list[tuple[str, str]]:
    """Every prompt that a dialect is recorded with, and its negative prompt."""
    return [*((text, "blue") for text in TEXTS[name]), *PAIRS]


def spoken(sd: StableDiffusion, name: str, prompt: str, negative: str, refiner: bool = False) -> Tensors:
    """What a dialect makes of a pair: ``positive.K.I`` and ``negative.K.I``, text I of conditional K, and ``pooled``
    before the same for SDXL. ``refiner``: with the last encoder alone, as SDXL's refiner has it."""
    encoders = sd.encoders[-1:] if refiner else sd.encoders
    readers = [Reader(*encoder, sd.config.text_layer) for encoder in encoders]
    model = Model(readers, sd.unet.config.added_dim is not None, sd.config.zero_empty)
    sides = DIALECTS[name].pair(model, [prompt] * len(readers), [negative] * len(readers), CALLS)
    found: Tensors = {}
    for side, parts in zip(("positive", "negative"), sides, strict=True):
        assert parts is not None
        for k, part in enumerate(parts):
            for i, (_, way) in enumerate(part.ways):
                found[f"{side}.{k}.{i}"] = way.context
                if model.pooled:
                    found[f"pooled.{side}.{k}.{i}"] = way.pooled
    return found


def kept(what: str, n: int, texts: int) -> bool:
    """Entry of the fixture for pair ``n``: the first ways of a schedule, and the negative prompt of :data:`PAIRS`."""
    *_, side, _, way = what.rpartition("pooled.")[2].split(".") if what != "error" else ("positive", "", "0")
    return int(way) < 3 and (side == "positive" or n >= texts)


def print_of(z: Tensor) -> Tensor:
    """A number for every token of a context (1, L, D), or the pooled text as it is: small enough to be kept."""
    return z[0] if z.ndim == 2 else z[0] @ torch.cos(torch.arange(z.shape[-1], dtype=z.dtype))


def models() -> dict[str, StableDiffusion]:
    """Tiny relatives of SD1, of SD2 (which pads with another token) and of SDXL."""
    other = replace(SD, family="tiny sd2", tokenizer=TokenizerConfig(pad=0))
    return {"sd1": _model(SD), "sd2": _model(other), "sdxl": _model(XL)}


def _model(config: ModelConfig) -> StableDiffusion:
    parts = {"text_encoder": config.text_encoder, "text_encoder_2": config.text_encoder_2}
    three: dict[str, Any] = {name: replace(part, layers=3) for name, part in parts.items() if part is not None}
    model = drawn(replace(config, **three))
    assert isinstance(model, StableDiffusion)
    return model


def facts(name: str, text: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a dialect makes of a text before it is encoded, in the form in which it is recorded."""
    dialect = DIALECTS[name]
    if isinstance(dialect, A1111):
        found = []
        for one, weight in dialect.conditionals(text, negative=False):
            ways = schedule(one, CALLS)
            part: Any = Part(weight, tuple((end, i) for i, (end, _) in enumerate(ways)))  # type: ignore[arg-type]
            chunks = [folded(dialect.chunks(way, tokenizer)) for _, way in ways]
            found.append([weight, [list(way) for way in ways], [part.at(call) for call in range(CALLS)], chunks])
        return {"fragments": [list(one) for one in fragments(text)], "conditionals": found}
    if name == "compel":
        readings = dialect.readings(text, tokenizer, CALLS)
        told = []
        for clause in clauses(text):
            prompts = [[list(one) for one in own] for own in clause.prompts]
            chunks = [folded(next(readings).chunks, 6) for _ in prompts]  # compel keeps weights in float32
            told.append([prompts, list(clause.shares), clause.normalize, clause.blended, clause.weight, chunks])
        return {"clauses": told}
    return {"chunks": folded(dialect.chunks(text, tokenizer))}


def folded(chunks: Sequence[tuple[Sequence[int], Sequence[float]]], places: int = 17) -> list[list[Any]]:
    """Chunks without their repetitions; weights rounded to decimal ``places``."""
    return [[packed([int(i) for i in ids]), packed([round(float(w), places) for w in ws])] for ids, ws in chunks]


def packed(values: Sequence[Any]) -> list[Any]:
    """Runs of three and more as [value, count]: chunks are mostly padding, and weights mostly 1."""
    found: list[Any] = []
    for value, run in groupby(values):
        count = len(list(run))
        found += [[value, count]] if count >= 3 else [value] * count
    return found
