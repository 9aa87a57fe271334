"""Numbers to pictures, and how a picture was made, kept inside it: a JSON text chunk of the PNG, key "minidiff"."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.console import one_line
from minidiff.errors import CheckpointError
from minidiff.pipeline import png
from minidiff.storage.writing import Existing, atomic

if TYPE_CHECKING:
    from PIL import Image

KEY = "minidiff"
LONGEST_RECIPE = 16 << 20  # bytes: room for the longest prompt


def to_unit(pixels: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], what lies outside cut off."""
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """float (B, 3 or 1, H, W) in [0, 1] -> PIL images, rounded to the nearest of 256 levels."""
    from PIL import Image

    arrays = (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def save_png(image: Image.Image, path: str | os.PathLike[str], existing: Existing = "replace") -> Path:
    """Write ``image`` to ``path`` as PNG, atomically, with the recipe that ``generate`` left in it; gives the path.

    ``existing``: what becomes of a file that has the name already. "replace" takes its place, "refuse" raises
    :class:`ConfigError`, "next" takes the next free name: ``star-2.png`` after ``star.png``.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if KEY in image.info:
        info.add_text(KEY, image.info[KEY])
    with atomic(path, existing) as file:
        image.save(file, format="PNG", pnginfo=info)
    return file.path


def label(image: Image.Image, recipe: dict[str, Any]) -> Image.Image:
    """Put ``recipe`` into ``image``. JSON in ASCII, so that any prompt survives any PNG reader."""
    image.info[KEY] = json.dumps(recipe)
    return image


def read_recipe(image: Image.Image | str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe of a picture or of a PNG file.

    Raises :class:`CheckpointError` for a file that is no picture, or a picture that carries no recipe.
    """
    if isinstance(image, (str, os.PathLike)):
        name, text = os.fspath(image), png.text(image, KEY, LONGEST_RECIPE)
    else:
        name, text = "the picture", image.info.get(KEY)
    if text is None:
        raise CheckpointError(f"{name}: carries no recipe; it was not saved by minidiff")
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{name}: its recipe is damaged ({one_line(e, 200)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}: its recipe is damaged, a {type(found).__name__} where an object should be")
    return found
