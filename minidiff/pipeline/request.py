"""Request of a run: the one list of options.

Every field of :class:`Request` says all there is to know about an option: its default, one line of help, its flag on
the command line, the rule that its values follow, whether only models that read a prompt take it, and its form in a
recipe.
``generate`` and ``steps`` take the fields as arguments (:func:`asking`), the command line adds its options in a loop
over them, and recipes are written and read by them. A new option is one field here, and the line that uses it.

Nothing here imports PyTorch: ``minidiff --help`` reads this list.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import math
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast

from minidiff.config import check, one_of, quote

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.adapters.control import Control
    from minidiff.noise import Generators
    from minidiff.pipeline.denoise import Progress
    from minidiff.pipeline.images import Picture
    from minidiff.programs import Program
    from minidiff.samplers.method import Sampler

Text = str | Sequence[str]
Seed = int | Sequence[int]
Output = Literal["pil", "tensor", "latent"]

PROMPT_STYLES = ("a1111", "comfyui", "compel", "sd_embed")  # of minidiff.pipeline.dialects
MOST = 10**9  # pictures of a run; pixels of a side


# --- an option -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option, beside its name, type and default.

    ``help``: one line, on the command line and in the documentation, which continues with ``more``. ``flag``,
    ``metavar`` and ``read`` (text to value; raises argparse.ArgumentTypeError): the command line's option, if there is
    one, in the section ``group``. ``rule``: called with name and value; raises :class:`ConfigError`. ``text``: only
    models that read a prompt take it. ``kept``: type of the value in a recipe's JSON; None if recipes leave it out.
    ``always``: kept also with its default value. ``record``: a dataclass of further options, which stand on the
    command line in its place.
    """

    help: str
    more: str = ""
    flag: str = ""
    metavar: str = ""
    read: Callable[[str], Any] = str
    group: str = "sampling"
    rule: Callable[[str, Any], None] | None = None
    text: bool = True
    kept: Any = None
    always: bool = False
    record: Any = None


def ask(default: Any, help: str, more: str = "", **others: Any) -> Any:
    """Return a dataclass field with an :class:`Option`; ``default``: dataclasses.MISSING for one that must be given."""
    return field(default=default, metadata={"option": Option(help, more, **others)})


def options(record: type) -> Iterator[tuple[dataclasses.Field[Any], Option]]:
    """Yield the fields of a dataclass that were made by :func:`ask`, with their options."""
    for f in dataclasses.fields(record):
        if "option" in f.metadata:
            yield f, f.metadata["option"]


# --- rules -----------------------------------------------------------------------------------------------------------


def finite(name: str, value: Any) -> float:
    """Return a number as a float. Raises :class:`ConfigError` for anything else, NaN and infinity included."""
    check(isinstance(value, numbers.Real) and math.isfinite(value), f"{name}={value!r} must be a finite number")
    return float(value)


def between(low: float, high: float) -> Callable[[str, Any], None]:
    """Rule: a number in ``low``..``high``."""

    def rule(name: str, value: Any) -> None:
        check(low <= finite(name, value) <= high, f"{name}={value} must lie in {low:g}..{high:g}")

    return rule


def fraction(name: str, value: Any) -> None:
    """Rule: a number between 0 and 1, neither of them."""
    check(0 < finite(name, value) < 1, f"{name}={value} must lie between 0 and 1")


def number(name: str, value: Any) -> None:
    """Rule: a finite number."""
    finite(name, value)


def count(name: str, value: Any) -> None:
    """Rule: a whole number, at least 1."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    check(whole and value >= 1, f"{name}={quote(value)} must be a whole number, at least 1")
    check(value < MOST, f"{name} must be below {MOST:,}")


def side(name: str, value: Any) -> None:
    """Rule: a whole number of pixels."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    check(whole, f"{name}={quote(value)} must be a whole number of pixels")
    check(value < MOST, f"{name} must be below {MOST:,} pixels")


def interval(name: str, value: Any) -> None:
    """Rule: two numbers (low, high) with 0 <= low < high <= 1."""
    fits = isinstance(value, (tuple, list)) and len(value) == 2
    check(fits, f"{name}={value!r} must be two numbers, such as (0.2, 0.9)")
    low, high = (finite(name, v) for v in value)
    check(0 <= low < high <= 1, f"{name}={value!r} must be (low, high) with 0 <= low < high <= 1")


