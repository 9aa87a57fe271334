"""Pictures beside each other, with labels: strips of a run, grids of many runs, films."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from typing import IO, TYPE_CHECKING, Any

from minidiff.pipeline.metadata import MADE, options_for, packet

if TYPE_CHECKING:
    from PIL import Image

SMALLEST = 96  # pixels of a side: smaller pictures are enlarged, in whole steps
MARGIN = 4  # pixels around a label
# Fonts that a system may have, for labels with letters that Pillow's own lacks; the first with all of them is taken.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf", "segoeui.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSerifCJK-Regular.ttc", "msyh.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc"),
    *("wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "simsun.ttc", "malgun.ttf", "YuGothM.ttc"),
)
SIZE, NO_LETTER = 12, "\uffff"  # of a font, in pixels; what no font has
FRAME, LAST = 100, 1500  # milliseconds that a frame of a film is shown


def table(cells: Sequence[Sequence[Image.Image]], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Return one picture of ``cells``, row by row, with a label above each column and left of each row.

    Empty labels of all rows, or of all columns, take no room. The cells of a column may differ in size.
    """
    from PIL import Image, ImageDraw

    shown = [[enlarged(cell) for cell in row] for row in cells]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    draw.font = font_for("".join([*columns, *rows]))
    width = max(max(cell.width for cell in row) for row in shown)
    height = max(max(cell.height for cell in row) for row in shown)
    above = [_wrapped(draw, label, width) for label in columns]
    beside = [_wrapped(draw, label, width) for label in rows]
    top = max((_extent(draw, label)[1] for label in above), default=0)
    left = max((_extent(draw, label)[0] for label in beside), default=0)
    whole = Image.new("RGB", (left + width * len(columns), top + height * len(rows)), "white")
    font, draw = draw.font, ImageDraw.Draw(whole)
    for j, label in enumerate(above):
        draw.multiline_text((left + j * width + MARGIN, MARGIN), label, fill="black", font=font)
    for i, (label, row) in enumerate(zip(beside, shown, strict=True)):
        draw.multiline_text((MARGIN, top + i * height + MARGIN), label, fill="black", font=font)
        for j, cell in enumerate(row):
            whole.paste(cell, (left + j * width, top + i * height))
    return whole


def font_for(text: str) -> Any:
    """Return Pillow's own font, or the first of ``FONTS`` that the system has, if only that has every letter of
    ``text``."""
    from PIL import ImageFont

    own = ImageFont.load_default()
    if _has(own, text):
        return own
    for name in FONTS:
        with suppress(OSError):
            found = ImageFont.truetype(name, SIZE)
            if _has(found, text):
                return found
    return own


def _has(font: Any, text: str) -> bool:
    """Return True if ``font`` has every letter of ``text``. It draws a box, or nothing, for one that it lacks."""

    def drawn(letter: str) -> bytes:
        from PIL import Image, ImageDraw

        image = Image.new("L", (2 * SIZE, 2 * SIZE))
        ImageDraw.Draw(image).text((0, 0), letter, fill=255, font=font)
        return image.tobytes()

    letters = sorted({c for c in text if c.isprintable() and not c.isspace()})
    if all(c.isascii() for c in letters):
        return True
    try:
        missing = (drawn(" "), drawn(NO_LETTER))
        return all(drawn(c) not in missing for c in letters)
    except UnicodeError:  # of Pillow's font without FreeType
        return False


def enlarged(image: Image.Image) -> Image.Image:
    """Return a picture with sides of at least ``SMALLEST``, each pixel a square."""
    from PIL import Image

    times = -(-SMALLEST // min(image.size))
    if times == 1:
        return image
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _wrapped(draw: Any, text: str, width: int) -> str:
    """Break a label into lines of at most ``width`` pixels, at spaces where there are some."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer) > width - 2 * MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _extent(draw: Any, text: str) -> tuple[int, int]:
    if not text:
        return 0, 0
    _, _, right, bottom = draw.multiline_textbbox((0, 0), text)
    return int(right) + 2 * MARGIN, int(bottom) + 2 * MARGIN


def save_film(frames: Sequence[Image.Image], file: IO[bytes], format: str, mark: bool = True) -> None:
    """Write ``frames`` to ``file`` as an endless GIF or APNG (``format``: "GIF" or "PNG"); the last stays longer.

    ``mark``: note in the file that a trained model made it (the IPTC's DigitalSourceType).
    """
    first, *others = [enlarged(frame) for frame in frames]
    durations = [FRAME] * len(others) + [LAST]
    options: dict[str, Any] = {"save_all": True, "append_images": others, "duration": durations, "loop": 0}
    if format != "GIF":
        first.save(file, format=format, **options, **options_for(format, {}, MADE if mark else None))
        return
    written = BytesIO()
    first.save(written, format=format, **options)
    data = written.getvalue()
    file.write(with_xmp(data, packet(MADE)) if mark else data)


def with_xmp(gif: bytes, xmp: str) -> bytes:
    """Return a GIF with a packet of XMP, which Pillow does not write (ISO 16684-3, section 1.1.2).

    It is an extension behind the table of colours. Its text stands there whole; readers that take it for blocks, each
    led by its length, arrive somewhere in the trailer, and walk down it to the end.
    """
    table = 3 << (gif[10] & 7) + 1 if gif[10] & 0x80 else 0
    at = 13 + table
    trailer = b"\1" + bytes(range(255, -1, -1)) + b"\0"
    return gif[:at] + b"\x21\xff\x0bXMP DataXMP" + xmp.encode() + trailer + gif[at:]
