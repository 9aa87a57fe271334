"""``minidiff generate --grid``: one picture for each combination of values, side by side and labelled.

    --grid sampler=euler,ddim steps=10,20        columns, then rows

Each cell is a picture of its own, in a folder beside the grid, with its recipe. A cell that is there already, made as
this run would make it, is not made again, so an interrupted grid goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.console.spelling import near
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.request import Option, Request, options, read_size

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
        """Return the label of each value; a prompt speaks for itself."""
        return [text if self.name == "prompt" else f"{self.name} {text}" for text, _ in self.changes]


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
    """Return (field, option) by the names of the command line; the prompt has none of its own."""
    found = {}
    for f, option in options(Request):
        if (option.flag or f.name == "prompt") and f.name not in ("num_images", "image", "mask"):
            found[option.flag.lstrip("-") or f.name] = (f.name, option)
    return found


def checked(axes: list[Axis], args: argparse.Namespace) -> list[Axis]:
    """Return the axes. Raises :class:`ConfigError` for more than two, and for options that do not go with a grid."""
    if len(axes) > 2:
        raise ConfigError(f"--grid takes one or two options, columns and rows, not {len(axes)}")
    if len({axis.name for axis in axes}) < len(axes):
        raise ConfigError(f"--grid names {axes[0].name} twice")
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
    force: bool,
    show: bool,
    mark: bool,
) -> Iterator[Path]:
    """Make the cells that are missing, then the grid; yield the grid's path.

    ``start`` returns the run of a cell, given the fields that its values set.
    """
    from minidiff.console.progress import Counter
    from minidiff.pipeline.encodings import encoded_once
    from minidiff.pipeline.image_files import open_picture
    from minidiff.pipeline.montage import table
    from minidiff.pipeline.png import label, marked, read_recipe, save_png, to_pil

    columns, rows = axes[0], axes[1] if len(axes) > 1 else Axis("", (("", {}),))
    place = Path(out or "grid.png")
    if place.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: a grid is a PNG file; name it {place.stem or 'grid'}.png")
    folder = place.with_name(f"{place.stem}-cells")
    folder.mkdir(exist_ok=True)
    cells: list[list[Image.Image]] = []
    with encoded_once(pipe), Counter(len(columns.changes) * len(rows.changes), "cell", show=show) as counter:
        for i, (_, down) in enumerate(rows.changes, 1):
            cells.append([])
            for j, (_, across) in enumerate(columns.changes, 1):
                path, run = folder / f"{i:02}-{j:02}.png", start({**down, **across})
                if _same(path, run.recipes[0], read_recipe):
                    run.close()
                else:
                    image = label(to_pil(pipe.finish(run, progress=False))[0], run.recipes[0])
                    save_png(image, path, "replace", mark)
                cells[-1].append(open_picture(path))
                counter.count()
    whole = table(cells, columns.labels(), rows.labels() if rows.name else [""])
    yield save_png(marked(whole) if mark else whole, place, "replace" if force else "next")


def _same(path: Path, recipe: Mapping[str, Any], read: Callable[[Path], dict[str, Any]]) -> bool:
    """Return True if the file at ``path`` was made by ``recipe``."""
    try:
        return path.exists() and read(path) == recipe
    except CheckpointError:
        return False