def texts(name: str, value: Any) -> None:
    """Rule: a text or a list of at least one."""
    check(isinstance(value, (str, Sequence)), f"{name} must be text or a list of texts, got {value!r}")
    check(len(value) > 0 or isinstance(value, str), f"{name} is an empty list; give at least one text")
    for one in () if isinstance(value, str) else value:
        check(isinstance(one, str), f"{name} must be text, got {one!r}")


def output_kind(name: str, value: Any) -> None:
    """Rule: one of the kinds of :data:`Output`."""
    one_of(("pil", "tensor", "latent"), **{name: value})


def steering(name: str, value: Any) -> None:
    """Rule: a list of :class:`minidiff.Control`."""
    many = isinstance(value, (list, tuple)) and all(hasattr(one, "model") and hasattr(one, "picture") for one in value)
    check(many, f"{name} must be a list of controls, [minidiff.Control(model, picture), ...]; got {quote(type(value))}")


def prompt_style(name: str, value: Any) -> None:
    """Rule: one of :data:`PROMPT_STYLES`."""
    one_of(PROMPT_STYLES, **{name: value})


def shown(name: str, value: Any) -> None:
    """Rule: True, False, None or a function."""
    fits = value is None or isinstance(value, bool) or callable(value)
    check(fits, f"{name}={value!r} must be True, False, None (a bar on a terminal only) or a function")


# --- values from the command line ------------------------------------------------------------------------------------


def read_whole(text: str) -> int:
    """Read a whole number, 1 or more."""
    value = int(text) if re.fullmatch(r"[+-]?\d+", text) else None
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number, 1 or more")
    return value


def read_count(text: str) -> int:
    """Read a whole number, 0 or more."""
    return 0 if text == "0" else read_whole(text)


def read_number(text: str) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number")
    return value


def read_seed(text: str) -> int:
    """Read a seed, 0 or more."""
    if not re.fullmatch(r"\+?[0-9]{1,20}", text) or int(text) >= 2**64:
        # other programs read -1 as a random seed
        fresh = "a whole number from 0 to 2**64 - 1; without --seed each run draws a fresh one"
        raise argparse.ArgumentTypeError(f"{text!r} should be {fresh}")
    return int(text)


def read_seeds(text: str) -> int | list[int]:
    """Read a seed, or several separated by commas."""
    return [read_seed(part.strip()) for part in text.split(",")] if "," in text else read_seed(text)


def read_interval(text: str) -> tuple[float, float]:
    """Read ``LOW,HIGH``."""
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"{text!r} should be LOW,HIGH, such as 0.2,0.9")
    return read_number(low), read_number(high)


def read_size(text: str) -> tuple[int, int]:
    """Read ``WIDTHxHEIGHT`` as (height, width)."""
    found = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} should be WIDTHxHEIGHT, such as 768x512")
    return int(found[2]), int(found[1])


def read_place(text: str) -> tuple[int, int]:
    """Read ``X,Y`` as (top, left)."""
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} should be X,Y, such as 0,128")
    return int(found[2]), int(found[1])


