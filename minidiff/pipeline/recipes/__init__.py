"""Recipes of other programs: AUTOMATIC1111's infotext and ComfyUI's graph, read into the fields of a Request.

What is understood is done; what is not is named as not done, and nothing is guessed. The picture will be near the
other program's, not equal to it: its model, adapters and device are not here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minidiff.config import quote
from minidiff.errors import CheckpointError
from minidiff.pipeline.metadata import KEY, PARAMETERS, texts_of
from minidiff.pipeline.png import LONGEST_RECIPE, read_recipe
from minidiff.pipeline.recipe import Made, Origin, Recipe, parse
from minidiff.pipeline.recipes import comfyui, infotext
from minidiff.pipeline.recipes.theirs import Theirs

OURS = "minidiff"


@dataclass(frozen=True)
class Found:
    """Recipe of a picture and the ``program`` that wrote it. ``notes``: what is not done, a few words each. ``model``:
    the name that the other program gives its checkpoint. ``raw``: a minidiff recipe as it stands in the file."""

    recipe: Recipe
    program: str = OURS
    notes: tuple[str, ...] = ()
    model: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> Found:
    """Read the recipe of a PNG, JPEG or WebP file that minidiff, AUTOMATIC1111 or ComfyUI wrote.

    Raises :class:`CheckpointError` for a file without one, or with a damaged one.
    """
    texts, name = texts_of(path, LONGEST_RECIPE), os.fspath(path)
    if KEY in texts or not texts:
        raw = read_recipe(path)  # says that there is none
        recipe, unknown = parse(raw, name)
        return Found(recipe, notes=tuple(map(quote, unknown)), raw=raw)
    if PARAMETERS in texts:
        return of(infotext.read(texts[PARAMETERS]), name)
    if "prompt" not in texts:
        raise CheckpointError(f"{name}: has a workflow of ComfyUI, but not the graph that was run; save it anew there")
    return of(comfyui.read(texts["prompt"], name), name)


def of(theirs: Theirs, name: str) -> Found:
    """Turn what another program's recipe says into one of ours. Raises :class:`CheckpointError` for values that no run
    can have."""
    lora = [[*pair] for pair in theirs.lora]
    words = [[word, None] for word in theirs.words]
    # The same door as for recipes of our own: every value is checked.
    recipe, _ = parse({"prompt": "", **theirs.fields(), "lora": lora, "embedding": words}, name)
    pictures = {option: Origin(file, None) for option, file in theirs.pictures.items()}
    checked = Recipe(request=recipe.request, made=recipe.made, pictures=pictures)
    return Found(checked, theirs.program, tuple(theirs.notes), theirs.model)


def described(found: Found) -> dict[str, Any]:
    """Return a recipe as JSON: ours as it stands, another program's as it is understood."""
    if found.program == OURS:
        return dict(found.raw)
    given = Recipe(request=found.recipe.request, made=Made(), pictures=found.recipe.pictures).to_json()
    asked = {key: value for key, value in given.items() if value is not None}
    made = found.recipe.made
    named = {
        "lora": [*map(list, made.lora)],
        "embedding": [word for word, _ in made.embedding],
        "checkpoint": found.model,
        "not done": list(found.notes),
    }
    return {"program": found.program, **asked, **{key: value for key, value in named.items() if value}}


def has_infotext(path: str | os.PathLike[str]) -> bool:
    """Return True if a picture carries AUTOMATIC1111's text, beside a recipe of minidiff or alone."""
    return PARAMETERS in texts_of(path, LONGEST_RECIPE)
