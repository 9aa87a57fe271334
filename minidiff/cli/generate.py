"""``minidiff generate``: pictures from a text, or from nothing with a model that reads none."""

from __future__ import annotations

import os
import random
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.cli.controls import Named, check_there, open_controls
from minidiff.cli.generate_options import add as add
from minidiff.cli.grid import checked
from minidiff.cli.opening import device_of, dtype_of, large, open_model, parts_of, probed
from minidiff.cli.options import given
from minidiff.console import say, show
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.request import PROMPT_STYLES, Request, options
from minidiff.storage.reading import missing

if TYPE_CHECKING:
    from minidiff.adapters.control import Control
    from minidiff.pipeline import StableDiffusion, Unconditional
    from minidiff.pipeline.denoise import Run
    from minidiff.pipeline.model import Model
    from minidiff.pipeline.recipe import Recipe

SIGNS = re.compile(r"[()\[\]]|\b(?:BREAK|AND)\b")  # that mean something in a1111 or comfyui


def run(args: Namespace) -> int | None:
    """Make the pictures and print their paths, or the memory that it would take."""
    if args.estimate:
        _estimate(args)
        return None
    if args.prompts is not None:
        return _run_many(args)
    if args.together is not None:
        raise ConfigError("--together is about the lines of --prompts; for several pictures of a prompt: --num-images")
    for path in make(args):
        show(path)
    return None


def _estimate(args: Namespace) -> None:
    """Print what the run would take."""
    for option in ("prompts", "grid"):
        if getattr(args, option) is not None:
            raise ConfigError(f"--estimate is about one run; leave out --{option}, and give the options of its largest")
    pipe, request = prepared(args, _in_turn(args))
    show(pipe.estimate(request))


def _run_many(args: Namespace) -> int:
    """Make the pictures of --prompts; return 1 if a line was broken."""
    from minidiff.cli import many
    from minidiff.cli.many.work import Maker

    _check_there(args)
    asked = _asked(args, None)
    choice = _changed(asked.get("sampler"), args.set)
    _check_sampler(choice, asked.get("like"))

    def opened() -> Maker:
        pipe, added, converted = _opened(args, choice, None, low_memory=False)
        _remark(pipe, args, None, asked, converted)
        there = zip(args.control, added.get("controls", ()), strict=False)
        models = {named.path: control.model for named, control in there}

        def request(fields: Mapping[str, Any]) -> Request:
            named, others = fields.get("control"), {name: fields[name] for name in fields if name != "control"}
            own = {} if named is None else {"controls": _controls(pipe, args, named, models, equip=True)}
            return _request(pipe, args, {**added, **own, **others})

        return Maker(pipe, request)

    return many.run(args, {**asked, **({"sampler": choice} if choice else {})}, _check_sampler, opened)


def make(args: Namespace) -> Iterator[Path]:
    """Make the pictures; yield the path of each as it is written."""
    from minidiff.cli import grid, views
    from minidiff.cli.output import Output
    from minidiff.cli.recipe import open_recipe
    from minidiff.pipeline.png import label, to_pil

    _check_there(args)
    recipe = None if args.recipe is None else open_recipe(args)
    axes = checked(args.grid, args) if args.grid else []
    if any(axis.name == "prompt" for axis in axes) and not args.prompt:
        args.prompt = [axes[0].changes[0][0]]
    asked = _asked(args, recipe)
    output = Output(args.out, args.force, mark=not args.no_mark, infotext=args.infotext)
    choice = _changed(asked.get("sampler"), args.set)
    _check_sampler(choice, asked.get("like"))
    pipe, added, converted = _opened(args, choice, recipe, _in_turn(args))
    if args.grid is not None:

        def start(changes: Mapping[str, Any]) -> Run:
            cell = grid.merged({**asked, **added}, changes)
            sampler = _changed(changes.get("sampler"), args.set) or added["sampler"]
            return pipe.run(_request(pipe, args, {**cell, "sampler": sampler}))

        seeded = args.seed is not None or (recipe is not None and recipe.request.seed is not None)
        told = {"show": not args.quiet, "mark": not args.no_mark}
        yield from grid.make(pipe, axes, start, args.out, force=args.force, seeded=seeded, **told)
        return
    job = pipe.run(_request(pipe, args, {**asked, **added}))
    watching = views.of(pipe, args, job)
    _remark(pipe, args, recipe, job.recipes[0], converted)  # after the last check: a mistake is one line and no more
    watching.follow(job, show=not args.quiet)
    pixels = pipe.finish(job, progress=False)
    for k, image in enumerate([label(image, made) for image, made in zip(to_pil(pixels), job.recipes, strict=True)]):
        path = output.save(image)
        yield path
        yield from watching.save(k, path, args.force)


