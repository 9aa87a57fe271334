"""``minidiff generate``: pictures from a text, or from nothing with a model that reads none."""

from __future__ import annotations

import argparse
import os
import random
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.cli.controls import FORM, check_there, open_controls, read_control
from minidiff.cli.grid import checked, read_axis
from minidiff.cli.opening import device_of, dtype_of, large, open_model, parts_of, probed
from minidiff.cli.options import DTYPES, about, add_options, add_parts, add_set, given, sampler_list
from minidiff.console import say, show
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.request import PROMPT_STYLES, Request, options, read_number, read_size, read_whole
from minidiff.storage.reading import missing

if TYPE_CHECKING:
    from minidiff.adapters.control import Control
    from minidiff.pipeline import StableDiffusion, Unconditional
    from minidiff.pipeline.denoise import Run
    from minidiff.pipeline.model import Model
    from minidiff.pipeline.recipe import Recipe

# Options of other programs, and what is typed here.
ELSEWHERE = {
    "prompt": 'the text itself, without an option: minidiff generate "a fox"',
    **dict.fromkeys(("cfg", "cfg-scale", "guidance-scale"), "--scale"),
    **dict.fromkeys(("num-inference-steps", "ddim-steps", "sampling-steps"), "--steps"),
    **dict.fromkeys(("negative-prompt", "neg-prompt"), "--negative"),
    **dict.fromkeys(("ckpt", "checkpoint", "model-path", "pretrained-model-name-or-path"), "--model"),
    **dict.fromkeys(("init-img", "init-image", "img", "input-image"), "--image"),
    "denoising-strength": "--strength",
    **dict.fromkeys(("sampler-name", "sampling-method", "scheduler"), "--sampler"),
    "plms": "--sampler pndm",
    **dict.fromkeys(
        ("n-samples", "n-iter", "batch-size", "batch-count", "num-images-per-prompt", "-n"), "--num-images"
    ),
    **dict.fromkeys(("outdir", "output", "output-dir", "-o"), "--out"),
    "-W": "--width",
    "-H": "--height",
    "textual-inversion": "--embedding",
    **dict.fromkeys(("half", "fp16"), "--dtype float16"),
    "precision": "--dtype",
    "cpu": "--device cpu",
    "cuda": "--device cuda",
    "overwrite": "--force",
}
SIGNS = re.compile(r"[()\[\]]|\b(?:BREAK|AND)\b")  # that mean something in a1111 or comfyui
EXAMPLES = """\
examples:
  minidiff generate "a large red star on a blue background" --out star.png
  minidiff generate "a lighthouse at dawn" --model sd15.safetensors --seed 7
  minidiff generate "a fox" "an owl" --model ./stable-diffusion-v1-5 --num-images 4 --out pictures/
  minidiff generate --model sd15.safetensors --recipe lighthouse.png --steps 20
  minidiff generate "a fox" --model sd15.safetensors --num-images 4 --out "pictures/{prompt}-{seed}.jpg"
  minidiff generate --prompts prompts.txt --model sd15.safetensors --out pictures/
  minidiff generate "a <cat-toy> in ink" --model sd15.safetensors --embedding cat.safetensors --lora ink.safetensors=0.8
  minidiff generate "a castle" --model sd15.safetensors --control canny.safetensors=edges.png,0.8
  minidiff generate "in winter" --model sd15.safetensors --image lighthouse.png --strength 0.6
"""


def add(commands: Any) -> None:
    """Add the command with its options: those of a Request, and what only the command line has."""
    what = "make pictures from a text, or from nothing with a model that reads none"
    p = about(commands, "generate", what, EXAMPLES, " Their paths are printed, one a line.")
    p.late, p.elsewhere = sampler_list, ELSEWHERE
    p.add_argument("prompt", nargs="*", metavar="PROMPT", help="what the picture shows; several make several pictures")
    names = ("model", "picture", "from a picture", "sampling", "SDXL", "memory", "output")
    groups = {name: p.add_argument_group(name) for name in names}
    add_options(groups, Request)
    g = groups["model"]
    add_model(g)
    g.add_argument(
        "--plain",
        action="store_true",
        help="compute as diffusers does, to the last bit (default: the same sums in a faster order)",
    )
    g = groups["picture"]
    g.add_argument(
        "--prompts",
        metavar="FILE",
        help="many pictures: one prompt a line, or one JSON object with options, by their names in Python; --out is "
        "their folder, and an interrupted run goes on where it was",
    )
    g.add_argument(
        "--together",
        type=read_whole,
        metavar="N",
        help="of --prompts, make at most N pictures at once (default: as many as memory holds, up to 8)",
    )
    g.add_argument("--size", type=read_size, metavar="WxH", help="width and height in pixels, such as 768x512")
    g.add_argument(
        "--recipe",
        metavar="FILE",
        help="repeat a picture of minidiff, or what is understood of one of AUTOMATIC1111's or ComfyUI's; options "
        "given here take precedence",
    )
    add_set(groups["sampling"])
    g = groups["memory"]
    g.add_argument("--vae-slices", action="store_true", help="decode the pictures of a batch one by one")
    g.add_argument(
        "--vae-tiles",
        action="store_const",
        const=64,  # latents of a side
        help="decode pictures beyond 512 pixels in tiles; APPROXIMATE, colours shift",
    )
    g.add_argument(
        "--split-guidance",
        action="store_true",
        help="predict with and without the prompt in two calls, not in one batch (on a GPU: once that did not fit)",
    )
    add_output(groups["output"])
    add_views(groups["output"])


