"""The picture and the mask that a run begins from: the ones given, or some that show much.

What both sides are handed has the run's size already, so how a program resizes pictures is no part of the comparison.
The picture that is made, in whole numbers and so alike everywhere, has slopes, edges and a grain in it; the mask is a
disc with a soft rim, off the latents' grid: where it is cut to black and white, and how it is brought to their size,
make a difference.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import numpy as np

from minidiff.config import check
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.pixels import open_picture

if TYPE_CHECKING:
    from PIL import Image


def starting_from(args: Namespace, pipe: StableDiffusion, width: int, height: int) -> dict[str, Any]:
    """``image``, ``mask`` and ``strength`` of a run by the options of these names: what is given, or made where the
    model cannot do without; nothing for a run from noise alone."""
    masked = args.mask is not None or pipe.reads_mask
    if not (masked or args.image is not None or pipe.config.reads_score):
        check(args.strength is None, "--strength says how much of a picture may change: give an --image too")
        return {}
    made = {"image": picture(args.image, width, height), "mask": mask(args.mask, width, height) if masked else None}
    return {**made, "strength": args.strength}


def picture(path: str | None, width: int, height: int) -> Image.Image:
    """The file as an RGB picture of that size, or the one that is made. Raises :class:`CheckpointError` for a file that
    is missing or no picture."""
    from PIL import Image

    if path is not None:
        return open_picture(path, "--image").convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    x, y = np.arange(width), np.arange(height)[:, None]
    slopes = 255 * x // width + 0 * y, 255 * y // height + 0 * x
    checks = (x * 8 // width + y * 8 // height) % 2 * 150
    grain = (x * 37 + y * 59) ** 2 % 101
    return Image.fromarray(np.stack([*slopes, checks + grain], axis=-1).astype(np.uint8))


def mask(path: str | None, width: int, height: int) -> Image.Image:
    """The file as a grey picture of that size, white where the model paints, or the one that is made. Raises
    :class:`CheckpointError` for a file that is missing or no picture."""
    from PIL import Image

    if path is not None:
        return open_picture(path, "--mask").convert("L").resize((width, height), Image.Resampling.NEAREST)
    x, y = np.arange(width) - width * 4 // 9, np.arange(height)[:, None] - height * 5 // 9
    far = (x * x + y * y) * 1024 // (min(width, height) ** 2)  # 256 at half of the shorter side, where it is black
    return Image.fromarray(np.clip(383 - far * 3 // 2, 0, 255).astype(np.uint8))
