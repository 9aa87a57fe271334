"""Where pictures go: into which folder, under which name, and never silently over another file."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.errors import ConfigError
from minidiff.picture import read_recipe, save_png

if TYPE_CHECKING:
    from PIL import Image


class Destination:
    """A folder, and a file name if one was given; without it each picture is named by its prompt and seed.

    ``out``: a file name (".png" may be left out), a folder, or None for the current one. ``force``: a file that was
    there before is replaced. Raises :class:`ConfigError` for what is neither and OSError for a folder that cannot be
    written to: better now than after all the work.
    """

    def __init__(self, out: str | None = None, force: bool = False) -> None:
        self.folder, self.name, self.force = Path(out or "."), "", force
        self._written: set[Path] = set()
        if out is not None and not self.folder.is_dir() and not out.endswith(("/", os.sep)):
            path = self.folder
            if path.suffix.lower() not in ("", ".png"):
                raise ConfigError(f"--out {out}: pictures are PNG files; name it {path.stem}.png")
            self.folder, self.name = path.parent, path.stem + (path.suffix or ".png")
        if not self.folder.is_dir():
            raise ConfigError(f"--out {out}: there is no folder {self.folder}; create it first")
        try:
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as e:
            e.filename = str(self.folder)  # and not the random name that was tried
            raise

    def save(self, image: Image.Image) -> Path:
        """Write one picture with its recipe; gives the path, which has a number if its name was taken."""
        name = Path(self.name or self._name(image))
        path, n = self.folder / name, 1
        while path in self._written or (os.path.lexists(path) and not self.force):
            n += 1
            path = self.folder / f"{name.stem}-{n}{name.suffix}"
        save_png(image, path)
        self._written.add(path)
        return path

    def _name(self, image: Image.Image) -> str:
        recipe = read_recipe(image)
        return f"{slug(str(recipe.get('prompt') or recipe['model']))}-{recipe['seed']}.png"


def slug(text: str) -> str:
    """The first words of a text as a file name, in any script that the file system takes."""
    name = "-".join(re.findall(r"\w+", text.lower()))[:40].strip("-_")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name or "picture"
