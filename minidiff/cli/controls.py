"""``--control``: a ControlNet or T2I-Adapter with the picture that it reads.

    FILE=PICTURE[,WEIGHT[,LOW[,HIGH]]][,soft][,guess]

Names of files may hold "=" and "," as well, so the text is read from the right: numbers and words first, then the
picture. Of several ways to read it, that in which both files exist counts.
"""

from __future__ import annotations

import argparse
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from minidiff.config import quote
from minidiff.console import say
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.request import read_number
from minidiff.storage.reading import missing

if TYPE_CHECKING:
    from minidiff.adapters.control import Control, ControlModel
    from minidiff.pipeline import StableDiffusion
    from minidiff.pipeline.recipe import Steered

FORM = "FILE=PICTURE[,WEIGHT[,LOW,HIGH]]"
WORDS: dict[str, dict[str, Any]] = {
    "soft": {"soft": 0.825},  # each output by this factor less than the next deeper one, as in other programs
    "guess": {"guess": True},
}
# What a model expects to see, by a word in its file's name.
EXPECTS = {
    "canny": "white edges on black, as Canny's detector draws them",
    "softedge": "soft edges, white on black (HED, PiDiNet)",
    "hed": "soft edges, white on black (HED)",
    "mlsd": "straight lines, white on black (M-LSD)",
    "lineart": "a line drawing, white on black",
    "scribble": "scribbles, white on black",
    "sketch": "a sketch, white on black",
    "depth": "a depth map, near is bright",
    "normal": "surface normals as colours",
    "pose": "a pose as coloured limbs on black (OpenPose)",
    "seg": "a segmentation in flat colours",
    "shuffle": "a picture whose content is taken, not its places",
    "tile": "a small or blurred picture, whose details are painted anew",
    "inpaint": "the picture itself, with -1 where it is to be painted, which only Python can give",
    "ip2p": "the picture that the prompt's instruction changes",
    "color": "a coarse mosaic of colours",
    "qr": "a pattern in black and white",
}


class Named(NamedTuple):
    """A control as the command line names it: its file, its picture, and the settings that were given."""

    path: str
    picture: str
    settings: dict[str, Any]


def expects(path: str) -> str | None:
    """Return what a model with this file name expects to see, as far as the name tells."""
    name = os.path.basename(os.path.normpath(path)).lower()
    return next((text for word, text in EXPECTS.items() if word in name), None)


def read_control(text: str) -> Named:
    """Read the value of ``--control``. Raises argparse.ArgumentTypeError for a text of another form."""
    ways = list(_ways(text))
    there = [way for way in ways if os.path.lexists(way.path) and os.path.lexists(way.picture)]
    if not ways or (not there and os.path.lexists(text)):  # a file alone, whatever signs are in its name
        wanted = expects(text)
        told = f"; a model of that name expects {wanted}" if wanted else ""
        raise argparse.ArgumentTypeError(f"{text!r} should be {FORM}, with the picture that the model reads{told}")
    half = [way for way in ways if os.path.lexists(way.path)]
    return (there or half or ways)[0]


def written(one: Steered) -> str:
    """Return a control of a recipe as ``--control`` takes it."""
    numbers, usual = [one.weight, one.low, one.high], [1.0, 0.0, 1.0]
    while numbers and numbers[-1] == usual[len(numbers) - 1]:
        numbers.pop()
    words = [word for word, set_ in WORDS.items() if all(getattr(one, name) == value for name, value in set_.items())]
    return ",".join([f"{one.name or 'FILE'}={one.picture or 'PICTURE'}", *(f"{x:g}" for x in numbers), *words])


def _ways(text: str) -> Iterator[Named]:
    """Yield every way to read ``text``, most settings first, then the longest name of the model's file."""
    pieces = text.split(",")
    found: list[dict[str, Any]] = [{}]
    for k in range(1, len(pieces)):
        settings = _settings(pieces[-k:])
        if settings is None:
            break
        found.append(settings)
    for k in reversed(range(len(found))):
        rest = ",".join(pieces[: len(pieces) - k])
        for i in reversed(range(len(rest))):
            if rest[i] == "=" and rest[:i] and rest[i + 1 :]:
                yield Named(rest[:i], rest[i + 1 :], found[k])


def _settings(pieces: list[str]) -> dict[str, Any] | None:
    """Return what the last pieces of a text set, or None if they are not up to three numbers, then words."""
    numbers = [piece for piece in pieces if piece not in WORDS]
    words = pieces[len(numbers) :]
    if pieces != [*numbers, *words] or len(numbers) > 3 or len(set(words)) < len(words):
        return None
    try:
        values = [read_number(piece) for piece in numbers]
    except argparse.ArgumentTypeError:
        return None
    settings: dict[str, Any] = dict(zip(("weight", "low", "high"), values, strict=False))
    for word in words:
        settings |= WORDS[word]
    return settings


def check_there(args: Namespace) -> None:
    """Raise :class:`CheckpointError` for a file that is missing, before anything is opened."""
    for named in args.control:
        for path, what in ((named.path, "model"), (named.picture, "picture")):
            if not os.path.exists(path):
                raise CheckpointError(f"--control: the {what} {missing(path, 'file or folder')}")


def open_controls(
    pipe: StableDiffusion, wanted_ones: Sequence[Named], models: dict[str, ControlModel], *, quiet: bool
) -> list[Control]:
    """Open the controls that were named, in the precision of ``pipe``. ``models``: those that are open, by path."""
    from minidiff import Control

    found = []
    for named in wanted_ones:
        if named.path not in models:
            models[named.path] = open_control(named.path, pipe)
            wanted = expects(named.path)
            if wanted and not quiet:
                say(f"{quote(os.path.basename(os.path.normpath(named.path)))} expects {wanted}")
        found.append(Control(models[named.path], named.picture, **named.settings))
    return found


def open_control(path: str, pipe: StableDiffusion) -> ControlModel:
    """Open the control at ``path``, of any layout, to work beside ``pipe``. Raises :class:`ConfigError` for a model."""
    import weights_convert
    from minidiff import ControlModel

    low_memory = pipe.low_memory is not None
    found = weights_convert.load(path, pipe.device, pipe.dtype, low_memory=low_memory)
    if not isinstance(found, ControlModel):
        raise ConfigError(f"--control {path}: a {found.config.family} model; name a ControlNet or a T2I-Adapter")
    return found
