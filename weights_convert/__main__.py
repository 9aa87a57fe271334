"""``python -m weights_convert SRC DST``: convert one checkpoint and print the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from minidiff.cli.options import PARTS, add_set, chosen
from minidiff.console import LONGEST_LINE, Parser, guard, open_standard_streams, show
from weights_convert import convert
from weights_convert.conversion import FLOATS, LAYOUTS, check_name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status (see :mod:`minidiff.console`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guard(lambda: _run(arguments), debug="--debug" in arguments)


def _run(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m weights_convert", description="Convert a checkpoint from one layout to another.")
    parser.add_argument("src", metavar="SRC", help="a diffusers folder, or an original .safetensors or .ckpt file")
    parser.add_argument("dst", metavar="DST", help="the file to write, or to replace, or the folder (--to diffusers)")
    parser.add_argument("--to", default="minidiff", metavar="LAYOUT", help=f"{', '.join(LAYOUTS)} (default: minidiff)")
    parser.add_argument("--dtype", metavar="TYPE", help=f"{', '.join(FLOATS)} (default: each tensor as it is)")
    parser.add_argument("--sharded", metavar="SIZE", help="--to diffusers: files of at most 5GB, 500MB, ...")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights of an original file")
    parser.add_argument("--config", metavar="FILE", help="a JSON file with settings that shapes cannot tell")
    parser.add_argument("--variant", metavar="NAME", help="variant of the weights in a folder: fp16, non_ema, ...")
    parser.add_argument("--prediction", metavar="WHAT", help="what the model predicts, if the file does not tell")
    parser.add_argument("--sampler", metavar="NAME", help="the sampler of the model, if the file does not tell")
    add_set(parser)
    for part in PARTS:
        option = f"--{part.replace('_', '-')}"
        parser.add_argument(option, metavar="PATH", help=f"take the {part.replace('_', ' ')} from this file or folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    check_name(args.dst, args.to)
    swap = {part: getattr(args, part) for part in PARTS}
    options = {"ema": args.ema, "config": args.config, "variant": args.variant, "swap": swap, "sharded": args.sharded}
    options |= {"prediction": args.prediction, "sampler": chosen(args)}
    show(convert(args.src, args.dst, args.to, args.dtype, **options), longest=LONGEST_LINE)


if __name__ == "__main__":
    open_standard_streams()
    sys.exit(main())