def prepared(args: Namespace, low_memory: bool = False) -> tuple[StableDiffusion | Unconditional, Request]:
    """Open the model that the command line names, and return it with the request, for one run that is not saved."""
    from minidiff.cli.recipe import open_recipe

    _check_there(args)
    recipe = None if args.recipe is None else open_recipe(args)
    asked = _asked(args, recipe)
    choice = _changed(asked.get("sampler"), args.set)
    _check_sampler(choice, asked.get("like"))
    pipe, added, _ = _opened(args, choice, recipe, low_memory)
    return pipe, _request(pipe, args, {**asked, **added})


def _in_turn(args: Namespace) -> bool:
    """Return True if the parts of the model may take turns in memory: one run needs text encoder, UNet and VAE one
    after the other, but adapters change a model in memory, and a preview by the own VAE needs that in between."""
    own_preview = args.preview and not args.preview_vae
    return not (args.lora or args.embedding or own_preview or args.grid)


def _check_there(args: Namespace) -> None:
    """Raise :class:`CheckpointError` for a file that is missing, before anything is opened."""
    for option in ("image", "mask", "recipe"):
        path = getattr(args, option)
        if path is not None and not os.path.exists(path):
            raise CheckpointError(f"--{option} {missing(path)}")
    check_there(args)


def _opened(
    args: Namespace, choice: Any, recipe: Recipe | None, low_memory: bool
) -> tuple[StableDiffusion | Unconditional, dict[str, Any], bool]:
    """Open the model with its adapters, controls and speed-ups.

    Returns the pipeline, the fields of a request that are known only then, and True if it was converted.
    """
    from minidiff.cli.recipe import check_family

    device = device_of(args.device)
    dtype = probed(args.model, device) if args.dtype == "auto" else dtype_of(args.dtype)
    named = str(choice["name"]) if isinstance(choice, Mapping) else choice
    pipe, converted = open_model(args.model, device, dtype, sampler=named, low_memory=low_memory, **parts_of(args))
    if choice is None and args.set:  # of the checkpoint's own sampler, which is known only now
        choice = _changed(pipe.config.sampler, args.set)
    pipe.dtype_chosen = "auto" if args.dtype == "auto" and dtype is not None else None  # Python would take another
    if recipe is not None:
        check_family(args, recipe, pipe)
    _teach(pipe, args)
    controls = _controls(pipe, args, args.control, {})
    for model in (pipe, *{control.model for control in controls}):
        _equip(model, args, large(args.model))
    return pipe, {"sampler": choice, **({"controls": controls} if controls else {})}, converted


def _asked(args: Namespace, recipe: Recipe | None) -> dict[str, Any]:
    """Return the fields of the request that the recipe or the command line gives; the latter takes precedence.

    A list of seeds gives one picture per prompt and seed.
    """
    base = None if recipe is None else recipe.request
    if recipe is not None and not recipe.text:
        base = replace(recipe.request, height=None, width=None)  # models without text have one size
    asked = given(args, Request, base)
    given_image = args.image is not None or any(axis.name == "image" for axis in args.grid or ())
    if not given_image and (args.mask is not None or args.strength is not None):
        raise ConfigError("--mask and --strength are about a picture to begin from; name it with --image")
    if args.size is not None:
        if args.width is not None or args.height is not None:
            raise ConfigError("--size and --width or --height are both given; use one or the other")
        asked["height"], asked["width"] = args.size
    if args.prompt:
        asked["prompt"] = args.prompt
    if isinstance(args.seed, list):
        if args.num_images not in (None, len(args.seed)):
            raise ConfigError(f"--seed names {len(args.seed)} seeds, and --num-images {args.num_images}; leave one out")
        asked |= {"num_images": len(args.seed), "seed": args.seed * max(1, len(args.prompt))}
    elif asked.get("seed") is None:
        asked["seed"] = random.randrange(2**31)  # torch's own generator starts at the same place in every process
    words = [word for word in args.prompt if not any(c.isspace() for c in word)]
    if len(words) == len(args.prompt) > 2 and not args.quiet:
        together = " ".join(words)
        say(f'{len(words)} prompts, a picture of each; for one picture quote them: minidiff generate "{together}"')
    return asked


def _request(pipe: StableDiffusion | Unconditional, args: Namespace, asked: Mapping[str, Any]) -> Request:
    """Return the request for a model of either kind. Raises :class:`ConfigError` for what it does not take."""
    from minidiff import StableDiffusion

    request = Request(**{"prompt": None, "steps": pipe.own_steps(asked.get("sampler")), **asked})
    if isinstance(pipe, StableDiffusion):
        if request.prompt is None and args.estimate:  # a prompt of any length up to 75 tokens takes the same
            return replace(request, prompt="")
        if request.prompt is None:
            example = f'minidiff {args.command} "a red star on a blue background"'
            raise ConfigError(f"no prompt given; say what the picture shows: {example}")
        return request
    flags = {f.name: option.flag for f, option in options(Request)}
    for name in request.of_text():
        what = "a prompt" if name == "prompt" else flags[name] or "SDXL's sizes"
        raise ConfigError(f"{args.model}: a {pipe.config.family} model knows no text; it cannot take {what}")
    return request


