"""``minidiff generate --grid``: one picture for each combination of values, side by side and labelled.

    --grid sampler=euler,ddim steps=10,20        columns, then rows

Each cell is a picture of its own, in a folder beside the grid, with its recipe. A cell that is there already, made as
this run would make it, is not made again, so an interrupted grid goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.console.spelling import near
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.recipe import PICTURES
from minidiff.pipeline.request import Option, Request, options, read_size
from minidiff.storage.reading import missing

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.pipeline import StableDiffusion, Unconditional
    from minidiff.pipeline.denoise import Run

MOST = 400  # cells


@dataclass(frozen=True)
class Axis:
    """Values of one option. ``changes``: for each, its text and the fields of the request that it sets."""

    name: str
    changes: tuple[tuple[str, Mapping[str, Any]], ...]

    def labels(self) -> list[str]:
        """Return the label of each value; a prompt speaks for itself, and of a file the name does."""
        if self.name == "prompt":
            return [text for text, _ in self.changes]
        texts = [os.path.basename(text) if self.name in PICTURES else text for text, _ in self.changes]
        return [f"{self.name} {text}" for text in texts]


def read_axis(text: str) -> Axis:
    """Read ``OPTION=VALUE,VALUE``, or with ``|`` between values that hold a comma."""
    name, equals, values = text.partition("=")
    name = name.strip().lstrip("-").replace("_", "-")
    parts = [part.strip() for part in values.split("|" if "|" in values else ",")]
    if not equals or not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} should be OPTION=VALUE,VALUE, such as steps=10,20")
    if name == "size":
        sides = [read_size(part) for part in parts]
        return Axis(name, tuple((p, {"height": h, "width": w}) for p, (h, w) in zip(parts, sides, strict=True)))
    known = _by_name()
    if name not in known:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no option of a grid{near(name, known)}; they are size, {', '.join(known)}"
        )
    field, option = known[name]
    return Axis(name, tuple((part, {field: option.read(part)}) for part in parts))


def _by_name() -> dict[str, tuple[str, Option]]:
    """Return (field, option) by the names of the command line; the prompt has none of its own. The field of a record in
    a Request is written "sizes.crop"."""
    found = {}
    for f, option in options(Request):
        for g, inner in options(option.record) if option.record is not None else ():
            found[inner.flag.lstrip("-")] = (f"{f.name}.{g.name}", inner)
        if (option.flag or f.name == "prompt") and f.name != "num_images":
            found[option.flag.lstrip("-") or f.name] = (f.name, option)
    return found


def merged(asked: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request with those of a cell in their place."""
    records = {f.name: option.record for f, option in options(Request)}
    found = dict(asked)
    for name, value in changes.items():
        field, _, part = name.partition(".")
        found[field] = replace(found.get(field) or records[field](), **{part: value}) if part else value
    return found


def checked(axes: list[Axis], args: argparse.Namespace) -> list[Axis]:
    """Return the axes. Raises :class:`ConfigError` for more than two, and for options that do not go with a grid."""
    if len(axes) > 2:
        raise ConfigError(f"--grid takes one or two options, columns and rows, not {len(axes)}")
    if len({axis.name for axis in axes}) < len(axes):
        raise ConfigError(f"--grid names {axes[0].name} twice")
    for axis in axes:
        for path, _ in axis.changes if axis.name in PICTURES else ():
            if not os.path.exists(path):
                raise CheckpointError(f"--grid {axis.name}={missing(path)}")
    count = len(axes[0].changes) * len(axes[-1].changes if len(axes) > 1 else [1])
    if count > MOST:
        raise ConfigError(f"--grid of {count:,} pictures; {MOST} is the most")
    beside = [f"--{name.replace('_', '-')}" for name in ("strip", "gif", "apng", "preview") if getattr(args, name)]
    if args.num_images not in (None, 1) or isinstance(args.seed, list):
        beside.append("--num-images")
    if len(args.prompt) > 1:
        beside.append("several prompts (--grid prompt=...|...)")
    if beside:
        raise ConfigError(f"--grid makes one picture a cell, without {', '.join(beside)}")
    return axes


