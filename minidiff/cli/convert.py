"""``minidiff convert``."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from minidiff.cli.opening import dtype_of, parts_of
from minidiff.cli.options import DTYPES, about, add_parts, add_set, chosen
from minidiff.console import LONGEST_LINE, show
from minidiff.errors import CheckpointError
from minidiff.storage.reading import missing

LAYOUTS = ("minidiff", "diffusers", "original")

EXAMPLES = """\
examples:
  minidiff convert ./stable-diffusion-v1-5 sd15.safetensors --dtype float16
  minidiff convert v1-5-pruned.ckpt sd15.safetensors --ema
  minidiff convert control_v11p_sd15_canny.pth canny.safetensors --dtype float16
  minidiff convert sd15.safetensors ./sd15 --to diffusers
"""


def add(commands: Any) -> None:
    """Add the command with its options."""
    p = about(commands, "convert", "turn a checkpoint from one layout into another", EXAMPLES)
    p.add_argument("src", metavar="SRC", help="a diffusers folder, a .safetensors or .ckpt file, or a minidiff file")
    p.add_argument("dst", metavar="DST", help="the file to write, or the folder (--to diffusers)")
    p.add_argument("--to", choices=LAYOUTS, default="minidiff", help="the layout of DST (default: minidiff)")
    p.add_argument("--sharded", metavar="SIZE", help="--to diffusers: weights in files of at most 5GB, 500MB, ...")
    p.add_argument("--dtype", choices=DTYPES, help="dtype of the stored weights (default: as they are)")
    p.add_argument("--ema", action="store_true", help="take the averaged (EMA) weights of a training checkpoint")
    add_parts(p)
    p.add_argument("--sampler", metavar="NAME", help="DST's own sampler (default: that of SRC, where it says one)")
    add_set(p)
    p.add_argument("--config", metavar="FILE.json", help="options that the tensors' shapes cannot tell, as JSON")
    p.add_argument(
        "--force",
        action="store_true",
        help="replace DST if it is a file that exists (of a link, the link; never a folder or device)",
    )


def run(args: Namespace) -> None:
    """Run the command."""
    if not os.path.exists(args.src):
        raise CheckpointError(missing(Path(args.src), "file or folder"))
    import weights_convert
    from weights_convert.conversion import check_name

    check_name(args.dst, args.to)
    report = weights_convert.convert(
        args.src,
        args.dst,
        to=args.to,
        dtype=dtype_of(args.dtype),
        ema=args.ema,
        config=args.config,
        sampler=chosen(args),
        sharded=args.sharded,
        existing="replace" if args.force else "refuse",
        **parts_of(args),
    )
    show(report, longest=LONGEST_LINE)
