"""The ``minidiff`` command: ``generate``, ``info``, ``convert``, ``plan``, ``train`` and ``parity``.

The only module that knows every other one; each is imported by the function that needs it. stdout carries results alone
(paths, reports), stderr everything else.
"""

from __future__ import annotations

import os
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minidiff.cli.options import PARTS, arranged, chosen, parser
from minidiff.console import LONGEST_LINE, guard, open_standard_streams, say, show, show_json
from minidiff.errors import CheckpointError, ConfigError, MinidiffError
from minidiff.storage.reading import PICKLES, content, missing

if TYPE_CHECKING:
    import torch

    from minidiff.pipeline import StableDiffusion, Unconditional
    from minidiff.pipeline.denoise import Run
    from minidiff.pipeline.prompts import Sizes
    from minidiff.pipeline.recipe import Recipe

# Options of generate that mean nothing to a model without a text, beside those that are named with it.
TEXT_ONLY = (
    *("denoising_start", "denoising_end", "clip_skip", "prompt_2", "negative_2", "guidance_rescale"),
    *("guidance_interval", "original_size", "crop", "target_size", "score"),
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (without the program's name; by default the process's own); the exit status.

    0 is success, 2 a mistake in what was asked for, 1 another failure (or, of ``parity``, a difference), 130 Ctrl-C,
    143 SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    return guard(lambda: _run(argv), debug="--debug" in argv)


def command() -> NoReturn:
    """Entry point of the ``minidiff`` command: call :func:`main`, then end the process.

    One of several processes goes at once, without taking the interpreter apart. torch's caches of a sliced model keep
    gloo's threads alive beyond the process group, and one that lets go of its last tensor when there is no interpreter
    any more aborts the process (https://github.com/pytorch/pytorch/pull/179291): a finished training would have failed.
    """
    open_standard_streams()
    status = main()
    if "RANK" in os.environ:  # torchrun's; guard has flushed what was printed
        os._exit(status)
    sys.exit(status)


def _run(argv: list[str]) -> int | None:
    args = parser().parse_args(arranged(argv))
    if any("\0" in (getattr(args, name, None) or "") for name in ("out", "dst")):
        raise ConfigError("the name of what is to be written holds a null character, which no system takes")
    commands: dict[str, Callable[[Namespace], int | None]] = {
        "generate": generate,
        "info": info,
        "convert": convert,
        "plan": plan,
        "train": train,
        "parity": parity,
        "parity record": parity,
        "parity compare": parity,
    }
    if args.command is None:
        raise ConfigError(f"no command given; it is one of {', '.join(commands)} (`minidiff --help` says more)")
    return commands[args.command](args)


def generate(args: Namespace) -> None:
    """``minidiff generate``."""
    from minidiff.cli.output import Destination
    from minidiff.cli.repeat import TAUGHT, check_family, fill_from_recipe
    from minidiff.pipeline.picture import label, to_pil

    if args.image is None and (args.mask is not None or args.strength is not None):
        raise ConfigError("--mask and --strength are about a picture to begin from; name it with --image")
    if args.size is not None:
        if args.width is not None or args.height is not None:
            raise ConfigError("--size and --width or --height are both given; use one or the other")
        args.width, args.height = args.size
    for option in ("image", "mask", "recipe"):
        path = getattr(args, option)
        if path is not None and not os.path.exists(path):
            raise CheckpointError(f"--{option} {missing(path)}")
    recipe = None if args.recipe is None else fill_from_recipe(args)
    _count(args)
    destination = Destination(args.out, args.force)
    sampler = _sampler(_changed(args.sampler, args.set), args.like)
    device = _device(args.device)
    dtype = _probed(args.model, device) if args.dtype == "auto" else _dtype(args.dtype)
    # One run, text encoder to UNet to VAE: none is needed twice. Adapters bend a model that is there.
    turns = not (args.lora or args.embedding)
    pipe, converted = _open_model(
        args.model, device, dtype, sampler=_name(args.sampler), low_memory=turns, **_parts(args)
    )
    if args.set and args.sampler is None:  # of the checkpoint's own sampler, which is known only now
        sampler = _sampler(_changed(pipe.config.sampler, args.set), args.like)
    if recipe is not None:
        check_family(args, recipe, pipe)
    _teach(pipe, args)
    _equip(pipe, args)
    run = _prepare(pipe, args, sampler)
    for made in run.recipes:
        made |= {
            name: [[Path(path).name, how] for path, how in getattr(args, name)]
            for name in TAUGHT
            if getattr(args, name)
        }
        if args.dtype == "auto" and dtype is not None:  # not what Python would have taken
            made["dtype_chosen"] = "auto"
    _remark(pipe, args, recipe, converted)  # after the last check: a mistake is one line and no more
    pixels = pipe.finish(run, progress=not args.quiet)
    images = (label(image, made) for image, made in zip(to_pil(pixels), run.recipes, strict=True))
    for path in [destination.save(image) for image in images]:
        show(path)


def _count(args: Namespace) -> None:
    """Set the number of pictures and their seeds: a list of seeds gives one picture per prompt and seed."""
    if isinstance(args.seed, list):
        if args.num_images not in (None, len(args.seed)):
            raise ConfigError(f"--seed names {len(args.seed)} seeds, and --num-images {args.num_images}; leave one out")
        args.num_images, args.seed = len(args.seed), args.seed * max(1, len(args.prompt))
    elif args.seed is None:
        args.seed = random.randrange(2**31)  # torch's own generator starts at the same place in every process
    args.num_images = args.num_images or 1
    words = [word for word in args.prompt if not any(c.isspace() for c in word)]
    if len(words) == len(args.prompt) > 2 and not args.quiet:
        together = " ".join(words)
        say(f'{len(words)} prompts, a picture of each; for one picture quote them: minidiff generate "{together}"')


def _changed(choice: str | dict[str, Any] | None, changes: list[tuple[str, Any]]) -> str | dict[str, Any] | None:
    """A choice of sampler, with what --set changes of it."""
    if not changes or choice is None:
        return choice
    return {**(choice if isinstance(choice, dict) else {"name": choice}), **dict(changes)}


def _teach(pipe: StableDiffusion | Unconditional, args: Namespace) -> None:
    """Give the model the learned words and the adapters that were named."""
    if not (args.embedding or args.lora):
        return
    from minidiff import StableDiffusion
    from minidiff.adapters import lora
    from minidiff.adapters import words as embeddings
    from weights_convert import read_embedding, read_lora

    if not isinstance(pipe, StableDiffusion):
        raise ConfigError(
            f"{args.model}: a {pipe.config.family} model knows no text; it cannot take --embedding or --lora"
        )
    for path, name in args.embedding:
        embeddings.add(pipe, read_embedding(path, pipe.config, name))
    adapters = [(read_lora(path, pipe.config, allow_unmatched=args.allow_unmatched), x) for path, x in args.lora]
    lora.apply(pipe.parts, adapters)
    for adapter, _ in adapters:
        if not args.quiet or adapter.unmatched:
            say(adapter)


def _equip(pipe: StableDiffusion | Unconditional, args: Namespace) -> None:
    """Put on what makes it faster, unless the plain model is asked for, and what takes less memory and more time."""
    from minidiff import fast

    options = {"vae_slices": args.vae_slices, "halves": args.split_guidance}
    wanted = tuple(name for name, given in options.items() if given)
    fast.optimize(pipe, wanted if args.plain else (*fast.SWITCHES, *wanted))
    if args.vae_tiles is not None:
        fast.tiled(pipe, args.vae_tiles)


def _prepare(pipe: StableDiffusion | Unconditional, args: Namespace, sampler: Any) -> Run:
    """The run that was asked for, of a model of either kind. Raises :class:`ConfigError` for what it cannot do."""
    from minidiff import StableDiffusion

    if isinstance(pipe, StableDiffusion):
        if not args.prompt:
            raise ConfigError(
                'no prompt given; say what the picture shows: minidiff generate "a red star on a blue background"'
            )
        return pipe.steps(
            args.prompt,
            negative_prompt=args.negative,
            steps=50 if args.steps is None else args.steps,
            guidance_scale=args.scale,
            sampler=sampler,
            num_images=args.num_images,
            seed=args.seed,
            height=args.height,
            width=args.width,
            like=args.like,
            image=args.image,
            strength=args.strength,
            mask=args.mask,
            denoising_start=args.denoising_start,
            denoising_end=args.denoising_end,
            sizes=_sizes(args),
            clip_skip=args.clip_skip or 0,
            prompt_2=args.prompt_2,
            negative_prompt_2=args.negative_2,
            guidance_rescale=args.guidance_rescale or 0.0,
            guidance_interval=args.guidance_interval,
        )
    for option in ("prompt", "negative", "scale", "width", "height", "like", "image", *TEXT_ONLY):
        if getattr(args, option) not in (None, []):
            what = "a prompt" if option == "prompt" else f"--{option.replace('_', '-')}"
            raise ConfigError(f"{args.model}: a {pipe.config.family} model knows no text; it cannot take {what}")
    return pipe.steps(args.num_images, steps=args.steps, sampler=sampler, seed=args.seed)


def _sizes(args: Namespace) -> Sizes | None:
    """Return SDXL's picture sizes as (height, width) and (top, left), while the options have them the other way
    round. None where nothing is said."""
    from minidiff import Sizes

    given = {"original": args.original_size, "crop": args.crop, "target": args.target_size}
    said: dict[str, Any] = {name: pair[::-1] for name, pair in given.items() if pair is not None}
    if args.score is not None:
        said["score"] = args.score
    return Sizes(**said) if said else None


def _remark(pipe: StableDiffusion | Unconditional, args: Namespace, recipe: Recipe | None, converted: bool) -> None:
    """Say on stderr what was chosen, and what may surprise."""
    from minidiff.cli.repeat import differences

    precision = str(pipe.dtype).removeprefix("torch.")
    if converted and not args.quiet:
        say(f"converted in memory; `minidiff convert {args.model} FILE.safetensors` keeps it, and opens faster")
    if args.dtype == "auto" and not args.quiet:
        why = ": this processor is faster in it; --dtype float32 is more exact" if precision == "bfloat16" else ""
        say(f"computing in {precision} on {pipe.device} (--dtype auto{why if pipe.device.type == 'cpu' else ''})")
    if precision == "float16" and pipe.device.type == "cpu":
        say("float16 on the CPU can be a thousand times slower; --dtype float32 is safe", "warning")
    for difference in differences(recipe, pipe) if recipe is not None else ():
        say(difference, "warning")


def _sampler(choice: str | dict[str, Any] | None, like: str | None) -> Any:
    """A sampler by name or from a recipe; made before the model is opened, so that a wrong name fails at once. Another
    program's needs the model's schedule: it is checked, and stays a choice."""
    from minidiff.samplers import sampler_from_config

    if like is not None:
        from minidiff.programs import checked

        return checked(like, choice)
    if choice is None:
        return None
    return sampler_from_config({"name": choice} if isinstance(choice, str) else choice)


def _name(choice: str | dict[str, Any] | None) -> str | None:
    """The name of a sampler that was chosen."""
    return str(choice["name"]) if isinstance(choice, dict) else choice


def _device(name: str | None) -> torch.device | None:
    """The device by that name. Raises :class:`ConfigError` if there is none."""
    if name is None:
        return None
    import torch

    usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    usable += ["mps"] * torch.backends.mps.is_available()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not {name, f"{device.type}:{device.index or 0}"} & set(usable):
        raise ConfigError(f"--device {name}: there is no such device here; use one of {', '.join(usable)}")
    return device


def _dtype(name: str | None) -> torch.dtype | None:
    """The dtype by that name; None for "auto" and none."""
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return dtypes.get(name or "auto")


def _probed(path: str | None, device: torch.device | None) -> torch.dtype | None:
    """Return the dtype of --dtype auto, if it is not the library's default: bfloat16, for a large model on
    a CPU that is faster in it."""
    import torch

    if path is None or (torch.cuda.is_available() if device is None else device.type != "cpu"):
        return None
    from minidiff.fast import probe

    found = probe.choice(probe.size_on_disk(path))
    return None if found == torch.float32 else found


def _parts(args: Namespace) -> dict[str, Any]:
    """The options that choose weights, a variant and parts from elsewhere, and say what the model predicts."""
    swap = {part: getattr(args, part) for part in PARTS if getattr(args, part) is not None}
    return {"variant": args.variant, "swap": swap, "prediction": args.prediction}


def _open_model(
    path: str | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
    *,
    variant: str | None = None,
    swap: dict[str, str] | None = None,
    prediction: str | None = None,
    sampler: str | None = None,
    low_memory: bool = False,
) -> tuple[StableDiffusion | Unconditional, bool]:
    """A pipeline from any file or folder that minidiff or weights_convert knows, and whether it was converted.

    Without a path it is the bundled one. ``sampler``: what the run uses, for a file that says of none. ``low_memory``:
    its parts take turns.
    """
    import minidiff

    corrected = bool(swap) or variant is not None or prediction is not None
    if path is None:
        if corrected:
            raise ConfigError(
                "parts from elsewhere, --variant and --prediction need --model PATH; the bundled model is of a piece"
            )
        return minidiff.bundled(device, dtype, low_memory=low_memory), False
    own = _is_minidiff(path)
    if own and not corrected:
        return minidiff.load(path, device, dtype, low_memory=low_memory), False
    import weights_convert

    options: dict[str, Any] = {"variant": variant, "swap": swap, "prediction": prediction, "sampler": sampler}
    return weights_convert.load(path, device=device, dtype=dtype, low_memory=low_memory, **options), not own


def _is_minidiff(path: str) -> bool:
    """Return True for a file in minidiff's own layout. Raises :class:`CheckpointError` for a missing path."""
    from minidiff.storage.checkpoint import is_minidiff
    from minidiff.storage.files import TensorFile

    if not os.path.exists(path):
        raise CheckpointError(missing(path, "file or folder"))
    if os.path.isdir(path) or content(path) in PICKLES:
        return False
    file = TensorFile(path)
    try:
        return is_minidiff(file.metadata)
    finally:
        file.close()


def info(args: Namespace) -> None:
    """``minidiff info``."""
    path = args.path
    kind = content(path) if os.path.exists(path) and not os.path.isdir(path) else None
    if kind == "png" or (kind == "?" and path.lower().endswith(".png")):
        from minidiff import read_recipe

        show_json(read_recipe(path))
        return
    if _is_minidiff(path):
        from minidiff.cli.info import check_tensors, describe

        show(describe(path), longest=LONGEST_LINE)
        if args.check:
            show("\n" + check_tensors(path))
        return
    _info_of_another_layout(path, args.check)


def _info_of_another_layout(path: str, check: bool) -> None:
    """Print what weights_convert finds in a file or folder: the evidence, the tensors it maps and drops, the model."""
    import weights_convert
    from minidiff.cli.info import describe_config, first_not_finite, size_table, table
    from minidiff.storage.identity import identify

    found = weights_convert.detect(path)
    try:
        source = weights_convert.open_source(path)
    except MinidiffError:
        show(found, longest=LONGEST_LINE)  # what is recognised is worth knowing, even where more is needed to use it
        raise
    rows = [*describe_config(source.config)[1:], ("identity", identify(source.config, source.tensors))]
    pages = (source.report, table(rows), size_table(source.tensors))
    show("\n\n".join(map(str, pages)), longest=LONGEST_LINE)
    bad = first_not_finite(source.tensors) if check else None
    if bad is not None:
        raise CheckpointError(f"{path}: tensor {bad[0]!r} holds {bad[1]}; get the checkpoint again")
    if check:
        show(f"\nchecked: all {len(source.tensors):,} tensors are finite (this layout carries no hash)")


def convert(args: Namespace) -> None:
    """``minidiff convert``."""
    if not os.path.exists(args.src):
        raise CheckpointError(missing(Path(args.src), "file or folder"))
    import weights_convert
    from weights_convert.conversion import check_name

    check_name(args.dst, args.to)
    report = weights_convert.convert(
        args.src,
        args.dst,
        to=args.to,
        dtype=_dtype(args.dtype),
        ema=args.ema,
        config=args.config,
        sampler=chosen(args),
        sharded=args.sharded,
        existing="replace" if args.force else "refuse",
        **_parts(args),
    )
    show(report, longest=LONGEST_LINE)


def plan(args: Namespace) -> None:
    """``minidiff plan``."""
    from minidiff.config import ScheduleConfig
    from minidiff.samplers import sampler_from_config
    from minidiff.schedule import NoiseSchedule

    config: dict[str, Any] = {"name": "pndm"}
    schedule = ScheduleConfig()
    if args.model is not None:
        import weights_convert

        found = weights_convert.open_source(args.model, prediction=args.prediction, sampler=args.sampler).config
        config, schedule = found.sampler, found.schedule
    if args.sampler is not None:
        config = {"name": args.sampler}
    if args.like is not None:
        from minidiff.programs.table import plans

        show(plans(args.like.split(","), schedule, {"name": config["name"], **dict(args.set)}, args.steps))
        return
    show(sampler_from_config({**config, **dict(args.set)}).plan(NoiseSchedule.from_config(schedule), args.steps))


def train(args: Namespace) -> None:
    """``minidiff train``."""
    if args.model is not None and args.config is not None:
        raise ConfigError("--model and --config are both given; a run begins with one or the other")
    import torch

    from minidiff.training.command import run

    device = _device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    assert device is not None
    path = run(args, lambda path: _open_model(path, device, torch.float32)[0], device)
    if path is not None:
        show(path)


def parity(args: Namespace) -> int:
    """``minidiff parity``, ``parity record`` and ``parity compare``."""
    import weights_convert
    from minidiff.parity.command import Converter, run
    from weights_convert.module_names import module_names

    converter = Converter(
        lambda *what: _open_model(*what)[0],
        module_names,
        lambda src, dst: weights_convert.convert(src, dst, to="diffusers"),
    )
    return run(args, converter, _device(getattr(args, "device", "cpu")))
