"""Reader of picture files, and conversion of every mode that Pillow has to 8-bit RGB or grey.

Pillow opens many formats that are not used for pictures, and starts another program for some of them (Ghostscript for
PostScript, whatever the name of the file). Only ``FORMATS`` are tried. The format is detected from the content of a
file, not from its name.

Deep pictures are scaled to 8 bits, not clipped at 255 as by Pillow's own ``convert``. For a file of up to 16 bits,
white is 65535. For a picture in memory, for 32 bits and for floats, white is the top of the narrowest usual range that
holds the values: 0..255, 0..65535 and 0..2**31 - 1 for whole numbers, 0..1, 0..255 and 0..65535 for floats.

Frames beyond the first and colour profiles are not used; :func:`unused` says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from minidiff.console import one_line, warn
from minidiff.errors import CheckpointError
from minidiff.pipeline.colour_profile import is_srgb
from minidiff.storage.reading import HEAD, content_of, open_regular

if TYPE_CHECKING:
    from PIL import Image

# What is read, by Pillow's names; TGA, which no first bytes announce, comes last. HEIF only where a program that uses
# minidiff has registered a reader for it.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "QOI", "HEIF", "TGA")
NO_PICTURES = {
    "lfs pointer": "a Git LFS pointer, not the picture itself; run `git lfs pull` where it was cloned",
    "web page": "a web page, not a picture; the download went wrong",
    "safetensors": "a safetensors file, not a picture",
    "empty": "empty",
}
ORIENTATION = 0x0112  # Exif's word for how the camera was held, and which of Pillow's transpositions rights it
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
BITS, PHOTOMETRIC, SIGNED = 258, 262, 339  # TIFF's tags
DEEP = 65535  # white in 16 bits


def open_picture(path: Any, name: str = "picture", tell: Callable[[str], object] | None = None) -> Image.Image:
    """Open a picture file as 8-bit RGB or L, rotated by its Exif orientation; see :func:`to_eight_bits`.

    ``name``: name of the path in messages. ``tell`` is called with each part of the file that is not used (see
    :func:`unused`), by default a warning. Raises :class:`CheckpointError` for a file that is missing, damaged, or in
    none of ``FORMATS``.
    """
    from PIL import Image

    if not os.path.exists(path):
        raise CheckpointError(f"{os.fspath(path)}: no such file; {name} names a picture")
    with open_regular(path) as file:
        mistaken = NO_PICTURES.get(content_of(file.read(HEAD)))
        if mistaken is not None:
            raise CheckpointError(f"{os.fspath(path)}: no readable picture (is {mistaken})")
        try:
            with Image.open(file, formats=formats()) as opened:
                opened.load()
                turn = UPRIGHT.get(_orientation(opened))
                image, parts = to_eight_bits(opened), list(unused(opened))
            upright = image if turn is None else image.transpose(Image.Transpose[turn])
        except MemoryError:
            raise
        except Exception as e:  # Pillow's readers run into whatever a damaged file leads them to
            raise CheckpointError(f"{os.fspath(path)}: no readable picture ({complaint(e)})") from None
    for part in parts:
        if tell is None:
            warn(f"{os.fspath(path)}: has {part}")
        else:
            tell(part)
    return upright


def formats() -> list[str]:
    """Return those of ``FORMATS`` that the installed Pillow reads."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def suffixes() -> set[str]:
    """Return the file name suffixes, ".png" and so on, of :func:`formats`."""
    from PIL import Image

    known = {*formats(), "MPO"}  # a JPEG with more pictures behind the first
    return {end for end, name in Image.registered_extensions().items() if name in known}


def complaint(e: BaseException) -> str:
    """Return the error of a picture reader in a few words."""
    from PIL import UnidentifiedImageError

    if isinstance(e, UnidentifiedImageError):
        return f"is none of {', '.join(formats())}"
    return one_line(e or type(e).__name__, 200)


def unused(image: Image.Image) -> Iterator[str]:
    """Yield a few words on each part of a picture that minidiff does not use: further frames or pages, a colour profile
    other than sRGB.

    Not on the further frames if the caller has chosen one (``image.seek``), nor on the small pictures that cameras put
    behind a JPEG (MPO).
    """
    if image.format != "MPO" and image.tell() == 0 and _has_frames(image):
        yield "more than one frame, of which only the first is used"
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and profile and not is_srgb(profile):
        yield "a colour profile other than sRGB, which is ignored"


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame; the first is sound
        return True


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # of notes that are damaged nothing can be known; the picture is sound
        return None


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8-bit RGB, or to L if it is grey and opaque. Deep pictures are scaled (see
    above), transparent ones composed over white.

    Pictures in RGB or L are returned unchanged. Raises ValueError for a picture without pixels, for floats that are not
    finite or have an unusual range, and the errors of Pillow for a damaged picture.
    """
    from PIL import Image

    if 0 in image.size:
        raise ValueError(f"{image.width} x {image.height} pixels")
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        return _from_deep(image)
    if image.mode == "La":  # grey that was multiplied with its alpha: Pillow converts it to nothing
        grey, alpha = (np.asarray(image)[..., k].astype(np.int32) for k in (0, 1))
        return Image.fromarray(np.minimum(grey + 255 - alpha, 255).astype(np.uint8))
    if is_transparent(image):
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Return True if a picture has an alpha channel, a transparent colour, or a palette with one."""
    palette = image.palette.mode if image.mode == "P" and image.palette is not None else ""
    return image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info or palette.endswith("A")


def _from_deep(image: Image.Image) -> Image.Image:
    """Convert a picture of 16 or 32 bits, or of floats, to L."""
    from PIL import Image

    values, white, inverted = _range(image)
    clear = image.info.get("transparency")
    grey = np.rint(np.clip(values.astype(np.float32) * (255 / white), 0, 255)).astype(np.uint8)
    if inverted:
        grey = 255 - grey
    if isinstance(clear, int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _range(image: Image.Image) -> tuple[Any, float, bool]:
    """Return the values of a deep picture, the value of white, and True if the scale is inverted (0 is white)."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    inverted = tags.get(PHOTOMETRIC) == 0
    if image.mode == "F":
        least, most = float(values.min()), float(values.max())
        if not np.isfinite([least, most]).all():  # NaN anywhere makes both NaN
            raise ValueError("it holds NaN or infinite values")
        for bound, white in ((2, 1), (256, 255), (DEEP + 1, DEEP)):  # a little beyond 1 is still meant as 1
            if most < bound:
                return values, white, inverted
        raise ValueError(f"it has float values up to {most:g}; 0..1, 0..255 and 0..65535 are read")
    if tags:
        bits, signed = tags.get(BITS, (16,))[0], tags.get(SIGNED, (1,))[0] == 2
        if bits < 32:
            return values, float(2 ** (bits - signed) - 1), inverted
        if not signed:  # which Pillow reads as if they were
            values = values.view(np.uint32)
    elif image.format is not None:
        return values, DEEP, False
    return values, next(w for w in (255, DEEP, 2**31 - 1, 2**32 - 1) if int(values.max()) <= w), inverted
