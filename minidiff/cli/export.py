"""``minidiff export``."""

from __future__ import annotations

import argparse
from argparse import Namespace
from typing import Any

from minidiff.cli.opening import open_model, parts_of
from minidiff.cli.options import about, add_parts
from minidiff.console import say, show
from minidiff.pipeline.request import read_whole

FORMATS = ("torch", "onnx", "aoti")

EXAMPLES = """\
examples:
  minidiff export sd15.safetensors ./sd15-onnx --to onnx
  minidiff export sd15.safetensors ./sd15-aoti --to aoti --plan dpmpp_2m:20 --plan euler:30
  minidiff export ./stable-diffusion-v1-5 ./sd15-torch --to torch

DIR then holds a program for the UNet, both halves of the VAE and each text encoder, the tokenizers' tables, the
schedule, the plans, and manifest.json, which lists files, hashes, inputs and how near to the model each program was.
`minidiff parity MODEL --against DIR` compares them layer by layer. minidiff/export/README.md says more.
"""


def add(commands: Any) -> None:
    """Add the command with its options."""
    p = about(
        commands, "export", "write the networks of a model as programs for ONNX Runtime, C++ or PyTorch", EXAMPLES
    )
    p.add_argument("model", metavar="MODEL", help="any model that minidiff opens; bundled: the one that comes with it")
    p.add_argument("dst", metavar="DIR", help="the folder to write, new or empty")
    p.add_argument(
        "--to",
        choices=FORMATS,
        default="torch",
        help="torch: torch.export; onnx: ONNX Runtime; aoti: AOTInductor, for this processor (default: torch)",
    )
    p.add_argument(
        "--plan",
        action="append",
        type=_plan,
        metavar="SAMPLER:STEPS",
        help="also write this plan; may be given several times (default: that of the model's own sampler)",
    )
    add_parts(p)
    p.add_argument("--quiet", action="store_true", help="no progress")


def _plan(text: str) -> tuple[str, int]:
    name, colon, steps = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} should be SAMPLER:STEPS, such as euler:20")
    return name, read_whole(steps)


def run(args: Namespace) -> None:
    """Run the command."""
    import torch

    from minidiff.export import export, formats

    formats.need(args.to)
    formats.hush()
    path = None if args.model == "bundled" else args.model
    pipe, _ = open_model(path, torch.device("cpu"), torch.float32, **parts_of(args))
    made = export(pipe, args.dst, args.to, plans=args.plan, tell=(lambda text: None) if args.quiet else say)
    show(made.folder)