def add_model(g: Any) -> None:
    """Add the options that name a model, what is added to it, and where it runs."""
    g.add_argument(
        "--model",
        metavar="PATH",
        help="a minidiff file, or a checkpoint of another layout, converted in memory (default: the bundled model, "
        "which draws one or two coloured shapes)",
    )
    add_parts(g)
    g.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_weighted,
        metavar="FILE[=X]",
        help="apply an adapter (a file, or a folder with one) with strength X (default: 1); may be given several times",
    )
    g.add_argument(
        "--embedding",
        action="append",
        default=[],
        type=_named,
        metavar="FILE[=WORD]",
        help="add a learned word (textual inversion), by its own name or as WORD; may be given several times",
    )
    g.add_argument(
        "--control",
        action="append",
        default=[],
        type=read_control,
        metavar=FORM,
        help="steer by a ControlNet or T2I-Adapter and the picture that it reads, with a weight (default: 1) from LOW "
        "to HIGH of the way (default: 0,1); ,soft or ,guess behind it weigh its outputs by depth; may be given several "
        "times",
    )
    g.add_argument("--allow-unmatched", action="store_true", help="ignore LoRA keys that match no layer")
    g.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    g.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="precision of the computation (default: auto: on the CPU float32, or bfloat16 for a large model where it "
        "is faster; on a GPU as the checkpoint is stored)",
    )


def add_output(g: Any) -> None:
    """Add the options about the files that are written."""
    g.add_argument(
        "--out",
        metavar="PATH",
        help="a folder (a new one ends with /), or a file name ending in .png, .jpg or .webp; {prompt}, {seed} and "
        "{k}, the number of the picture, are filled in (default: {prompt}-{seed}.png in this folder)",
    )
    g.add_argument(
        "--force",
        action="store_true",
        help="replace a file of that name (of a link, the link) instead of adding a number",
    )
    g.add_argument(
        "--infotext", action="store_true", help="write the recipe as AUTOMATIC1111's text as well, for other programs"
    )
    g.add_argument(
        "--no-mark", action="store_true", help="leave out the note that a trained model made the picture (IPTC, XMP)"
    )
    g.add_argument("--quiet", action="store_true", help="no progress bar and no hints")


def add_views(g: Any) -> None:
    """Add the options that show a run beside its pictures."""
    g.add_argument(
        "--strip",
        action="store_true",
        help="write NAME-steps.png as well: the estimate of the picture and the noisy sample, at eight steps",
    )
    g.add_argument("--gif", action="store_true", help="write NAME.gif as well: the estimate of the picture as a film")
    g.add_argument("--apng", action="store_true", help="the same as NAME-film.png, with all colours")
    g.add_argument(
        "--grid",
        nargs="+",
        metavar="OPTION=X,Y",
        type=read_axis,
        help="make a picture of each value, side by side, and with a second option of each pair; | separates values "
        "with commas; the pictures are kept in NAME-cells/, and those there already are not made again",
    )
    g.add_argument("--preview", metavar="FILE", help="renew this picture of the run while it runs")
    g.add_argument(
        "--preview-vae",
        metavar="PATH",
        help="a TAESD that decodes the preview (default: colours fitted to the latents)",
    )


def run(args: Namespace) -> int | None:
    """Make the pictures and print their paths."""
    if args.prompts is not None:
        return _run_many(args)
    if args.together is not None:
        raise ConfigError("--together is about the lines of --prompts; for several pictures of a prompt: --num-images")
    for path in make(args):
        show(path)
    return None


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
        return Maker(pipe, lambda fields: _request(pipe, args, {**added, **fields}))

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
    # One run, text encoder to UNet to VAE: none is needed twice. Adapters change a model that is in memory, and a
    # preview needs the VAE in between.
    low_memory = not (args.lora or args.embedding or args.preview or args.grid)
    pipe, added, converted = _opened(args, choice, recipe, low_memory)
    if args.grid is not None:

        def start(changes: Mapping[str, Any]) -> Run:
            sampler = _changed(changes.get("sampler"), args.set) or added["sampler"]
            return pipe.run(_request(pipe, args, {**asked, **added, **changes, "sampler": sampler}))

        yield from grid.make(pipe, axes, start, args.out, args.force, not args.quiet, not args.no_mark)
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
    controls = _controls(pipe, args)
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
    if args.image is None and (args.mask is not None or args.strength is not None):
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
        if request.prompt is None:
            raise ConfigError(
                'no prompt given; say what the picture shows: minidiff generate "a red star on a blue background"'
            )
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


def _controls(pipe: StableDiffusion | Unconditional, args: Namespace) -> list[Control]:
    """Open the controls that were named."""
    from minidiff import StableDiffusion

    if args.control and not isinstance(pipe, StableDiffusion):
        raise ConfigError(f"{args.model}: a {pipe.config.family} model knows no text; it cannot take --control")
    return open_controls(pipe, args) if isinstance(pipe, StableDiffusion) else []


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


def _weighted(text: str) -> tuple[str, float]:
    path, strength = _file_and(text)
    if strength is None:
        return path, 1.0
    try:
        return path, read_number(strength)
    except argparse.ArgumentTypeError:
        if os.path.lexists(path):
            raise
        return text, 1.0  # a path that does not exist, which is said when it is read


def _named(text: str) -> tuple[str, str | None]:
    return _file_and(text)


def _file_and(text: str) -> tuple[str, str | None]:
    """Split ``FILE=VALUE`` at an "=": names of files may contain some, too.

    A path that exists as it stands is one, then the longest that does; if there is none, the last "=" counts.
    """
    if os.path.lexists(text) or "=" not in text:
        return text, None
    places = [i for i in reversed(range(len(text))) if text[i] == "="]
    at = next((i for i in places if os.path.lexists(text[:i])), places[0])
    return text[:at], text[at + 1 :]
