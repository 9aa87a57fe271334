"""The grammar of the command line: every option with its help, and nothing else.

It is read before anything heavy is imported, so that ``--help`` and a misspelt option answer at once. Defaults that a
picture's recipe may fill are None here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from typing import Any

from minidiff.config import quote
from minidiff.console import Parser
from minidiff.console.spelling import near
from minidiff.errors import ConfigError
from minidiff.version import VERSION

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("minidiff", "diffusers", "original")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
PARTS = ("vae", "unet", "text_encoder", "text_encoder_2")
PARITY_COMMANDS = ("record", "compare")

# Options of other programs, and what is typed here.
GENERATE_ELSEWHERE = {
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
TRAIN_ELSEWHERE = {
    **dict.fromkeys(("lr", "learning-rate"), "--rate"),
    **dict.fromkeys(("epochs", "num-train-epochs", "max-train-steps"), "--steps"),
    **dict.fromkeys(("batch-size", "train-batch-size"), "--batch"),
    **dict.fromkeys(("train-data-dir", "instance-data-dir", "dataset-name"), "--data"),
    **dict.fromkeys(("output-dir", "outdir", "output", "-o"), "--out"),
    "resolution": "--size",
    "mixed-precision": "--precision",
    "snr-gamma": "--min-snr",
    "gradient-accumulation-steps": "--accumulate",
    "resume-from-checkpoint": "--resume",
    "pretrained-model-name-or-path": "--model",
}

GENERATE_EXAMPLES = """\
examples:
  minidiff generate "a large red star on a blue background" --out star.png
  minidiff generate "a lighthouse at dawn" --model sd15.safetensors --seed 7
  minidiff generate "a fox" "an owl" --model ./stable-diffusion-v1-5 --num-images 4 --out pictures/
  minidiff generate --model sd15.safetensors --recipe lighthouse.png --steps 20
  minidiff generate "a <cat-toy> in ink" --model sd15.safetensors --embedding cat.safetensors --lora ink.safetensors=0.8
  minidiff generate "in winter" --model sd15.safetensors --image lighthouse.png --strength 0.6
"""
INFO_EXAMPLES = """\
examples:
  minidiff info sd15.safetensors --check
  minidiff info picture.png
"""
PLAN_EXAMPLES = """\
examples:
  minidiff plan --sampler euler --steps 20
  minidiff plan --sampler ddim --steps 50 --set steps_offset=0
  minidiff plan --sampler euler --steps 20 --like a1111,comfyui:karras,diffusers
  minidiff plan --model sd15.safetensors
"""
CONVERT_EXAMPLES = """\
examples:
  minidiff convert ./stable-diffusion-v1-5 sd15.safetensors --dtype float16
  minidiff convert v1-5-pruned.ckpt sd15.safetensors --ema
  minidiff convert sd15.safetensors ./sd15 --to diffusers
"""
TRAIN_EXAMPLES = """\
examples:
  minidiff train --data photos/ --out run --size 32 --steps 20000
  minidiff train --data photos/ --out run --resume
  minidiff train --data captioned/ --out tuned --model sd15.safetensors --rate 1e-5 --batch 4 --cache-latents
  torchrun --nproc-per-node 4 -m minidiff train --data photos/ --out run

A run's folder holds model.safetensors, which `minidiff generate --model` takes, state.safetensors for --resume,
log.csv, and samples/. With --resume, what is not given is as it was.
"""
PARITY_EXAMPLES = """\
examples:
  minidiff parity ./stable-diffusion-v1-5
  minidiff parity ./stable-diffusion-v1-5 --sampler euler --steps 8 --size 512x512 --html report.html
  minidiff parity ./stable-diffusion-inpainting --image room.png --mask wall.png
  minidiff parity record sd15.safetensors ours.safetensors
  minidiff parity compare ours.safetensors yours.safetensors --tolerance 1e-5

SDXL's refiner and models that inpaint need a picture (and a mask): where none is given, both sides get the same one,
made for the run.

