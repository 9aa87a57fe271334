"""``minidiff parity``, ``parity record``, ``parity compare`` and ``parity goldens``."""

from __future__ import annotations

import argparse
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from minidiff.cli.controls import FORM, check_there, open_control, read_control
from minidiff.cli.opening import device_of, open_model
from minidiff.cli.options import DTYPES, about, add_options, sampler_list
from minidiff.pipeline.request import Request, read_number, read_size

COMMANDS = ("record", "compare", "goldens")  # second words of the command
FAMILIES = ("sd1", "sd2", "sdxl", "inpaint", "ddpm")
GOLDENS_EXAMPLES = """\
examples:
  minidiff parity goldens goldens
  minidiff parity goldens goldens --family sd1 --family ddpm

Each family's folder holds the model in diffusers' layout and as one original file, and a recording: a port that is fed
the same model is held against it by `minidiff parity compare goldens/sd1/recording.safetensors mine.safetensors`.
"""
FORMATS = ("text", "json", "github", "html")

PARITY_EXAMPLES = """\
examples:
  minidiff parity ./stable-diffusion-v1-5
  minidiff parity ./stable-diffusion-v1-5 --sampler euler --steps 8 --size 512x512 --html report.html
  minidiff parity ./stable-diffusion-inpainting --image room.png --mask wall.png
  minidiff parity sd15.safetensors --against ./sd15-onnx
  minidiff parity sd15.safetensors --against my_variants:quantised --tolerance 0.02
  minidiff parity record sd15.safetensors ours.safetensors
  minidiff parity compare ours.safetensors yours.safetensors --tolerance 1e-5

SDXL's refiner and models that inpaint need a picture (and a mask): where none is given, both sides get the same one,
made for the run.

exit status: 0 if all stages are equal (or within the tolerance), 1 if the sides differ, 2 for a mistake.
`minidiff parity record --help` and `minidiff parity compare --help` say more of these. (A checkpoint by the name of
record, compare or bundled is ./record, ./compare, ./bundled.)
"""
BUNDLED = "bundled: the model that comes with minidiff"
MADE = "(default: none, or one made for a model that needs it)"
HELP = {  # of the request's options that both sides take
    "negative_prompt": "the negative prompt (default: the empty one)",
    "steps": "(default: 4)",
    "guidance_scale": "guidance scale (default: 7.5)",
    "sampler": "one of those listed below (default: the checkpoint's own)",
    "seed": "seed of the first noise (default: 0)",
    "image": f"begin from this picture, resized {MADE}",
    "mask": f"repaint only where this picture is white, resized {MADE}",
    "strength": "how much of the picture may change (default: 0.8, with a mask 1)",
}
RECORD_EXAMPLES = """\
examples:
  minidiff parity record sd15.safetensors ours.safetensors --steps 8
  minidiff parity record sd15.safetensors judge.safetensors --steps 8 --dtype float64
  minidiff parity record sd15.safetensors local.safetensors --steps 8 --on yours.safetensors

What a recording is, and how a program in any language writes one: minidiff/parity/SPECIFICATION.md.
"""
COMPARE_EXAMPLES = """\
examples:
  minidiff parity compare ours.safetensors yours.safetensors --tolerance 1e-5
  minidiff parity compare ours.safetensors yours.safetensors --judge float64.safetensors --html report.html
  minidiff parity compare ours.safetensors yours.npz --names auto --write-names names.json --tolerance 1e-5

exit status: 0 if all stages are equal (or within the tolerance), 1 if the recordings differ, 2 for a mistake.
"""


def add(commands: Any) -> None:
    """Add the command with its options."""
    p = about(
        commands,
        "parity",
        "find where minidiff and the installed diffusers differ, layer by layer and step by step",
        PARITY_EXAMPLES,
    )
    p.late = sampler_list
    known = "a diffusers folder, or a checkpoint that can be written as one"
    p.add_argument("checkpoint", metavar="CHECKPOINT", help=f"{known}; {BUNDLED}")
    _add_run(p, DTYPES)
    g = p.add_argument_group("comparison")
    _add_report(g)
    g.add_argument(
        "--no-judge",
        dest="judge",
        action="store_false",
        help="do not run both in float64 where they differ (twice the memory), to tell rounding from a fault",
    )
    g.add_argument(
        "--against",
        metavar="WHAT",
        help="instead of diffusers: the folder of an export, or MODULE:FUNCTION, which takes the pipeline and returns "
        "networks by the names of the parts that they replace",
    )
    g.add_argument(
        "--names",
        metavar="FILE.json",
        help='--against a function: names of its modules, {"unet": {"conv_in": "its name", ...}} (default: the same)',
    )
    _add_record(commands)
    _add_compare(commands)
    _add_goldens(commands)


