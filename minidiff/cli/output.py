"""Output files of pictures: their folder and names; another file is never silently overwritten."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.metadata import FORMATS, PARAMETERS
from minidiff.pipeline.png import read_recipe, save_picture
from minidiff.pipeline.recipes import infotext
from minidiff.storage.writing import Existing, check_place, numbered
from minidiff.version import VERSION

if TYPE_CHECKING:
    from PIL import Image


FIELD = re.compile(r"\{(\w*)(?::0(\d))?\}")  # of a name: {seed}, or {k:03} with three digits
FIELDS = ("prompt", "seed", "k")


class Output:
    """Output folder, and a file name if one was given; without it each picture is named by its prompt and seed.

    ``out``: a file name (".png" may be left out), a folder, or None for the current one. In the file name ``{prompt}``,
    ``{seed}`` and ``{k}``, the number of the picture, are replaced. A folder that does not exist must end with a slash;
    it is created with the first picture. ``mark``: see :func:`save_picture`; ``infotext``: write the recipe as
    AUTOMATIC1111's text as well. ``force``: replace a file that existed before (of a
    link, the link); devices and other special files are left alone. Raises :class:`ConfigError` or
    :class:`CheckpointError` for a path that is neither, and OSError for a folder that is not writable, before any work
    is done.
    """

    def __init__(
        self, out: str | None = None, force: bool = False, *, mark: bool = True, infotext: bool = False
    ) -> None:
        self.folder, self.name, self.force = Path(out or "."), "", force
        self.mark, self.infotext, self.count = mark, infotext, 0
        self._written: set[tuple[int, int]] = set()
        self.new = out is not None and out.endswith(("/", os.sep))
        if out is not None and not self.folder.is_dir() and not self.new:
            path = self.folder
            if path.suffix.lower() not in ("", *FORMATS):
                known = ", ".join(FORMATS)
                raise ConfigError(f"--out {out}: pictures are written as {known}; name it {path.stem}.png")
            self.folder, self.name = path.parent, path.stem + (path.suffix or ".png")
            for name, _ in FIELD.findall(self.name):
                if name not in FIELDS:
                    known = ", ".join(f"{{{field}}}" for field in FIELDS)
                    raise ConfigError(f"--out {out}: {{{name}}} stands for nothing; known are {known}")
        there = self.folder
        while self.new and not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise ConfigError(f"--out {out}: there is no folder {there}; create it first")
        if self.name and not FIELD.search(self.name):
            check_place(self.folder / self.name, "replace" if force else "next")
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as e:
            e.filename = str(there)  # and not the random name that was tried
            raise

    def save(self, image: Image.Image) -> Path:
        """Write one picture with its recipe and return its path, which has a number if its name was taken."""
        if self.new:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.count += 1
        path = self.folder / self._name(image)
        if self.force:
            n = 1
            while not self._may_replace(numbered(path, n)):
                n += 1
            path = numbered(path, n)
        path = self.write(image, path, "replace" if self.force else "next")
        found = os.lstat(path)
        self._written.add((found.st_dev, found.st_ino))
        return path

    def write(self, image: Image.Image, path: Path, existing: Existing) -> Path:
        """Write one picture to ``path`` with its recipe; return the path, see :func:`save_picture`."""
        if self.infotext:
            image.info[PARAMETERS] = infotext.write(read_recipe(image), VERSION)
        return save_picture(image, path, existing, self.mark)

    def _may_replace(self, path: Path) -> bool:
        """Return True if ``--force`` applies to this file: a regular one that is no output of this run by any name."""
        if not os.path.lexists(path):
            return True
        try:
            check_place(path)
        except CheckpointError:
            return False
        found = os.lstat(path)
        return (found.st_dev, found.st_ino) not in self._written

    def _name(self, image: Image.Image) -> str:
        recipe = read_recipe(image)
        text = str(recipe.get("prompt") or recipe["model"])
        return filled(self.name or "{prompt}-{seed}.png", text, recipe["seed"], self.count)


def filled(pattern: str, prompt: str, seed: object, k: int) -> str:
    """Return the name of a picture: ``pattern`` with its fields filled in."""
    values = {"prompt": slug(prompt), "seed": str(seed), "k": str(k)}
    return FIELD.sub(lambda field: values[field[1]].rjust(int(field[2] or 0), "0"), pattern)


def slug(text: str) -> str:
    """Return the first words of a text as a file name, in any script that the file system accepts."""
    name = "-".join(re.findall(r"\w+", text.lower()))[:40].strip("-_")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        name = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return name or "picture"