exit status: 0 if all stages are equal (or within the tolerance), 1 if the sides part, 2 for a mistake.
`minidiff parity record --help` and `minidiff parity compare --help` say more of these. (A checkpoint by the name of
record or compare is ./record, ./compare.)
"""
MADE = "(default: none, or one made for a model that needs it)"
RECORD_EXAMPLES = """\
examples:
  minidiff parity record sd15.safetensors ours.safetensors --steps 8
  minidiff parity record sd15.safetensors judge.safetensors --steps 8 --dtype float64

What a recording is, and how a program in any language writes one, stands at the top of minidiff/parity/recording.py.
"""
COMPARE_EXAMPLES = """\
examples:
  minidiff parity compare ours.safetensors yours.safetensors --tolerance 1e-5
  minidiff parity compare ours.safetensors yours.safetensors --judge float64.safetensors --html report.html

exit status: 0 if all stages are equal (or within the tolerance), 1 if the recordings part, 2 for a mistake.
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
    _add_plan(commands)
    _add_train(commands)
    _add_parity(commands)
    _add_parity_record(commands)
    _add_parity_compare(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def arranged(argv: list[str]) -> list[str]:
    """``argv`` as the parser takes it: ``parity record`` and ``parity compare`` as one word, "help" behind its command.

    Raises :class:`ConfigError` for a misspelt second word of ``parity``.
    """
    if argv[:1] and argv[0] in ("help", "--help", "-h"):
        return [*_joined(argv[1:])[:1], "--help"]
    if argv[:1] and " " in argv[0] and argv[0][0] != "-":
        raise ConfigError(f"{quote(argv[0])} is no command; for a picture of it: minidiff generate {quote(argv[0])}")
    return _joined(argv)


def _joined(argv: list[str]) -> list[str]:
    if argv[:1] != ["parity"] or not argv[1:]:
        return argv
    if argv[1] in PARITY_COMMANDS:
        return [" ".join(argv[:2]), *argv[2:]]
    guess = near(argv[1], PARITY_COMMANDS)
    if guess and not os.path.lexists(argv[1]):
        raise ConfigError(f"parity {argv[1]}: there is no such command, and no such checkpoint{guess}")
    return argv


def _add_generate(commands: Any) -> None:
    about = "make pictures from a text, or from nothing with a model that knows no text"
    p = commands.add_parser(
        "generate",
        help=about,
        description=f"{about[0].upper()}{about[1:]}. Their paths are printed, one a line.",
        epilog=GENERATE_EXAMPLES,
    )
    p.late, p.elsewhere = _samplers, GENERATE_ELSEWHERE
    p.add_argument("prompt", nargs="*", metavar="PROMPT", help="what the picture shows; several make several pictures")
    g = p.add_argument_group("model")
    g.add_argument(
        "--model",
        metavar="PATH",
        help="a minidiff file, or a checkpoint of another layout, converted in memory (default: the bundled model, "
        "which draws one or two coloured shapes)",
    )
    _add_parts(g)
    g.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_weighted,
        metavar="FILE[=X]",
        help="bend the model by an adapter (a file, or a folder with one), X strong (default: 1); may be given several "
        "times",
    )
    g.add_argument(
        "--embedding",
        action="append",
        default=[],
        type=_named,
        metavar="FILE[=WORD]",
        help="teach it a learned word (textual inversion), called as the file says, or WORD",
    )
    g.add_argument("--allow-unmatched", action="store_true", help="use of a --lora what fits, and leave out the rest")
    g.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    g.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="what to compute in (default: auto: on the CPU float32, or bfloat16 for a large model where it is faster; "
        "on a GPU as the checkpoint is stored)",
    )
    g.add_argument(
        "--plain",
        action="store_true",
        help="compute as diffusers does, to the last bit (default: the same sums in a faster order)",
    )
    g = p.add_argument_group("picture")
    g.add_argument("--negative", metavar="TEXT", help="what the picture should not show (default: nothing)")
    g.add_argument(
        "--seed",
        type=_seeds,
        metavar="N",
        help="image k comes from seed N + k; 3,8,9: one picture of each prompt from each (default: a fresh one)",
    )
    g.add_argument("--num-images", type=_positive, metavar="N", help="pictures of each prompt (default: 1)")
    g.add_argument("--size", type=_size, metavar="WxH", help="width and height in pixels, such as 768x512")
    g.add_argument("--width", type=_positive, metavar="N", help="divisible by 8 (default: what the model was made for)")
    g.add_argument("--height", type=_positive, metavar="N", help="the same")
    g.add_argument(
        "--recipe", metavar="FILE.png", help="repeat a picture of minidiff's: all that is not given here is as it was"
    )
    g = p.add_argument_group("from a picture")
    g.add_argument("--image", metavar="FILE", help="begin from this picture, instead of from noise alone")
    g.add_argument(
        "--strength",
        type=_finite,
        metavar="X",
        help="how much of it may change, from 0 to 1 (default: 0.8, with --mask 1)",
    )
    g.add_argument("--mask", metavar="FILE", help="paint only where this picture is white; of the size of --image")
    g = p.add_argument_group("sampling")
    g.add_argument("--steps", type=_positive, metavar="N", help="more take longer (default: 50; DDPM: all there are)")
    g.add_argument(
        "--scale",
        type=_finite,
        metavar="X",
        help="how much the prompt counts; 1 is no guidance (default: 7.5; the bundled model's 2)",
    )
    g.add_argument("--sampler", metavar="NAME", help="one of those listed below (default: the checkpoint's own)")
    add_set(g)
    g.add_argument(
        "--like", metavar="PROGRAM", help="as it does it: diffusers, ldm, k-diffusion, a1111, comfyui, comfyui:karras"
    )
    g.add_argument(
        "--guidance-rescale",
        type=_finite,
        metavar="X",
        help="take back the glare of a high --scale, from 0 to 1 (default: 0; 0.7 is usual)",
    )
    g.add_argument(
        "--guidance-interval",
        type=_interval,
        metavar="LOW,HIGH",
        help="guide between these parts of the way alone, 0 to 1; the rest takes half as long (default: 0,1)",
    )
    g.add_argument(
        "--clip-skip",
        type=_count,
        metavar="N",
        help="read the prompt N layers of the text encoder earlier (default: 0)",
    )
    g.add_argument("--denoising-end", type=_finite, metavar="X", help="stop at this part of the way, between 0 and 1")
    g.add_argument(
        "--denoising-start",
        type=_finite,
        metavar="X",
        help="go on from --image at this part of the way, as SDXL's refiner does",
    )
    g = p.add_argument_group("SDXL")
    g.add_argument("--prompt-2", metavar="TEXT", help="what the second text encoder reads (default: the prompt)")
    g.add_argument("--negative-2", metavar="TEXT", help="what it reads beside that (default: the negative prompt)")
    g.add_argument(
        "--original-size",
        type=_size,
        metavar="WxH",
        help="tell the model that the picture was once of this size (default: its own)",
    )
    g.add_argument("--crop", type=_place, metavar="X,Y", help="... and cut off here, at left and top (default: 0,0)")
    g.add_argument("--target-size", type=_size, metavar="WxH", help="... and wanted in this size (default: its own)")
    g.add_argument(
        "--score", type=_finite, metavar="X", help="tell the refiner how pleasing it is, 0 to 10 (default: 6)"
    )
    g = p.add_argument_group("memory")
    g.add_argument("--vae-slices", action="store_true", help="decode one picture of a batch after the other")
    g.add_argument(
        "--vae-tiles",
        action="store_const",
        const=64,  # latents of a side
        help="decode pictures beyond 512 pixels in tiles; APPROXIMATE, colours shift",
    )
    g.add_argument(
        "--split-guidance",
        action="store_true",
        help="predict without the prompt, then with it, not in one batch (on a GPU: once that did not fit)",
    )
    g = p.add_argument_group("output")
    g.add_argument(
        "--out",
        metavar="PATH",
        help="a folder (a new one ends with /), or a file name (default: named by prompt and seed, in this folder)",
    )
    g.add_argument(
        "--force",
        action="store_true",
        help="replace a file of that name (of a link, the link), instead of adding a number",
    )
    g.add_argument("--quiet", action="store_true", help="no progress bar and no hints")


