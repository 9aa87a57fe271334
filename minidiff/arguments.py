"""The grammar of the command line: every option with its help, and nothing else.

It is read before anything heavy is imported, so that ``--help`` and a misspelt option answer at once. Defaults that a
picture's recipe may fill are None here.
"""

from __future__ import annotations

import argparse
import math
import re
from typing import Any

from minidiff.console import Parser
from minidiff.version import VERSION

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("minidiff", "diffusers", "original")

GENERATE_EXAMPLES = """\
examples:
  minidiff generate "a lighthouse at dawn" --model sd15.safetensors --seed 7
  minidiff generate "a fox" "an owl" --model ./stable-diffusion-v1-5 --num-images 4 --out pictures/
  minidiff generate --model sd15.safetensors --recipe lighthouse.png --steps 20
"""
INFO_EXAMPLES = """\
examples:
  minidiff info sd15.safetensors --check
  minidiff info picture.png
"""
CONVERT_EXAMPLES = """\
examples:
  minidiff convert ./stable-diffusion-v1-5 sd15.safetensors --dtype float16
  minidiff convert v1-5-pruned.ckpt sd15.safetensors --ema
"""


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = Parser(prog="minidiff", description="Stable Diffusion in pure PyTorch: pictures from text, on your machine.")
    top.add_argument("--version", action="version", version=f"minidiff {VERSION}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    top.epilog = "`minidiff COMMAND --help` explains a command."
    _add_generate(commands)
    _add_info(commands)
    _add_convert(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _add_generate(commands: Any) -> None:
    about = "make pictures from a text, or from nothing with a model that knows no text"
    p = commands.add_parser(
        "generate",
        help=about,
        description=f"{about[0].upper()}{about[1:]}. Their paths are printed, one a line.",
        epilog=GENERATE_EXAMPLES,
    )
    p.late = _samplers
    p.add_argument("prompt", nargs="*", metavar="PROMPT", help="what the picture shows; several make several pictures")
    g = p.add_argument_group("model")
    g.add_argument(
        "--model", metavar="PATH", help="a minidiff file, or a checkpoint of another layout (converted in memory)"
    )
    g.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    g.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="what to compute in (default: auto: float32 on the CPU, on a GPU as the checkpoint is stored)",
    )
    g = p.add_argument_group("picture")
    g.add_argument("--negative", metavar="TEXT", help="what the picture should not show (default: nothing)")
    g.add_argument("--seed", type=int, metavar="N", help="image k comes from seed N + k (default: a fresh one)")
    g.add_argument("--num-images", type=_positive, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    g.add_argument("--size", type=_size, metavar="WxH", help="width and height in pixels, such as 768x512")
    g.add_argument("--width", type=_positive, metavar="N", help="divisible by 8 (default: what the model was made for)")
    g.add_argument("--height", type=_positive, metavar="N", help="the same")
    g.add_argument(
        "--recipe", metavar="FILE.png", help="repeat a picture of minidiff's: all that is not given here is as it was"
    )
    g = p.add_argument_group("sampling")
    g.add_argument("--steps", type=_positive, metavar="N", help="more take longer (default: 50; DDPM: all there are)")
    g.add_argument(
        "--scale", type=_finite, metavar="X", help="how much the prompt counts; 1 is no guidance (default: 7.5)"
    )
    g.add_argument("--sampler", metavar="NAME", help="one of those listed below (default: the checkpoint's own)")
    g = p.add_argument_group("output")
    g.add_argument(
        "--out", metavar="PATH", help="a folder, or a file name (default: named by prompt and seed, in this folder)"
    )
    g.add_argument("--force", action="store_true", help="replace a file of that name, instead of adding a number")
    g.add_argument("--quiet", action="store_true", help="no progress bar and no hints")


def _samplers() -> str:
    from minidiff.samplers import SAMPLERS

    return f"\nsamplers:\n  {' '.join(SAMPLERS)}\n"


def _add_info(commands: Any) -> None:
    about = "say what is in a checkpoint, or how a picture was made"
    p = commands.add_parser("info", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=INFO_EXAMPLES)
    p.add_argument(
        "path", metavar="PATH", help="a minidiff file, a checkpoint of another layout, or a PNG of minidiff's"
    )
    p.add_argument("--check", action="store_true", help="read all of it: is the content hash right, is any value NaN")


def _add_convert(commands: Any) -> None:
    about = "turn a checkpoint from one layout into another"
    p = commands.add_parser(
        "convert", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=CONVERT_EXAMPLES
    )
    p.add_argument("src", metavar="SRC", help="a diffusers folder, a .safetensors or .ckpt file, or a minidiff file")
    p.add_argument("dst", metavar="DST", help="the file to write")
    p.add_argument(
        "--to", choices=LAYOUTS, default="minidiff", help="the layout of DST (default: minidiff, and no other yet)"
    )
    p.add_argument("--dtype", choices=DTYPES, help="store the weights in this (default: as they are)")
    p.add_argument("--ema", action="store_true", help="take the averaged weights of a training checkpoint")
    p.add_argument("--config", metavar="FILE.json", help="options that the tensors' shapes cannot tell, as JSON")
    p.add_argument("--force", action="store_true", help="replace DST if it exists")


def _positive(text: str) -> int:
    value = int(text) if re.fullmatch(r"[+-]?\d+", text) else None
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number, 1 or more")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number")
    return value


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} should be WIDTHxHEIGHT, such as 768x512")
    return int(found[1]), int(found[2])