def _add_record(commands: Any) -> None:
    p = about(
        commands,
        "parity record",
        "write every stage of a run to a file, for comparison with other programs",
        RECORD_EXAMPLES,
    )
    p.late = sampler_list
    p.add_argument("checkpoint", metavar="CHECKPOINT", help=f"any checkpoint that minidiff opens; {BUNDLED}")
    p.add_argument("out", metavar="OUT.safetensors", help="the file to write")
    _add_run(p, (*DTYPES, "float64"))
    g = p.add_argument_group("recording")
    g.add_argument(
        "--layers",
        choices=("first", "all", "none"),
        default="first",
        help="record the UNet's layers in the first step, in all steps, or no layers at all (default: first)",
    )
    g.add_argument(
        "--on",
        metavar="A.safetensors",
        help="hand the run that recording's value at every stage, after recording its own: a comparison of both then "
        "shows what arises at each stage",
    )
    g.add_argument("--hashes", action="store_true", help="keep only hashes, for long runs: they tell what is equal")
    g.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _add_compare(commands: Any) -> None:
    p = about(commands, "parity compare", "find where two recordings differ", COMPARE_EXAMPLES)
    p.add_argument("a", metavar="A", help="a recording, an .npz, a dict by torch.save, or transformers' debugging tree")
    p.add_argument("b", metavar="B", help="another one, of the same run")
    _add_report(p)
    p.add_argument(
        "--judge",
        metavar="C.safetensors",
        action="append",
        default=[],
        help="a recording in float64, to see which of the two is nearer to it; given twice, A's program and B's in "
        "float64, to tell rounding from another function",
    )
    p.add_argument(
        "--local",
        metavar="L.safetensors",
        help="B's stages on A's values, or A's on B's (`parity record --on`), to see what arises at each stage",
    )
    p.add_argument(
        "--names",
        metavar="auto|FILE",
        help="pair stages that are called otherwise: by order, shape and values, or by a JSON object {A's name: B's}",
    )
    p.add_argument("--write-names", metavar="FILE", help="write the names that --names gave, as a JSON object")
    p.add_argument("--quiet", action="store_true", help="no hints")


def _add_goldens(commands: Any) -> None:
    p = about(
        commands,
        "parity goldens",
        "write tiny models and recordings of the installed diffusers, for the tests of other projects",
        GOLDENS_EXAMPLES,
    )
    p.add_argument("folder", metavar="DIR", help="the folder to write; it must be new, or empty")
    p.add_argument(
        "--family", action="append", choices=FAMILIES, help="only this one; may be given several times (default: all)"
    )
    p.add_argument("--quiet", action="store_true", help="no hints")


def _add_run(p: Any, dtypes: tuple[str, ...]) -> None:
    """Add the options for the run, for the parity commands that run something."""
    g = p.add_argument_group("run")
    g.add_argument("--prompt", metavar="TEXT", help="(default: a photo of an astronaut riding a horse)")
    add_options({"run": g}, Request, only=tuple(HELP), help=HELP)
    g.add_argument(
        "--control",
        action="append",
        default=[],
        type=read_control,
        metavar=FORM,
        help="steer by a ControlNet or T2I-Adapter and its picture, resized; may be given several times",
    )
    g.add_argument("--size", type=read_size, metavar="WxH", help="pixels (default: the model's own, 256x256 at most)")
    g.add_argument("--dtype", choices=dtypes, default="float32", help="precision of the computation (default: float32)")
    g.add_argument("--device", metavar="NAME", default="cpu", help="(default: cpu, where equal bits can be expected)")
    g.add_argument("--quiet", action="store_true", help="no hints and no progress")


def _add_report(g: Any) -> None:
    """Add the options for the comparison of two sides and its report."""
    g.add_argument(
        "--tolerance",
        type=_fraction,
        metavar="X",
        help="largest difference allowed in a stage, relative to its largest value (default: 0, equal values; of an "
        "export, the bound of its format)",
    )
    g.add_argument("--format", choices=FORMATS, default="text", help="how the report is printed (default: text)")
    g.add_argument("--html", metavar="FILE", help="also write the report as one self-contained HTML page")
    g.add_argument("--all", action="store_true", help="print every stage, not only those around the first difference")
    g.add_argument("--force", action="store_true", help="replace FILE if it exists")


def _fraction(text: str) -> float:
    value = read_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} should be 0 or more")
    return value


def run(args: Namespace) -> int:
    """Run the command."""
    if args.command == "parity compare":
        from minidiff.parity import compare_command

        return compare_command.run(args)
    import weights_convert
    from minidiff.parity.command import Converter, run
    from minidiff.pipeline.opening import bundled_file
    from weights_convert.module_names import module_names

    converter = Converter(
        lambda *what: open_model(*what)[0],
        module_names,
        lambda src, dst: weights_convert.convert(src, dst, to="diffusers"),
        lambda src, dst: weights_convert.convert(src, dst, to="original"),
        open_control,
    )
    if args.command == "parity goldens":
        from minidiff.parity import goldens

        return goldens.run(args, converter)
    check_there(args)
    device = device_of(args.device)
    assert device is not None
    with ExitStack() as stack:
        if args.checkpoint == "bundled":
            args.checkpoint = str(stack.enter_context(bundled_file()))
        if args.command == "parity" and args.against is not None:
            from minidiff.export import against

            return against.run(args, converter, device)
        return run(args, converter, device)