def _add_parts(p: Any) -> None:
    """Add the options for weights, parts from other files, and facts that a file may not contain."""
    p.add_argument("--variant", metavar="NAME", help="of a folder that holds several: fp16, non_ema, ...")
    for part in PARTS:
        name = part.replace("_", "-")
        what = {"text_encoder_2": "second text encoder (SDXL)"}.get(part, part.replace("_", " "))
        p.add_argument(f"--{name}", metavar="PATH", help=f"take the {what} from this file or folder")
    _add_prediction(p)


def _add_prediction(p: Any) -> None:
    p.add_argument("--prediction", choices=PREDICTIONS, help="what the model predicts, where its file does not say")


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
    p.add_argument("dst", metavar="DST", help="the file to write, or the folder (--to diffusers)")
    p.add_argument("--to", choices=LAYOUTS, default="minidiff", help="the layout of DST (default: minidiff)")
    p.add_argument("--sharded", metavar="SIZE", help="--to diffusers: weights in files of at most 5GB, 500MB, ...")
    p.add_argument("--dtype", choices=DTYPES, help="store the weights in this (default: as they are)")
    p.add_argument("--ema", action="store_true", help="take the averaged weights of a training checkpoint")
    _add_parts(p)
    p.add_argument("--sampler", metavar="NAME", help="DST's own sampler (default: that of SRC, where it says one)")
    add_set(p)
    p.add_argument("--config", metavar="FILE.json", help="options that the tensors' shapes cannot tell, as JSON")
    p.add_argument(
        "--force",
        action="store_true",
        help="replace DST if it is a file that exists (of a link, the link; never a folder or device)",
    )


