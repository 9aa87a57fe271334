"""Picture and mask that a run starts from: the given ones, or synthetic ones.

Both sides get pictures of the run's size, so resizing is no part of the comparison. The synthetic picture is computed
in integers, so that it is the same everywhere, and has gradients, edges and grain. The mask is a disc with a soft rim
that is not aligned to the latents' grid, so that its threshold and the way it is resized make a difference.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import numpy as np

from minidiff.config import check
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.image_files import open_picture

if TYPE_CHECKING:
    from PIL import Image


def start_images(args: Namespace, pipe: StableDiffusion, width: int, height: int) -> dict[str, Any]:
    """Return ``image``, ``mask`` and ``strength`` of a run from the options of these names.

    Missing ones are synthesized if the model needs them; a run from noise alone has none.
    """
    masked = args.mask is not None or pipe.reads_mask
    if not (masked or args.image is not None or pipe.config.reads_score):
        check(args.strength is None, "--strength says how much of a picture may change: give an --image too")
        return {}
    made = {"image": image(args.image, width, height), "mask": mask(args.mask, width, height) if masked else None}
    return {**made, "strength": args.strength}


def image(path: str | None, width: int, height: int) -> Image.Image:
    """Return the file as an RGB picture of that size, or the synthetic one without a file.

    Raises :class:`CheckpointError` for a file that is missing or no picture.
    """
    from PIL import Image

    if path is not None:
        return open_picture(path, "--image").convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    x, y = np.arange(width), np.arange(height)[:, None]
    slopes = 255 * x // width + 0 * y, 255 * y // height + 0 * x
    checks = (x * 8 // width + y * 8 // height) % 2 * 150
    grain = (x * 37 + y * 59) ** 2 % 101
    return Image.fromarray(np.stack([*slopes, checks + grain], axis=-1).astype(np.uint8))


def mask(path: str | None, width: int, height: int) -> Image.Image:
    """Return the file as a grey picture of that size, white where the model paints, or the synthetic one.

    Raises :class:`CheckpointError` for a file that is missing or no picture.
    """
    from PIL import Image

    if path is not None:
        return open_picture(path, "--mask").convert("L").resize((width, height), Image.Resampling.NEAREST)
    x, y = np.arange(width) - width * 4 // 9, np.arange(height)[:, None] - height * 5 // 9
    far = (x * x + y * y) * 1024 // (min(width, height) ** 2)  # 256 at half of the shorter side, where it is black
    return Image.fromarray(np.clip(383 - far * 3 // 2, 0, 255).astype(np.uint8))
