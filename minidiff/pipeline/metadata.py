"""Texts inside picture files: what a program wrote there about how the picture was made.

PNG has chunks of text (tEXt, zTXt and iTXt; PNG 3rd edition, section 11.3.3). To read them, only these are parsed: the
picture itself may be large, or damaged, and is not decoded. JPEG and WebP have Exif's user comment, into which other
programs write their text, and XMP (ISO 16684-1), which holds minidiff's recipe there and, in all formats, the mark of
the IPTC that a picture was made by a trained model.
"""

from __future__ import annotations

import html
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

from minidiff.config import check
from minidiff.console import one_line
from minidiff.errors import CheckpointError
from minidiff.storage.reading import open_regular

KEY = "minidiff"  # the recipe's
PARAMETERS = "parameters"  # AUTOMATIC1111's text, under this name in a PNG and as Exif's user comment elsewhere
GRAPHS = ("prompt", "workflow")  # ComfyUI's, in a PNG; elsewhere "prompt:..." in Exif's texts on the camera
XMP = "XML:com.adobe.xmp"  # its name in a PNG
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # those written, by suffix

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
MOST_CHUNKS = 1 << 20  # of a file; the pixels of a picture of a gigabyte are in some 100,000
MOST_IN_JPEG = 65_000  # bytes of XMP or Exif: a segment's length has 16 bits
EXIF, USER_COMMENT, CAMERA = 0x8769, 0x9286, (0x010F, 0x0110)  # Exif's tags
COMMENT, ASCII = b"UNICODE\0", b"ASCII\0\0\0"  # what comes before a user comment in UTF-16, and before another one

MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MADE_IN_PART = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
NAMESPACE = "urn:minidiff:recipe"


def texts_of(path: str | os.PathLike[str], most: int) -> dict[str, str]:
    """Return the texts of a PNG, JPEG or WebP file, by the names that they have in a PNG; the first of each name.

    Raises :class:`CheckpointError` for a file in another format, and for a text that is damaged or longer than ``most``
    bytes.
    """
    return _of_png(path, most) if format_of(path) == "PNG" else _of_other(path, most)


def format_of(path: str | os.PathLike[str]) -> str:
    """Return which of ``FORMATS`` a file has by its first bytes. Raises :class:`CheckpointError` for another one."""
    with open_regular(path) as file:
        head = file.read(12)
    if head.startswith(SIGNATURE):
        return "PNG"
    if head.startswith(b"\xff\xd8"):
        return "JPEG"
    if head.startswith(b"RIFF") and head.endswith(b"WEBP"):
        return "WEBP"
    raise CheckpointError(f"{os.fspath(path)}: carries no recipe; it is not a PNG, JPEG or WebP file")


def suffix_of(path: str | os.PathLike[str]) -> str:
    """Return the suffix of a file in lower case, or one of its format's if it has another one's."""
    own, kind = os.path.splitext(os.fspath(path))[1].lower(), format_of(path)
    return own if FORMATS.get(own) == kind else next(suffix for suffix, name in FORMATS.items() if name == kind)


