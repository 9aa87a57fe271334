"""Files that lines and the command line name: pictures, masks and controls. A run that goes on needs the same ones."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from minidiff.cli.many.lines import Line
from minidiff.pipeline.recipe import PICTURES

WHOLE = 64 << 20  # bytes up to which all of a file is read; of a larger one, a model, pieces at equal distances
PIECES, PIECE = 64, 1 << 14


def hashes(args: Namespace, lines: Iterable[Line]) -> dict[str, str]:
    """Return a hash of each file or folder that a picture is made from, beside the model and its adapters, by name.

    What cannot be read is left out: its line says so in its turn.
    """
    asked = [{name: getattr(args, name) for name in PICTURES}, *(line.asked for line in lines)]
    named = {str(one[name]) for one in asked for name in PICTURES if one.get(name) is not None}
    controls = [control for one in asked for control in one.get("control") or ()]
    named |= {path for control in (*args.control, *controls) for path in (control.path, control.picture)}
    found = {}
    for path in sorted(named):
        with suppress(OSError):
            found[path] = fingerprint(Path(path))
    return found


def fingerprint(path: Path) -> str:
    """Return a hash of a file's name, size and contents, or of those of the files of a folder, 32 hex digits.

    Of a folder, the files that lie in it count, as those of a control do, and no folder inside it. Devices and pipes
    are not opened. Raises OSError for what cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode(errors="surrogateescape"))
            for piece in _pieces(file):
                digest.update(piece)
    return digest.hexdigest()[:32]


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= WHOLE:
            yield opened.read(WHOLE)
            return
        for k in range(PIECES):
            opened.seek(k * (size - PIECE) // (PIECES - 1))
            yield opened.read(PIECE)