def make(
    pipe: StableDiffusion | Unconditional,
    axes: list[Axis],
    start: Callable[[Mapping[str, Any]], Run],
    out: str | None,
    *,
    force: bool,
    seeded: bool,
    show: bool,
    mark: bool,
) -> Iterator[Path]:
    """Make the cells that are missing, then the grid; yield the grid's path.

    ``start`` returns the run of a cell, given the fields that its values set. ``seeded``: its seed was asked for, and
    is not that of the cells that are there. A name that is another grid's is left to it, unless ``force`` is given.
    """
    from minidiff.console.progress import Counter
    from minidiff.pipeline.encodings import encoded_once
    from minidiff.pipeline.image_files import open_picture
    from minidiff.pipeline.montage import table
    from minidiff.pipeline.png import label, marked, save_png, to_pil

    columns, rows = axes[0], axes[1] if len(axes) > 1 else Axis("", (("", {}),))
    changes = {
        f"{i:02}-{j:02}.png": {**down, **across}
        for i, (_, down) in enumerate(rows.changes, 1)
        for j, (_, across) in enumerate(columns.changes, 1)
    }
    with encoded_once(pipe), Counter(len(changes), "cell", show=show) as counter:
        place, folder, seed = _place(Path(out or "grid.png"), changes, start, force=force, seeded=seeded)
        cells: list[Image.Image] = []
        for name, asked in changes.items():
            path, run = folder / name, start({**seed, **asked})
            if _recipe(path) == run.recipes[0]:
                run.close()
            else:
                image = label(to_pil(pipe.finish(run, progress=False))[0], run.recipes[0])
                folder.mkdir(exist_ok=True)
                save_png(image, path, "replace", mark)
            cells.append(open_picture(path))
            counter.count()
    width = len(columns.changes)
    each = [cells[k : k + width] for k in range(0, len(cells), width)]
    whole = table(each, columns.labels(), rows.labels() if rows.name else [""])
    if _holds(place, whole):
        yield place
        return
    yield save_png(marked(whole) if mark else whole, place, "replace" if force else "next")


def _place(
    wanted: Path,
    changes: Mapping[str, Mapping[str, Any]],
    start: Callable[[Mapping[str, Any]], Run],
    *,
    force: bool,
    seeded: bool,
) -> tuple[Path, Path, dict[str, Any]]:
    """Return the path of the grid, the folder of its cells, and what these have in common beside what is asked: their
    seed. It is the first name like ``wanted`` that is free, or whose cells are of this grid."""
    from minidiff.storage.writing import numbered

    if wanted.suffix.lower() != ".png":
        raise ConfigError(f"--out {wanted}: a grid is a PNG file; name it {wanted.stem or 'grid'}.png")
    if not wanted.parent.is_dir():
        raise ConfigError(f"--out {wanted}: there is no folder {wanted.parent}; create it first")
    n = 0
    while True:
        n += 1
        place = numbered(wanted, n)
        folder = place.with_name(f"{place.stem}-cells")
        there = [name for name in changes if os.path.lexists(folder / name)]
        if not there:
            if force or not (os.path.lexists(place) or os.path.lexists(folder)):
                return place, folder, {}
            continue
        recipes = [_recipe(folder / name) for name in there]
        seed = {} if seeded or recipes[0] is None else {"seed": recipes[0].get("seed")}
        if all(_made_by(start({**seed, **changes[name]}), recipe) for name, recipe in zip(there, recipes, strict=True)):
            return place, folder, seed
        if force:
            return place, folder, {}


def _made_by(run: Run, recipe: Mapping[str, Any] | None) -> bool:
    """Return True for the recipe of ``run``, which is closed."""
    run.close()
    return run.recipes[0] == recipe


def _recipe(path: Path) -> Mapping[str, Any] | None:
    """Return the recipe of the picture at ``path``, None if there is none."""
    from minidiff.pipeline.png import read_recipe

    try:
        return read_recipe(path)
    except (CheckpointError, OSError):
        return None


def _holds(path: Path, picture: Image.Image) -> bool:
    """Return True if the file at ``path`` is a picture of the same pixels."""
    from minidiff.pipeline.image_files import open_picture

    try:
        there = open_picture(path, tell=lambda part: None)
    except (CheckpointError, OSError):
        return False
    return there.size == picture.size and there.convert("RGB").tobytes() == picture.convert("RGB").tobytes()