# --- the request -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Picture sizes for SDXL: (height, width) in pixels before training resized it, (top, left) of the crop,
    (height, width) that is wanted; for the refiner ``score``, 0 to 10, in place of the last. None: the picture's own
    size, or the score of the reference: 6, and 2.5 beside the negative prompt."""

    original: tuple[float, float] | None = ask(
        None,
        "the size that the picture had before training resized it (default: its own)",
        flag="--original-size",
        metavar="WxH",
        read=read_size,
        group="SDXL",
    )
    crop: tuple[float, float] = ask(
        (0, 0),
        "where it was cropped, at left and top (default: 0,0)",
        flag="--crop",
        metavar="X,Y",
        read=read_place,
        group="SDXL",
    )
    target: tuple[float, float] | None = ask(
        None,
        "the size that is wanted (default: its own)",
        flag="--target-size",
        metavar="WxH",
        read=read_size,
        group="SDXL",
    )
    score: float | None = ask(
        None,
        "aesthetic score for the refiner, 0 to 10 (default: 6)",
        flag="--score",
        metavar="X",
        read=read_number,
        group="SDXL",
    )

    def __post_init__(self) -> None:
        for name in ("original", "crop", "target"):
            pair = getattr(self, name)
            fits = pair is None or (isinstance(pair, Sequence) and len(pair) == 2 and all(map(_real, pair)))
            check(fits, f"sizes: {name}={pair!r} must be two numbers")
        check(self.score is None or _real(self.score), f"sizes: score={self.score!r} must be a number")


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Request:
    """Everything that can be asked of a run, with the arguments of :meth:`minidiff.StableDiffusion.generate`.

    Raises :class:`ConfigError` for values that break a rule, or do not go together.
    """

    prompt: Text | None = ask(
        dataclasses.MISSING,
        "what the picture shows: one text or several",
        "None if ``prompt_embeds`` is given.",
        rule=texts,
        kept=str,
        always=True,
    )
    negative_prompt: Text | None = ask(
        None,
        "what the picture should not show (default: nothing)",
        "None is the empty text or, for a model trained that way (SDXL base), zeros in place of a text.",
        flag="--negative",
        metavar="TEXT",
        group="picture",
        rule=texts,
        kept=str,
        always=True,
    )
    steps: int = ask(
        50,
        "number of denoising steps; more take longer (default: 50; DDPM: all there are)",
        flag="--steps",
        metavar="N",
        read=read_whole,
        text=False,
        kept=int,
        always=True,
    )
    guidance_scale: float | None = ask(
        None,
        "strength of the prompt; 1 is no guidance (default: 7.5; the bundled model's 2)",
        "1 is the plain conditional prediction, at half the cost; 0 ignores the prompt. Few-step models such as "
        "SDXL-Turbo need 1, which corresponds to 0 in diffusers.",
        flag="--scale",
        metavar="X",
        read=read_number,
        rule=number,
        kept=float,
        always=True,
    )
    sampler: str | Mapping[str, Any] | Sampler[Any, Any] | None = ask(
        None,
        "one of those listed below (default: the checkpoint's own)",
        'A name from ``SAMPLERS``, {"name": ..., options}, or a Sampler.',
        flag="--sampler",
        metavar="NAME",
        text=False,
        kept=dict[str, Any],
        always=True,
    )
    num_images: int = ask(
        1,
        "pictures of each prompt (default: 1)",
        flag="--num-images",
        metavar="N",
        read=read_whole,
        group="picture",
        rule=count,
        text=False,
    )
    seed: Seed | None = ask(
        None,
        "image k is drawn from seed N + k; 3,8,9: one picture of each prompt from each (default: a random one)",
        "Image k draws from ``Generator().manual_seed(seed + k)``; a list gives one seed per image.",
        flag="--seed",
        metavar="N",
        read=read_seeds,
        group="picture",
        text=False,
        kept=int,
        always=True,
    )
    generator: Generators | None = ask(
        None,
        "source of the noise in place of a seed",
        "One for the whole batch, as in diffusers, or a list with one per image.",
        text=False,
    )
    height: int | None = ask(
        None,
        "in pixels, divisible by 8 (default: that of --image or --control, or of training)",
        flag="--height",
        metavar="N",
        read=read_whole,
        group="picture",
        rule=side,
        kept=int,
        always=True,
    )
    width: int | None = ask(
        None,
        "in pixels, divisible by 8 (default: that of --image or --control, or of training)",
        flag="--width",
        metavar="N",
        read=read_whole,
        group="picture",
        rule=side,
        kept=int,
        always=True,
    )
    latents: Tensor | None = ask(None, "initial noise of unit variance, (B, C, height / 8, width / 8)", text=False)
    prompt_embeds: Tensor | None = ask(None, "encoded prompts, (P, 77, context_dim), in place of ``prompt``")
    negative_prompt_embeds: Tensor | None = ask(None, "the same for the negative prompt")
    output: Output = ask(
        "pil",
        "what generate returns",
        '"pil": a list of PIL images that carry their recipe; "tensor": float (B, 3, H, W) in [0, 1]; "latent": '
        "(B, C, h, w).",
        rule=output_kind,
        text=False,
    )
    progress: Progress = ask(
        None,
        "progress display",
        "None: a bar on a terminal or in a notebook, nothing elsewhere; True: elsewhere a line now and then; False: "
        "nothing; a function is called with each :class:`Step`.",
        rule=shown,
        text=False,
    )
    _: KW_ONLY
    image: Picture | None = ask(
        None,
        "start from this picture, not from noise alone",
        "A path, a PIL image, a list of these, a tensor (N, 3, H, W) in [0, 1], or latents (N, C, h, w). PIL images "
        "are resized with Lanczos, tensors with nearest neighbour.",
        flag="--image",
        metavar="FILE",
        group="from a picture",
    )
    strength: float | None = ask(
        None,
        "how much of it may change, from 0 to 1 (default: 0.8, with --mask 1)",
        "Noise is added to the picture, and the last int(steps * strength) steps are run.",
        flag="--strength",
        metavar="X",
        read=read_number,
        group="from a picture",
        rule=between(0, 1),
        kept=float,
    )
    mask: Picture | None = ask(
        None,
        "repaint only where this picture is white; of the size of --image",
        "Inpainting: 0.5 and above is repainted, the rest is kept.",
        flag="--mask",
        metavar="FILE",
        group="from a picture",
    )
    controls: Sequence[Control] | None = ask(
        None,
        "networks that steer the run by a picture of their own: ControlNets, T2I-Adapters",
        "A list of :class:`minidiff.Control`.",
        rule=steering,
    )
    denoising_start: float | None = ask(
        None,
        "go on from --image at this fraction of the way, between 0 and 1, as SDXL's refiner does",
        "``image`` is latents that another model stopped at with ``denoising_end``.",
        flag="--denoising-start",
        metavar="X",
        read=read_number,
        rule=fraction,
        kept=float,
    )
    denoising_end: float | None = ask(
        None,
        "stop at this fraction of the way from noise to picture, between 0 and 1",
        flag="--denoising-end",
        metavar="X",
        read=read_number,
        rule=fraction,
        kept=float,
    )
    sizes: Sizes | None = ask(None, "the picture sizes that condition SDXL", kept=Sizes, record=Sizes)
    negative_sizes: Sizes | None = ask(None, "the same beside the negative prompt", kept=Sizes)
    pooled_prompt_embeds: Tensor | None = ask(None, "pooled texts, (P, D'), that go with ``prompt_embeds`` for SDXL")
    negative_pooled_prompt_embeds: Tensor | None = ask(None, "the same for the negative prompt")
    clip_skip: int = ask(
        0,
        "encode the prompt with N layers of the text encoder fewer (default: 0)",
        "The negative prompt is encoded in full, as in diffusers.",
        flag="--clip-skip",
        metavar="N",
        read=read_count,
        kept=int,
    )
    like: str | Program | None = ask(
        None,
        "reproduce another program: diffusers, ldm, k-diffusion, a1111, comfyui, comfyui:karras",
        "Its noise levels, its noise and its rule for guidance (:mod:`minidiff.programs`). Explicit arguments take "
        "precedence.",
        flag="--like",
        metavar="PROGRAM",
        kept=str,
    )
    prompt_style: str | None = ask(
        None,
        "read prompts as another program does, (word:1.3) and all: a1111, comfyui, compel, sd_embed",
        "Their brackets and long texts (:mod:`minidiff.pipeline.dialects`). None: as they stand, up to 77 tokens. The "
        "negative prompt is read in the same way, with ``clip_skip``.",
        flag="--prompt-style",
        metavar="NAME",
        rule=prompt_style,
        kept=str,
    )
    prompt_2: Text | None = ask(
        None,
        "text for SDXL's second text encoder (default: the prompt)",
        "One for each prompt, or one for all.",
        flag="--prompt-2",
        metavar="TEXT",
        group="SDXL",
        rule=texts,
        kept=str,
    )
    negative_prompt_2: Text | None = ask(
        None,
        "negative prompt for the second text encoder (default: the negative prompt)",
        flag="--negative-2",
        metavar="TEXT",
        group="SDXL",
        rule=texts,
        kept=str,
    )
    guidance_rescale: float = ask(
        0.0,
        "reduce the overexposure of a high --scale, from 0 to 1 (default: 0; 0.7 is usual)",
        "Lin et al. 2023, section 3.4.",
        flag="--guidance-rescale",
        metavar="X",
        read=read_number,
        rule=between(0, 1),
        kept=float,
    )
    guidance_interval: Sequence[float] | None = ask(
        None,
        "guide only between these fractions of the way, 0 to 1; the rest takes half as long (default: 0,1)",
        "Outside, only the conditional prediction is computed (Kynkäänniemi et al. 2024): another picture, not the "
        "same one sooner. On Stable Diffusion's schedule the paper's interval for SDXL, sigma 5.42 to 0.28, is "
        "(0.19, 0.93).",
        flag="--guidance-interval",
        metavar="LOW,HIGH",
        read=read_interval,
        rule=interval,
        kept=tuple[float, float],
    )

    def __post_init__(self) -> None:
        for f, option in options(type(self)):
            value = getattr(self, f.name)
            if option.rule is not None and not (value is None and _default(f) is None):
                option.rule(f.name, value)

    def check_together(self) -> None:
        """Raise :class:`ConfigError` for options that do not go together."""
        start, end, given = self.denoising_start, self.denoising_end, self.image is not None
        check(start is None or end is None or start < end, f"denoising_start={start} is not before denoising_end={end}")
        check(start is None or given, "denoising_start needs an image: the latents to go on from")
        check(self.mask is None or given, "a mask needs an image whose part it covers, and image is None")

    @property
    def taken_strength(self) -> float:
        """Value of ``strength``, by default 0.8, and 1 with a mask, as in the reference's inpainting pipelines (1 for
        Stable Diffusion, 0.9999 for SDXL)."""
        return self.strength if self.strength is not None else 0.8 if self.mask is None else 1.0

    def of_text(self) -> list[str]:
        """Return the names of given options that only models with text take."""
        return [f.name for f, option in options(type(self)) if option.text and self.gives(f)]

    def gives(self, f: dataclasses.Field[Any]) -> bool:
        """Return True if the value of field ``f`` is not its default."""
        value, default = getattr(self, f.name), _default(f)
        # tensors are compared by identity: their == is no truth value
        return value is not default and not (isinstance(value, (int, float, str)) and value == default)


def _default(f: dataclasses.Field[Any]) -> Any:
    return None if f.default is dataclasses.MISSING else f.default


# --- a request as the arguments of a method --------------------------------------------------------------------------

P = ParamSpec("P")
Owner = TypeVar("Owner")
Result = TypeVar("Result")


def asking(
    record: Callable[P, Request], without: tuple[str, ...] = ()
) -> Callable[[Callable[[Owner, Request], Result]], Callable[Concatenate[Owner, P], Result]]:
    """Decorator: turn a method that takes a Request into one that takes its fields as arguments (PEP 612).

    A Request that is ready is accepted in their place, with changes as keyword arguments. ``without``: fields that the
    method does not take. The fields' help becomes part of the docstring.
    """
    kind = record if isinstance(record, type) else Request
    taken = {f.name: (f, option) for f, option in options(kind) if f.name not in without}

    def decorate(method: Callable[[Owner, Request], Result]) -> Callable[Concatenate[Owner, P], Result]:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **given: Any) -> Any:
            unknown = next((name for name in given if name not in taken), None)
            if unknown is not None:
                raise TypeError(f"{method.__name__}() got an unexpected keyword argument {unknown!r}")
            if args and isinstance(args[0], Request):
                check(len(args) == 1, f"{method.__name__}: a Request and {len(args) - 1} more; name what changes in it")
                return method(self, replace(args[0], **given))
            return method(self, record(*args, **given))

        own = next(iter(inspect.signature(method).parameters.values()))
        fields = [p for p in inspect.signature(kind).parameters.values() if p.name in taken]
        returned = inspect.signature(method).return_annotation
        call.__signature__ = inspect.Signature([own, *fields], return_annotation=returned)  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.cleandoc(method.__doc__ or '')}\n\n{documentation(taken)}"
        return cast(Callable[Concatenate[Owner, P], Result], call)

    return decorate


def documentation(taken: Mapping[str, tuple[dataclasses.Field[Any], Option]]) -> str:
    """Return the options as a list for a docstring, one paragraph each."""
    lines = []
    for name, (_, option) in taken.items():
        help = re.sub(r"--([a-z-]+)", lambda m: f"``{m[1].replace('-', '_')}``", option.help)
        end = "" if help.endswith(".") else "."
        lines.append(f"``{name}``: {help}{end}{' ' + option.more if option.more else ''}")
    return "\n".join(lines)


def check_sides(factor: int, height: int | None, width: int | None) -> None:
    """Raise :class:`ConfigError` unless ``factor`` divides the sides that are given."""
    wrong = {name: v for name, v in (("height", height), ("width", width)) if v is not None and (v <= 0 or v % factor)}
    around = [max(1, v // factor + up) * factor for v in wrong.values() for up in (0, 1)]
    named, nearest = (
        " and ".join(map(str, x)) for x in ((f"{k}={quote(v)}" for k, v in wrong.items()), sorted({*around}))
    )
    check(not wrong, f"{named} {'are' if len(wrong) > 1 else 'is'} not divisible by {factor}; the nearest: {nearest}")


def basename(picture: Any) -> str | None:
    """Return the file name without its folder; None for a picture that is not given as a path."""
    return os.path.basename(picture) if isinstance(picture, (str, os.PathLike)) else None