def _add_plan(commands: Any) -> None:
    about = "print every number that a sampler will use: timesteps, sigmas, coefficients"
    p = commands.add_parser("plan", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=PLAN_EXAMPLES)
    p.late = _samplers
    p.add_argument("--model", metavar="PATH", help="take schedule and sampler from it (default: Stable Diffusion's)")
    _add_prediction(p)
    p.add_argument("--sampler", metavar="NAME", help="one of those listed below (default: the model's own, else pndm)")
    p.add_argument("--steps", type=_positive, default=50, metavar="N", help="how many (default: 50)")
    p.add_argument(
        "--like",
        metavar="PROGRAMS",
        help="as diffusers, ldm, k-diffusion, a1111 or comfyui plan it; several: a1111,ldm",
    )
    add_set(p)


def add_set(p: Any) -> None:
    """Add ``--set``; :func:`chosen` reads it."""
    what = "an option of the sampler; may be given several times"
    p.add_argument("--set", action="append", default=[], type=_setting, metavar="OPTION=VALUE", help=what)


def chosen(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return what --sampler and --set say, as a sampler's config; None if neither is given."""
    named = {} if args.sampler is None else {"name": args.sampler}
    return {**named, **dict(args.set)} or None


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} should be OPTION=VALUE, such as spacing=trailing")
    if name == "name":
        raise argparse.ArgumentTypeError(f"{text!r}: --sampler chooses another sampler")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _add_train(commands: Any) -> None:
    about = "train a model on your own pictures, from nothing or from a model that exists"
    p = commands.add_parser("train", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=TRAIN_EXAMPLES)
    p.elsewhere = TRAIN_ELSEWHERE
    g = p.add_argument_group("model and data")
    g.add_argument(
        "--data",
        required=True,
        metavar="WHAT",
        help="a folder of pictures (a model with text reads cat.txt beside cat.png, or metadata.jsonl), shapes (drawn "
        "on the fly), or torchvision:NAME",
    )
    g.add_argument("--out", required=True, metavar="FOLDER", help="where the run is kept")
    g.add_argument("--resume", action="store_true", help="go on with the run in FOLDER")
    g.add_argument("--model", metavar="PATH", help="begin with this model (default: a new, small one without text)")
    g.add_argument("--config", metavar="FILE.json", help="begin with a new model of this config")
    g.add_argument(
        "--parts",
        choices=("unet", "unet+text_encoder", "vae"),
        help="what learns (default: unet; vae: the autoencoder alone)",
    )
    g.add_argument("--size", type=_positive, metavar="N", help="pixels (default: the model's; 64 for a new one)")
    g.add_argument("--cache-latents", action="store_true", help="compute latents once, and keep them in FOLDER")
    g.add_argument("--held-out", metavar="WHAT", help="data to measure the loss on whenever samples are made")
    g.add_argument("--download", action="store_true", help="let torchvision fetch its data set, into ./data")
    g.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    g.add_argument("--fsdp", action="store_true", help="under torchrun: spread the model over the processes")
    g = p.add_argument_group("optimisation")
    g.add_argument("--steps", type=_positive, metavar="N", help="optimiser steps of the whole run (default: 1000)")
    g.add_argument("--batch", type=_positive, metavar="N", help="pictures a step, on all machines (default: 16)")
    g.add_argument("--accumulate", type=_positive, metavar="N", help="parts of a batch: less memory (default: 1)")
    g.add_argument("--rate", type=_finite, metavar="X", help="the highest learning rate (default: 1e-4)")
    g.add_argument("--curve", metavar="NAME", help="how it falls: cosine, linear or constant (default: cosine)")
    g.add_argument("--warmup", type=_count, metavar="N", help="steps in which it rises (default: a tenth, at most 500)")
    g.add_argument("--decay", type=_finite, metavar="X", help="weight decay (default: 0.01)")
    g.add_argument("--clip", type=_finite, metavar="X", help="the longest gradient; 0: any (default: 1)")
    g.add_argument("--precision", metavar="NAME", help="float32, bfloat16 or float16 (default: float32)")
    g.add_argument("--ema", type=_finite, metavar="X", help="decay of the weights' average; 0: none (default: 0.9999)")
    g.add_argument("--seed", type=_seed, metavar="N", help="of the weights, the order and the noise (default: 0)")
    g = p.add_argument_group("objective")
    g.add_argument("--min-snr", type=_finite, metavar="X", help="weigh timesteps by min-SNR; 5 is usual (default: no)")
    g.add_argument("--noisy", type=_finite, metavar="X", help="above 1: practise much noise more (default: 1)")
    g.add_argument("--offset-noise", type=_finite, metavar="X", help="0.1 is usual (default: 0)")
    g.add_argument("--drop-prompt", type=_finite, metavar="X", help="share of empty prompts (default: 0.1)")
    g.add_argument("--kl", type=_finite, metavar="X", help="vae: weight of the KL divergence (default: 1e-6)")
    g = p.add_argument_group("output")
    g.add_argument(
        "--save-every", type=_positive, metavar="N", help="steps from checkpoint to checkpoint (default: 500)"
    )
    g.add_argument("--sample-every", type=_count, metavar="N", help="steps from grid to grid; 0: none (default: 0)")
    g.add_argument("--samples", type=_positive, metavar="N", help="pictures in a grid (default: 16)")
    g.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_parity(commands: Any) -> None:
    about = "find where minidiff and the installed diffusers part, layer by layer and step by step"
    p = commands.add_parser("parity", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=PARITY_EXAMPLES)
    p.late = _samplers
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a diffusers folder, or what can be written as one")
    _add_run(p, DTYPES)
    g = p.add_argument_group("comparison")
    _add_report(g)
    g.add_argument(
        "--no-judge",
        dest="judge",
        action="store_false",
        help="where they part, don't run both in float64, which takes twice the memory, to tell rounding from a slip",
    )


