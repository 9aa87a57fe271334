"""A picture repeated: what its recipe says, put where the command line left something open.

What the recipe cannot give back must be given again: the picture that was begun from, adapters, learned words, and the
model, if it is not the bundled one.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

from minidiff.config import quote
from minidiff.console import say
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.picture import read_recipe
from minidiff.pipeline.prompts import Sizes
from minidiff.pipeline.recipe import Recipe, typed

TILES = "vae_tiles"  # the approximation that has an option
TAUGHT = ("lora", "embedding")
ALWAYS = ("seed", "steps", "sampler", "strength")  # options of every model, and those of models that read a prompt
OF_TEXT = (
    *("prompt", "negative", "prompt_2", "negative_2", "scale", "width", "height", "like", "clip_skip"),
    *("denoising_start", "denoising_end", "guidance_rescale", "guidance_interval"),
)
CALLED = {"negative": "negative_prompt", "negative_2": "negative_prompt_2", "scale": "guidance_scale"}  # in a recipe


def fill_from_recipe(args: Namespace) -> Recipe:
    """Fill what the command line left open from the picture that --recipe names; returns its recipe."""
    found = read_recipe(args.recipe)
    recipe, unknown = typed(found, args.recipe)
    if unknown:
        names = ", ".join(map(quote, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        say(f"{args.recipe}: its recipe says {names}, which this minidiff does not know and leaves out", "warning")
    if recipe.place:
        place = f"picture {recipe.place + 1} of {recipe.places} from one stream"
        raise CheckpointError(f"{args.recipe}: {place}; make all of them, with --seed {recipe.seed}")
    for option in ("image", "mask"):
        if option in found and getattr(args, option) is None:
            name = f" ({getattr(recipe, option)})" if getattr(recipe, option) else ""
            raise ConfigError(f"{args.recipe}: was made with another picture{name}; give it with --{option}")
    for option in TAUGHT:
        if getattr(recipe, option) and not getattr(args, option):
            names = ", ".join(name for name, _ in getattr(recipe, option))
            raise ConfigError(f"{args.recipe}: was made with --{option} {names}; give it again")
    beyond = [name for name in recipe.approximate if name != TILES]
    beyond += ["negative_sizes"] * (recipe.negative_sizes is not None)
    if beyond:
        raise ConfigError(f"{args.recipe}: was made with {', '.join(beyond)}, which only Python has; repeat it there")
    if args.vae_tiles is None:
        args.vae_tiles = recipe.approximate.get(TILES)
    _fill_sizes(args, recipe)
    args.plain = args.plain or not recipe.fast
    # One without a prompt was made by a model that takes nothing that goes with it.
    for option in (*ALWAYS, *(OF_TEXT if "prompt" in found else ())):
        if getattr(args, option) not in (None, []):
            continue
        name = CALLED.get(option, option)
        value = getattr(recipe, name)
        if value is None and option in ("prompt", "seed"):
            raise CheckpointError(
                f"{args.recipe}: its recipe has no {name} (tensors were given instead); give one here"
            )
        setattr(args, option, [value] if option == "prompt" else value)
    return recipe


def check_family(args: Namespace, recipe: Recipe, pipe: Pipeline) -> None:
    """Raise :class:`ConfigError` if the picture was made with a model of another family than ``pipe``."""
    if recipe.model in (None, pipe.config.family):
        return
    made = (
        f"{args.recipe}: was made with a {recipe.model} model{f' ({recipe.model_hash})' if recipe.model_hash else ''}"
    )
    if args.model is None:
        raise ConfigError(f"{made}, which is not the bundled one; name it with --model PATH")
    raise ConfigError(f"{made}, and {args.model} is a {pipe.config.family} model; name one of that family with --model")


def differences(recipe: Recipe, pipe: Pipeline) -> Iterator[str]:
    """Yield the differences between this run and that of the picture that may change its pixels."""
    precision = str(pipe.dtype).removeprefix("torch.")
    # Pictures of before models had an identity name the content hash of a minidiff file.
    known = {"model_hash": (pipe.identity, pipe.hash), "dtype": (precision,), "device": (pipe.device.type,)}
    for name, now in known.items():
        then = getattr(recipe, name)
        if then and then not in now:
            yield f"the picture was made with {name} {then}, this run has {now[0]}; pixels may differ"


def _fill_sizes(args: Namespace, recipe: Recipe) -> None:
    """Fill in SDXL's picture sizes from a recipe, which has them as (height, width) and (top, left)."""
    if recipe.sizes is None:
        return
    try:
        said = Sizes(**recipe.sizes)
    except (ConfigError, TypeError, OverflowError):
        raise CheckpointError(f"{args.recipe}: its recipe is damaged, sizes is {quote(recipe.sizes)}") from None
    pairs = {"original_size": said.original, "crop": said.crop, "target_size": said.target}
    for option, pair in pairs.items():
        if getattr(args, option) is None and pair is not None:
            setattr(args, option, tuple(pair)[::-1])
    if args.score is None:
        args.score = said.score
