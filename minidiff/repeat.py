"""A picture repeated: what its recipe says, put where the command line left something open.

What the recipe cannot give back must be given again: the picture that was begun from, adapters, learned words.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from minidiff.errors import CheckpointError, ConfigError
from minidiff.picture import read_recipe
from minidiff.prompts import Sizes

PYTHON_ONLY = ("negative_sizes",)  # in recipes of generate()
TILES = "vae_tiles"  # the approximation that has an option
TAUGHT = ("lora", "embedding")


def fill_from_recipe(args: Namespace) -> dict[str, Any]:
    """Fill what the command line left open from the picture that --recipe names; returns its recipe."""
    if not os.path.exists(args.recipe):
        raise CheckpointError(f"{args.recipe}: no such file")
    recipe = read_recipe(args.recipe)
    number, whole = (int, float), (int,)
    kinds: dict[str, tuple[str, Any]] = {"seed": ("seed", whole), "steps": ("steps", whole)}
    kinds["sampler"] = ("sampler", (dict,))
    if "prompt" in recipe:  # one without was made by a model that takes none of these
        kinds |= {"prompt": ("prompt", str), "negative": ("negative_prompt", str), "scale": ("guidance_scale", number)}
        kinds |= {"width": ("width", whole), "height": ("height", whole), "like": ("like", str)}
        kinds |= {"prompt_2": ("prompt_2", str), "negative_2": ("negative_prompt_2", str)}
        kinds |= {name: (name, number) for name in ("denoising_start", "denoising_end", "guidance_rescale")}
        kinds |= {"clip_skip": ("clip_skip", whole), "guidance_interval": ("guidance_interval", list)}
        if recipe.get("place"):
            place = f"picture {recipe['place'] + 1} of {recipe.get('places')} from one stream"
            raise CheckpointError(f"{args.recipe}: {place}; make all of them, with --seed {recipe.get('seed')}")
    for option in ("image", "mask"):
        if option in recipe and getattr(args, option) is None:
            name = f" ({recipe[option]})" if recipe[option] else ""
            raise ConfigError(f"{args.recipe}: was made with another picture{name}; give it with --{option}")
    for option in TAUGHT:
        if option in recipe and not getattr(args, option):
            names = ", ".join(str(name) for name, _ in recipe[option])
            raise ConfigError(f"{args.recipe}: was made with --{option} {names}; give it again")
    beyond = [key for key in PYTHON_ONLY if key in recipe]
    if beyond:
        raise ConfigError(f"{args.recipe}: was made with {', '.join(beyond)}, which only Python has; repeat it there")
    if "strength" in recipe:
        kinds["strength"] = ("strength", number)
    _fill_sizes(args, recipe)
    _fill_approximations(args, recipe)
    args.plain = args.plain or not recipe.get("fast")
    for option, (key, kind) in kinds.items():
        if getattr(args, option) not in (None, []):
            continue
        value = recipe.get(key)
        if value is None and option in ("prompt", "seed"):
            raise CheckpointError(f"{args.recipe}: its recipe has no {key} (tensors were given instead); give one here")
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise CheckpointError(f"{args.recipe}: its recipe is damaged, {key} is {value!r}")
        setattr(args, option, [value] if option == "prompt" else value)
    return recipe


def _fill_approximations(args: Namespace, recipe: Mapping[str, Any]) -> None:
    """The approximations of the picture, of which the command line has the tiles alone."""
    said = recipe.get("approximate", {})
    if not isinstance(said, dict):
        raise CheckpointError(f"{args.recipe}: its recipe is damaged, approximate is {said!r}")
    others = [name for name in said if name != TILES]
    if others:
        raise ConfigError(f"{args.recipe}: was made with {', '.join(others)}, which only Python has; repeat it there")
    if args.vae_tiles is None:
        args.vae_tiles = said.get(TILES)


def _fill_sizes(args: Namespace, recipe: Mapping[str, Any]) -> None:
    """What SDXL was told of the picture's size; the recipe has it as (height, width) and (top, left)."""
    if recipe.get("sizes") is None:
        return
    try:
        said = Sizes(**recipe["sizes"])
    except (ConfigError, TypeError):
        raise CheckpointError(f"{args.recipe}: its recipe is damaged, sizes is {recipe['sizes']!r}") from None
    pairs = {"original_size": said.original, "crop": said.crop, "target_size": said.target}
    for option, pair in pairs.items():
        if getattr(args, option) is None and pair is not None:
            setattr(args, option, tuple(pair)[::-1])
    if args.score is None:
        args.score = said.score
