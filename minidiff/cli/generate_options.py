"""Options of ``minidiff generate``: those of a Request, and what only the command line has."""

from __future__ import annotations

import argparse
import os
from typing import Any

from minidiff.cli.controls import FORM, read_control
from minidiff.cli.grid import read_axis
from minidiff.cli.options import DTYPES, about, add_options, add_parts, add_set, sampler_list
from minidiff.pipeline.request import Request, read_number, read_size, read_whole

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
  minidiff generate "a castle" --model sdxl.safetensors --size 1024x1024 --num-images 4 --estimate
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
    g.add_argument(
        "--estimate",
        action="store_true",
        help="print the memory that the run would take, that of its weights and at its peak, and make no picture",
    )
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


def blank() -> argparse.Namespace:
    """Return the arguments of the command without any given, for other commands that run it."""
    commands = argparse.ArgumentParser().add_subparsers()
    add(commands)
    found: argparse.Namespace = commands.choices["generate"].parse_args([])
    return found


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
