"""``minidiff info``."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from minidiff.cli.opening import is_minidiff_file
from minidiff.cli.options import about
from minidiff.console import LONGEST_LINE, show, show_json
from minidiff.errors import CheckpointError, MinidiffError
from minidiff.pipeline.metadata import FORMATS
from minidiff.storage.reading import content

EXAMPLES = """\
examples:
  minidiff info sd15.safetensors --check
  minidiff info picture.png
"""


def add(commands: Any) -> None:
    """Add the command with its options."""
    p = about(commands, "info", "say what is in a checkpoint, or how a picture was made", EXAMPLES)
    p.add_argument(
        "path",
        metavar="PATH",
        help="a minidiff file, a checkpoint of another layout, or a picture of minidiff, AUTOMATIC1111 or ComfyUI",
    )
    p.add_argument("--check", action="store_true", help="read every byte: verify the content hash and look for NaN")


def run(args: Namespace) -> None:
    """Run the command."""
    path = args.path
    kind = content(path) if os.path.exists(path) and not os.path.isdir(path) else None
    if kind == "png" or (kind == "?" and Path(path).suffix.lower() in FORMATS):
        from minidiff.pipeline import recipes

        show_json(recipes.described(recipes.read(path)))
        return
    if is_minidiff_file(path):
        from minidiff.cli.description import check_tensors, describe

        show(describe(path), longest=LONGEST_LINE)
        if args.check:
            show("\n" + check_tensors(path))
        return
    _info_of_another_layout(path, args.check)


def _info_of_another_layout(path: str, check: bool) -> None:
    """Print what weights_convert finds in a file or folder: the evidence, the tensors it maps and drops, the model."""
    import weights_convert
    from minidiff.cli.description import describe_any, first_not_finite, size_table, table
    from minidiff.storage.identity import identify

    found = weights_convert.detect(path)
    try:
        source = (weights_convert.open_control if found.is_control else weights_convert.open_source)(path)
    except MinidiffError:
        show(found, longest=LONGEST_LINE)  # what is recognised is worth knowing, even where more is needed to use it
        raise
    rows = [*describe_any(source.config, path)[1:], ("identity", identify(source.config, source.tensors))]
    pages = (source.report, table(rows), size_table(source.tensors))
    show("\n\n".join(map(str, pages)), longest=LONGEST_LINE)
    bad = first_not_finite(source.tensors) if check else None
    if bad is not None:
        raise CheckpointError(f"{path}: tensor {bad[0]!r} holds {bad[1]}; get the checkpoint again")
    if check:
        show(f"\nchecked: all {len(source.tensors):,} tensors are finite (this layout carries no hash)")
