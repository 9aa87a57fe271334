"""``minidiff replay``: a picture made again from its recipe, and held against itself."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minidiff.cli import generate, generate_options
from minidiff.cli.options import DTYPES, about, add_options
from minidiff.console import say, show
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.request import Request
from minidiff.storage.reading import missing

EXAMPLES = """\
examples:
  minidiff replay star.png
  minidiff replay lighthouse.png --model sd15.safetensors --out again.png
"""
FROM_PICTURES = ("image", "mask")  # options whose pictures a recipe cannot hold


def add(commands: Any) -> None:
    """Add the command with its options."""
    what = "make a picture again from its recipe, and compare the two"
    more = " The status is 0 if they are equal, else 1, with what differs. Without --out the new one is not kept."
    p = about(commands, "replay", what, EXAMPLES, more)
    p.add_argument("recipe", metavar="FILE", help="a picture of minidiff's")
    groups = {name: p.add_argument_group(name) for name in ("model", "from a picture", "output")}
    generate_options.add_model(groups["model"])
    add_options(groups, Request, FROM_PICTURES)
    generate_options.add_output(groups["output"])


def run(args: Namespace) -> int:
    """Make the picture again and compare the files; return 0 if they are equal."""
    import tempfile

    from minidiff.pipeline import recipes
    from minidiff.pipeline.metadata import suffix_of

    if not os.path.exists(args.recipe):
        raise CheckpointError(missing(args.recipe))
    found = recipes.read(args.recipe)
    if found.program != recipes.OURS:
        raise ConfigError(
            f"{args.recipe}: was made by {found.program}, whose pictures are not repeated bit for bit; "
            f"`minidiff generate --recipe {args.recipe}` makes a similar one"
        )
    then = found.recipe.made
    if args.dtype == "auto" and then.dtype in DTYPES:
        args.dtype = then.dtype
    args.infotext = args.infotext or recipes.has_infotext(args.recipe)
    full = Namespace(**{**vars(generate_options.blank()), **vars(args)})
    with tempfile.TemporaryDirectory() as folder:
        if full.out is None:
            full.out = os.path.join(folder, f"again{suffix_of(args.recipe)}")
        (path,) = generate.make(full)
        if args.out is not None:
            show(path)
        lines = list(compared(Path(args.recipe), path, then))
    for line in lines[1:]:
        say(line)
    say(f"{args.recipe}: {lines[0]}")
    return 0 if len(lines) == 1 else 1


def compared(one: Path, two: Path, then: Any) -> Iterator[str]:
    """Yield the verdict on two files; if their pictures differ, then each circumstance that may be the cause."""
    import numpy as np

    from minidiff.pipeline.image_files import open_picture
    from minidiff.pipeline.recipes import read

    if one.read_bytes() == two.read_bytes():
        yield "the same file again, byte for byte"
        return
    a, b = (np.asarray(open_picture(path)).astype(int) for path in (one, two))
    if a.shape == b.shape and (a == b).all():
        yield "the same picture again; its file has other texts"
        return
    if a.shape != b.shape:
        yield f"another picture, of {b.shape[1]} x {b.shape[0]} pixels"
    else:
        ratio, most = 10 * np.log10(255**2 / ((a - b) ** 2).mean()), abs(a - b).max()
        yield f"another picture: {ratio:.1f} dB, the largest difference {most} of 255"
    now = read(two).recipe.made
    for name in ("minidiff", "torch", "device", "dtype", "fast", "kernels", "model_hash", "lora_hashes"):
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            yield f"{name}: {before or 'none'} then, {after or 'none'} now"
    if then.together is not None:
        yield f"it was made together with {then.together - 1} others; the last bits depend on how many"
    yield "the processor and the number of threads, which a recipe does not name, change the last bits as well"
