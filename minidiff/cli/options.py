"""Options that several commands share, and those that come from the fields of a record.

The grammar of a command is read before anything heavy is imported, so that ``--help`` and a misspelt option answer at
once. Defaults that a picture's recipe may fill are None here.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minidiff.pipeline.request import Option, options

DTYPES = ("float32", "float16", "bfloat16")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
PARTS = ("vae", "unet", "text_encoder", "text_encoder_2")


def about(commands: Any, name: str, what: str, examples: str, more: str = "") -> Any:
    """Add command ``name`` with its one line of help and its examples; return its parser."""
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.{more}", epilog=examples)


def add_options(
    groups: Mapping[str, Any], record: type, only: tuple[str, ...] | None = None, help: Mapping[str, str] | None = None
) -> None:
    """Add the options of a record (:func:`minidiff.pipeline.request.ask`), each to the group that it names.

    ``only``: the fields to add. ``help``: other help texts, by field.
    """
    for f, option in options(record):
        if only is not None and f.name not in only:
            continue
        if option.record is not None:  # a record in a record: its options stand in its place
            for g, inner in options(option.record):
                _add(groups, f"{f.name}_{g.name}", inner)
        elif option.flag:
            _add(groups, f.name, option, (help or {}).get(f.name))


def _add(groups: Mapping[str, Any], name: str, option: Option, help: str | None = None) -> None:
    group = groups.get(option.group) or next(iter(groups.values()))
    group.add_argument(
        option.flag, dest=name, type=option.read, metavar=option.metavar, help=option.help if help is None else help
    )


def given(args: Namespace, record: type, base: Any = None) -> dict[str, Any]:
    """Return the fields of a record that the command line gives, by name; ``base``, a record, fills in the others."""
    found = {}
    for f, option in options(record):
        before = None if base is None or not base.gives(f) else getattr(base, f.name)
        value = getattr(args, f.name, None) if option.flag else None
        if option.record is not None:
            parts = {g.name: getattr(args, f"{f.name}_{g.name}") for g, _ in options(option.record)}
            named = {name: part for name, part in parts.items() if part is not None}
            value = replace(before or option.record(), **named) if named else None
        if value is not None or before is not None:
            found[f.name] = before if value is None else value
    return found


def add_parts(p: Any) -> None:
    """Add the options for weights, parts from other files, and facts that a file may not contain."""
    p.add_argument(
        "--variant", metavar="NAME", help="variant of the weights in a folder that holds several: fp16, non_ema, ..."
    )
    for part in PARTS:
        name = part.replace("_", "-")
        what = {"text_encoder_2": "second text encoder (SDXL)"}.get(part, part.replace("_", " "))
        p.add_argument(f"--{name}", metavar="PATH", help=f"take the {what} from this file or folder")
    add_prediction(p)


def add_prediction(p: Any) -> None:
    """Add the option for what the model predicts."""
    p.add_argument("--prediction", choices=PREDICTIONS, help="what the model predicts, where its file does not say")


def sampler_list() -> str:
    """Return the end of a help text that lists the samplers."""
    from minidiff.samplers import SAMPLERS

    listed = textwrap.fill(" ".join(SAMPLERS), 78, initial_indent="  ", subsequent_indent="  ")
    return f"\nsamplers:\n{listed}\n"


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