def _add_parity_record(commands: Any) -> None:
    about = "write every stage of a run to a file, to hold other programs against"
    p = commands.add_parser(
        "parity record", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=RECORD_EXAMPLES
    )
    p.late = _samplers
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="any checkpoint that minidiff opens")
    p.add_argument("out", metavar="OUT.safetensors", help="the file to write")
    _add_run(p, (*DTYPES, "float64"))
    g = p.add_argument_group("recording")
    g.add_argument(
        "--layers",
        choices=("first", "all", "none"),
        default="first",
        help="the UNet's layers in the first step, in all, or no layers of any network (default: first)",
    )
    g.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _add_parity_compare(commands: Any) -> None:
    about = "find where two recordings part"
    p = commands.add_parser(
        "parity compare", help=about, description=f"{about[0].upper()}{about[1:]}.", epilog=COMPARE_EXAMPLES
    )
    p.add_argument("a", metavar="A.safetensors", help="a recording")
    p.add_argument("b", metavar="B.safetensors", help="another one, of the same run")
    _add_report(p)
    p.add_argument("--judge", metavar="C.safetensors", help="a recording in float64, which says who is nearer to it")
    p.add_argument("--quiet", action="store_true", help="no hints")


def _add_run(p: Any, dtypes: tuple[str, ...]) -> None:
    """Add the options for the run, for the parity commands that run something."""
    g = p.add_argument_group("run")
    g.add_argument("--prompt", metavar="TEXT", help="(default: a photo of an astronaut riding a horse)")
    g.add_argument("--negative", metavar="TEXT", help="the negative prompt (default: the empty one)")
    g.add_argument("--steps", type=_positive, default=4, metavar="N", help="(default: 4)")
    g.add_argument("--scale", type=_finite, metavar="X", help="of the guidance (default: 7.5)")
    g.add_argument("--sampler", metavar="NAME", help="one of those listed below (default: the checkpoint's own)")
    g.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the first noise (default: 0)")
    g.add_argument("--size", type=_size, metavar="WxH", help="pixels (default: the model's own, 256x256 at most)")
    g.add_argument("--image", metavar="FILE", help=f"begin from this picture, resized {MADE}")
    g.add_argument("--mask", metavar="FILE", help=f"paint only where this picture is white, resized {MADE}")
    g.add_argument(
        "--strength", type=_finite, metavar="X", help="how much of it may change (default: 0.8, with a mask 1)"
    )
    g.add_argument("--dtype", choices=dtypes, default="float32", help="what to compute in (default: float32)")
    g.add_argument("--device", metavar="NAME", default="cpu", help="(default: cpu, where equal bits can be expected)")
    g.add_argument("--quiet", action="store_true", help="no hints, and nothing about what is being done")


