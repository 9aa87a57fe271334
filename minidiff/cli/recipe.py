"""Repetition of a picture (``--recipe``, ``minidiff replay``), from its recipe and from what a recipe cannot hold.

The picture that a run began from, adapters, learned words and the model (if it is not the bundled one) must be given
again. What differs from the first run is said.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from minidiff.cli.controls import written
from minidiff.console import say
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline import recipes
from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.recipe import Recipe

TILES = "vae_tiles"  # the approximation that has an option
SHOWN = 12  # notes on what is not done; `minidiff info` shows all
HASHES = {
    "image_hash": "another image",
    "mask_hash": "another mask",
    "lora_hashes": "other adapters",
    "embedding_hashes": "other learned words",
}


def open_recipe(args: Namespace) -> Recipe:
    """Read the recipe of the picture that --recipe names, and check that what it cannot hold is given again.

    Raises :class:`CheckpointError` for a picture that one run cannot repeat alone, and :class:`ConfigError` for
    something that is missing.
    """
    source = recipes.read(args.recipe)
    recipe = source.recipe
    request, made = recipe.request, recipe.made
    if source.program != recipes.OURS and args.model is None:
        called = f", {source.model}" if source.model else ""
        raise ConfigError(
            f"{args.recipe}: was made by {source.program} with another model{called}; name it with --model"
        )
    if made.place:
        place = f"picture {made.place + 1} of {made.places} from one stream"
        raise CheckpointError(f"{args.recipe}: {place}; make all of them, with --seed {request.seed}")
    for option, origin in recipe.pictures.items():
        if getattr(args, option) is None:
            name = f" ({origin.name})" if origin.name else ""
            raise ConfigError(f"{args.recipe}: was made with another picture{name}; give it with --{option}")
    asked = {"lora": [name for name, _ in made.lora], "embedding": [name for name, _ in made.embedding]}
    asked["control"] = [written(one) for one in made.control]
    for option, found in asked.items():
        if found and not getattr(args, option):
            names = ", ".join(found)
            raise ConfigError(f"{args.recipe}: was made with --{option} {names}; give it again")
    beyond = [name for name in made.approximate if name != TILES]
    beyond += ["negative_sizes"] * (request.negative_sizes is not None)
    if beyond:
        raise ConfigError(f"{args.recipe}: was made with {', '.join(beyond)}, which only Python has; repeat it there")
    for name, given in (("prompt", args.prompt), ("seed", args.seed is not None)):
        if getattr(request, name) is None and not given and (recipe.text or name == "seed"):
            why = "tensors were given instead" if source.program == recipes.OURS else "none that is understood"
            raise CheckpointError(f"{args.recipe}: its recipe has no {name} ({why}); give one here")
    if source.notes:
        names = ", ".join(source.notes[:SHOWN]) + (", ..." if len(source.notes) > SHOWN else "")
        say(f"{args.recipe}: its recipe asks for more, which is not done here: {names}", "warning")
    if args.vae_tiles is None:
        args.vae_tiles = made.approximate.get(TILES)
    args.plain = args.plain or (source.program == recipes.OURS and not made.fast)
    return recipe


def check_family(args: Namespace, recipe: Recipe, pipe: Pipeline) -> None:
    """Raise :class:`ConfigError` if the picture was made with a model of another family than ``pipe``."""
    then = recipe.made
    if then.model in (None, pipe.config.family):
        return
    made = f"{args.recipe}: was made with a {then.model} model{f' ({then.model_hash})' if then.model_hash else ''}"
    if args.model is None:
        raise ConfigError(f"{made}, which is not the bundled one; name it with --model PATH")
    raise ConfigError(f"{made}, and {args.model} is a {pipe.config.family} model; name one of that family with --model")


def differences(recipe: Recipe, now: Mapping[str, Any], pipe: Pipeline, args: Namespace) -> Iterator[str]:
    """Yield the differences between this run, whose recipe is ``now``, and that of the picture that may change its
    pixels."""
    then = recipe.to_json()
    # Pictures of before models had an identity name the content hash of a minidiff file.
    if then.get("model_hash", "") not in ("", pipe.identity, pipe.hash):
        which = "another bundled model" if args.model is None else "model_hash"
        yield (
            f"the picture was made with {which} {then['model_hash']}, this run has {pipe.identity}; pixels may differ"
        )
    for name in ("dtype", "device"):
        if then.get(name) not in (None, now[name]):
            yield f"the picture was made with {name} {then[name]}, this run has {now[name]}; pixels may differ"
    controls = [[{**one, "name": None, "picture": None} for one in made.get("control", ())] for made in (then, now)]
    if controls[0] not in ([], controls[1]):
        yield "the picture was made with other controls than this run, other pictures for them, or other weights"
    for name, what in HASHES.items():
        if then.get(name) not in (None, now.get(name)):
            yield f"the picture was made with {what} than this run (hash {then[name]}, here {now.get(name)})"