def _changed(choice: Any, changes: list[tuple[str, Any]]) -> Any:
    """Return a choice of sampler with the changes of --set."""
    if not changes or choice is None:
        return choice
    return {**(choice if isinstance(choice, Mapping) else {"name": choice}), **dict(changes)}


def _check_sampler(choice: str | Mapping[str, Any] | None, like: str | None) -> None:
    """Raise :class:`ConfigError` for a wrong name or option before the model is opened."""
    from minidiff.config import ScheduleConfig
    from minidiff.programs import read

    program = read(like)
    if choice is not None:
        program.sampler(ScheduleConfig(), choice)


def _teach(pipe: StableDiffusion | Unconditional, args: Namespace) -> None:
    """Add the learned words and the adapters that were named."""
    if not (args.embedding or args.lora):
        return
    from minidiff import StableDiffusion
    from minidiff.adapters import lora, words
    from weights_convert import read_embedding, read_lora

    if not isinstance(pipe, StableDiffusion):
        raise ConfigError(
            f"{args.model}: a {pipe.config.family} model knows no text; it cannot take --embedding or --lora"
        )
    for path, name in args.embedding:
        words.add(pipe, read_embedding(path, pipe.config, name))
    adapters = [(read_lora(path, pipe.config, allow_unmatched=args.allow_unmatched), x) for path, x in args.lora]
    lora.apply(pipe.parts, adapters)
    for adapter, _ in adapters:
        if not args.quiet or adapter.unmatched:
            say(adapter)


def _controls(
    pipe: StableDiffusion | Unconditional,
    args: Namespace,
    wanted: Sequence[Named],
    models: dict[str, Any],
    *,
    equip: bool = False,
) -> list[Control]:
    """Open the controls that were named, but for the ``models`` that are open; ``equip``: make new ones fast."""
    from minidiff import StableDiffusion

    if wanted and not isinstance(pipe, StableDiffusion):
        raise ConfigError(f"{args.model}: a {pipe.config.family} model knows no text; it cannot take --control")
    before = set(models)
    found = open_controls(pipe, wanted, models, quiet=args.quiet) if isinstance(pipe, StableDiffusion) else []
    for path in models.keys() - before if equip else ():
        _equip(models[path], args, large(args.model))
    return found


def _equip(pipe: Model, args: Namespace, measure: bool) -> None:
    """Apply the speed-ups, unless the plain model is asked for, and what trades time for memory. ``measure``: try which
    the processor gains by, if that is not known."""
    from minidiff import fast
    from minidiff.pipeline import Pipeline

    options = {"vae_slices": args.vae_slices, "halves": args.split_guidance}
    wanted = tuple(name for name, given in options.items() if given)
    fast.optimize(pipe, wanted if args.plain else (*fast.SWITCHES, *wanted), trial=measure and not args.plain)
    if args.vae_tiles is not None and isinstance(pipe, Pipeline):
        fast.tiled(pipe, args.vae_tiles)


def _remark(
    pipe: StableDiffusion | Unconditional,
    args: Namespace,
    recipe: Recipe | None,
    made: Mapping[str, Any],
    converted: bool,
) -> None:
    """Say on stderr what was chosen, and what may surprise. ``made``: the recipe of this run."""
    from minidiff.cli.recipe import differences
    from minidiff.fast import machine

    precision = str(pipe.dtype).removeprefix("torch.")
    if converted and not args.quiet:
        say(f"converted in memory; `minidiff convert {args.model} FILE.safetensors` keeps it, and opens faster")
    if args.dtype == "auto" and not args.quiet:
        why = ": this processor is faster in it; --dtype float32 is more exact" if precision == "bfloat16" else ""
        say(f"computing in {precision} on {pipe.device} (--dtype auto{why if pipe.device.type == 'cpu' else ''})")
    hint = None if args.quiet else dialect_hint(made)
    if hint is not None:
        say(hint)
    advice = machine.crowded() if pipe.device.type == "cpu" and not args.quiet else None
    if advice is not None:
        say(advice)
    if precision == "float16" and pipe.device.type == "cpu":
        say("float16 on the CPU can be a thousand times slower; --dtype float32 is safe", "warning")
    for difference in differences(recipe, made, pipe, args) if recipe is not None else ():
        say(difference, "warning")


def dialect_hint(made: Mapping[str, Any]) -> str | None:
    """Return a hint for a prompt with signs that the program of ``--like`` gives a meaning, and that are plain here."""
    program = str(made.get("like", "")).partition(":")[0]
    prompts = f"{made.get('prompt')} {made.get('negative_prompt')}"
    if program not in PROMPT_STYLES or made.get("prompt_style") is not None or not SIGNS.search(prompts):
        return None
    return f"--like {program} leaves the prompt as it stands; --prompt-style {program} reads its brackets, too"