def _add_report(g: Any) -> None:
    """Add the options for the comparison of two sides and its report."""
    g.add_argument(
        "--tolerance",
        type=_fraction,
        default=0.0,
        metavar="X",
        help="how far a stage may be apart, as a share of its largest value (default: 0, equal values)",
    )
    g.add_argument("--html", metavar="FILE", help="write the report as a page too, one file that needs no other")
    g.add_argument("--all", action="store_true", help="print every stage, not only those around the place")
    g.add_argument("--force", action="store_true", help="replace FILE if it exists")


def _fraction(text: str) -> float:
    value = _finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} should be 0 or more")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    value = int(text) if re.fullmatch(r"[+-]?\d+", text) else None
    if value is None or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number, 1 or more")
    return value


def _seed(text: str) -> int:
    if not re.fullmatch(r"\+?[0-9]{1,20}", text) or int(text) >= 2**64:
        # -1 is other programs' word for a seed of chance
        fresh = "a whole number from 0 to 2**64 - 1; without --seed each run draws a fresh one"
        raise argparse.ArgumentTypeError(f"{text!r} should be {fresh}")
    return int(text)


def _seeds(text: str) -> int | list[int]:
    return [_seed(part.strip()) for part in text.split(",")] if "," in text else _seed(text)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} should be a number")
    return value


def _interval(text: str) -> tuple[float, float]:
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"{text!r} should be LOW,HIGH, such as 0.2,0.9")
    return _finite(low), _finite(high)


def _weighted(text: str) -> tuple[str, float]:
    path, strength = _file_and(text)
    if strength is None:
        return path, 1.0
    try:
        return path, _finite(strength)
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


def _place(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} should be X,Y, such as 0,128")
    return int(found[1]), int(found[2])


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} should be WIDTHxHEIGHT, such as 768x512")
    return int(found[1]), int(found[2])