def _of_png(path: str | os.PathLike[str], most: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, data in _chunks(path, most):
        raw, _, rest = data.partition(b"\0")
        name = raw.decode("latin-1")
        if name in (KEY, PARAMETERS, *GRAPHS) and name not in found:
            try:
                found[name] = _decoded(kind, rest, most)
            except (ValueError, IndexError, zlib.error) as e:  # UnicodeDecodeError is a ValueError
                raise CheckpointError(f"{os.fspath(path)}: its text {name!r} is damaged ({e})") from None
    return found


def _chunks(path: str | os.PathLike[str], most: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield (type, content) of every chunk of text."""
    with open_regular(path) as file:
        file.seek(len(SIGNATURE))
        for _ in range(MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return
            length, kind = struct.unpack(">I4s", head)
            if kind not in TEXTS:
                file.seek(length + 4, os.SEEK_CUR)
                continue
            if length > most:
                raise CheckpointError(f"{os.fspath(path)}: has a text of {length:,} bytes; {most:,} is the most")
            data, check = file.read(length), file.read(4)
            if len(data) < length or check != struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))):
                raise CheckpointError(f"{os.fspath(path)}: a text in it is damaged; get the picture again")
            yield kind, data


def _decoded(kind: bytes, data: bytes, most: int) -> str:
    """Decode the bytes after a text's name, led by a compression method in two of the kinds, by languages in one."""
    if kind == b"tEXt":
        return data.decode("latin-1")
    if kind == b"zTXt":
        return _inflated(data[1:], most).decode("latin-1")
    packed = data[0] != 0
    _, _, rest = data[2:].partition(b"\0")  # the language
    _, _, rest = rest.partition(b"\0")  # the name in it
    return (_inflated(rest, most) if packed else rest).decode("utf-8")


def _inflated(data: bytes, most: int) -> bytes:
    inflate = zlib.decompressobj()
    out = inflate.decompress(data, most)
    if inflate.unconsumed_tail or not inflate.eof:
        raise ValueError(f"it is cut short, or longer than {most:,} bytes")
    return out


def _of_other(path: str | os.PathLike[str], most: int) -> dict[str, str]:
    """Read Exif and XMP of a JPEG or WebP file; Pillow opens it without decoding the picture."""
    from PIL import Image

    found: dict[str, str] = {}
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=("JPEG", "WEBP")) as image:
                xmp, exif = image.info.get("xmp"), image.getexif()
                comment = exif.get_ifd(EXIF).get(USER_COMMENT)
                camera = [exif.get(tag) for tag in CAMERA]
        except MemoryError:
            raise
        except Exception as e:  # Pillow's readers run into whatever a damaged file leads them to
            raise CheckpointError(f"{os.fspath(path)}: no readable picture ({one_line(e, 200)})") from None
    for held in (xmp, comment, *camera):
        if isinstance(held, (bytes, str)) and len(held) > most:
            raise CheckpointError(f"{os.fspath(path)}: has a text of {len(held):,} bytes; {most:,} is the most")
    recipe = recipe_in_xmp(xmp)
    if recipe is not None:
        found[KEY] = recipe
    if isinstance(comment, bytes) and comment.startswith(COMMENT):
        found[PARAMETERS] = _utf16(comment[len(COMMENT) :])
    elif isinstance(comment, bytes) and comment.startswith(ASCII):
        found[PARAMETERS] = comment[len(ASCII) :].decode("utf-8", "replace").rstrip("\0")
    for text in camera:
        for name in GRAPHS:
            if isinstance(text, str) and text.startswith(f"{name}:"):
                found.setdefault(name, text[len(name) + 1 :])
    return found


def _utf16(data: bytes) -> str:
    """Decode UTF-16 in either order of bytes: programs disagree, and of the two the right one has more ASCII."""
    both = [data.decode(name, "replace") for name in ("utf-16-be", "utf-16-le")]
    return max(both, key=lambda text: sum(c.isascii() for c in text))


def recipe_in_xmp(xmp: Any) -> str | None:
    """Return minidiff's recipe in an XMP packet, None if there is none."""
    text = xmp.decode("utf-8", "replace") if isinstance(xmp, bytes) else str(xmp or "")
    found = re.search(r"\bminidiff:recipe=(?:\"([^\"]*)\"|'([^']*)')", text)
    return None if found is None else html.unescape(found[1] or found[2] or "")


def packet(source: str | None, recipe: str | None = None) -> str:
    """Return an XMP packet: ``source``, the IPTC's type of the picture's source, and minidiff's recipe."""
    fields = []
    if source is not None:
        space = quoteattr("http://iptc.org/std/Iptc4xmpExt/2008-02-29/")
        fields.append(f" xmlns:Iptc4xmpExt={space} Iptc4xmpExt:DigitalSourceType={quoteattr(source)}")
    if recipe is not None:
        fields.append(f" xmlns:minidiff={quoteattr(NAMESPACE)} minidiff:recipe={quoteattr(recipe)}")
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about=""{"".join(fields)}/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def options_for(format: str, texts: Mapping[str, str], source: str | None) -> dict[str, Any]:
    """Return the arguments of Pillow's ``save`` that put ``texts`` and the mark ``source`` into a file of ``format``.

    Raises :class:`ConfigError` for texts that are too long for a JPEG.
    """
    if format == "PNG":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for name, text in texts.items():
            info.add_text(name, text) if text.isascii() else info.add_itxt(name, text)
        if source is not None:
            info.add_itxt(XMP, packet(source))
        return {"pnginfo": info}
    found: dict[str, Any] = {"quality": 95}
    recipe = texts.get(KEY)
    if source is not None or recipe is not None:
        found["xmp"] = packet(source, recipe).encode()
    if PARAMETERS in texts:
        found["exif"] = _exif(texts[PARAMETERS])
    for what in ("xmp", "exif"):
        size = len(found.get(what, b""))
        fits = format != "JPEG" or size <= MOST_IN_JPEG
        check(fits, f"a recipe of {size:,} bytes is too long for a JPEG, which holds {MOST_IN_JPEG:,}; write a PNG")
    return found


def _exif(comment: str) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(EXIF)[USER_COMMENT] = COMMENT + comment.encode("utf-16-be", "replace")
    return exif.tobytes()
