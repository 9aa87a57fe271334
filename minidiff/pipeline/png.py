"""Output: pixels become picture files that carry their recipe, and the recipe is read back.

The recipe is JSON among the texts of the file (:mod:`metadata`). What minidiff made is also marked as made by a trained
model, in the words of the IPTC, since the law of several places asks for it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.config import check
from minidiff.console import one_line
from minidiff.errors import CheckpointError
from minidiff.pipeline.metadata import FORMATS, KEY, MADE, MADE_IN_PART, PARAMETERS, options_for, texts_of
from minidiff.storage.writing import Existing, atomic

if TYPE_CHECKING:
    from PIL import Image

MARK = "minidiff mark"  # of pictures without a recipe that are made of pictures: strips, grids
LONGEST_RECIPE = 16 << 20  # bytes: room for the longest prompt


def to_unit(pixels: Tensor) -> Tensor:
    """Map [-1, 1] to [0, 1]; values outside are clamped."""
    return (pixels / 2 + 0.5).clamp(0, 1)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert float (B, 3 or 1, H, W) in [0, 1] to PIL images, rounded to the nearest of 256 levels."""
    from PIL import Image

    arrays = (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def save_png(
    image: Image.Image, path: str | os.PathLike[str], existing: Existing = "replace", mark: bool = True
) -> Path:
    """Write ``image`` to ``path`` as PNG; for the rest see :func:`save_picture`."""
    return _save(image, path, "PNG", existing, mark)


def save_picture(
    image: Image.Image, path: str | os.PathLike[str], existing: Existing = "replace", mark: bool = True
) -> Path:
    """Write ``image`` to ``path``, atomically, with the recipe that ``generate`` left in it; return the path.

    The format follows the suffix: .png, .jpg, .jpeg or .webp. JPEG and WebP lose some of the picture (quality 95).
    ``existing``: treatment of a file that has the name already. "replace" takes its place, "refuse" raises
    :class:`ConfigError`, "next" takes the next free name: ``star-2.png`` after ``star.png``. ``mark``: note in the file
    of a picture with a recipe that it was made by a trained model (the IPTC's DigitalSourceType).

    Raises :class:`ConfigError` for another suffix, and for a recipe that is too long for a JPEG.
    """
    suffix = Path(path).suffix.lower()
    known = ", ".join(FORMATS)
    check(suffix in FORMATS, f"{os.fspath(path)}: {suffix or 'no suffix'} is none of {known}")
    return _save(image, path, FORMATS[suffix], existing, mark)


def _save(image: Image.Image, path: str | os.PathLike[str], format: str, existing: Existing, mark: bool) -> Path:
    texts = {name: image.info[name] for name in (KEY, PARAMETERS) if isinstance(image.info.get(name), str)}
    source = _source(texts[KEY]) if KEY in texts else image.info.get(MARK)
    options = options_for(format, texts, source if mark else None)
    with atomic(path, existing) as file:
        image.save(file, format=format, **options)
    return file.path


def _source(recipe: str) -> str:
    """Return the IPTC's word for the source of a picture: made in part where a mask kept the rest."""
    try:
        return MADE_IN_PART if "mask" in json.loads(recipe) else MADE
    except (ValueError, TypeError, RecursionError):  # a text of the caller's own
        return MADE


def marked(image: Image.Image) -> Image.Image:
    """Note that ``image``, which has no recipe, is made of pictures that a trained model made."""
    image.info[MARK] = MADE
    return image


def label(image: Image.Image, recipe: dict[str, Any]) -> Image.Image:
    """Put ``recipe`` into ``image``, as JSON in ASCII, so that any prompt survives any PNG reader."""
    image.info[KEY] = json.dumps(recipe)
    return image


def read_recipe(image: Image.Image | str | os.PathLike[str]) -> dict[str, Any]:
    """Return the recipe of a picture, or of a PNG, JPEG or WebP file.

    Raises :class:`CheckpointError` for a file in another format, and for a picture whose recipe is missing or damaged.
    """
    if isinstance(image, (str, os.PathLike)):
        name, text = os.fspath(image), texts_of(image, LONGEST_RECIPE).get(KEY)
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
