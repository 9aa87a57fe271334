"""Measure how often a model draws what its caption says: four sets of prompts, judged from the saved PNG files.

    python scripts/eval_shapes.py --model FILE       # 500 prompts of each set
    python scripts/eval_shapes.py --sets loose --prompts 300 --scale 2   # captions with parts left out
    python scripts/eval_shapes.py --no-guidance      # the bundled model; the score falls
    python scripts/eval_shapes.py --shuffle          # each picture against another one's caption: what chance gives
    python scripts/eval_shapes.py --drawn            # the judge on pictures drawn by the data set: 100 % or it is wrong

"right" means shape, colour and background of everything, and for two things their relation as well; size and place
are counted over the captions that name them. "all_right" is everything that is said, size and place as well, on a
background of one colour. The sets are captions of one thing, of held-out triples, of two things, and loose captions,
which leave parts out ("a blue square", "two circles"): of these the rest is free, but the thing must be there. A grid
of the first pictures of each set is written beside, framed green or red. The judge (scripts/_judge.py) knows nothing of
the model and of the drawing code.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import _judge  # noqa: E402
from _judge import Verdict  # noqa: E402

import minidiff  # noqa: E402
from minidiff.errors import ConfigError, MinidiffError  # noqa: E402
from minidiff.training import shapes  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image

SETS: tuple[shapes.Kind, ...] = ("single", "held_out", "two", "loose")
COLUMNS = ("right", "all_right", "shape", "colour", "background", "size", "place")
BATCH = 25
GRID = (5, 10)  # rows and columns of pictures per set
GREEN, RED = (40, 170, 60), (220, 40, 40)

# Captions and the number of the first -> one picture for each.
Make = Callable[[Sequence[str], int], "list[Image.Image]"]


@dataclass(frozen=True)
class Result:
    """Result of one set: the verdict on every picture, in the order of the prompts, and the seconds to make them."""

    verdicts: tuple[Verdict, ...]
    seconds: float

    def score(self, column: str) -> float:
        """Return the share of pictures right in ``column``, among those whose caption mentions it; NaN if none does."""
        said = [value for value in (getattr(v, column) for v in self.verdicts) if value is not None]
        return sum(said) / len(said) if said else float("nan")


def evaluate(make: Make, captions: Sequence[str], folder: Path, shuffle: bool = False) -> Result:
    """Make a picture for each caption, save it in ``folder`` as 000.png and so on, and judge the files.

    ``shuffle``: judge each against the caption that follows its own.
    """
    start = time.perf_counter()
    for first in range(0, len(captions), BATCH):
        for k, image in enumerate(make(captions[first : first + BATCH], first), start=first):
            minidiff.save_png(image, folder / f"{k:03d}.png")
    seconds = time.perf_counter() - start
    told = [*captions[1:], captions[0]] if shuffle else captions
    verdicts = [_judge.judge(_judge.read(folder / f"{k:03d}.png"), _judge.parse(c)) for k, c in enumerate(told)]
    return Result(tuple(verdicts), seconds)


def model_maker(args: argparse.Namespace) -> Make:
    """Return a maker of pictures from the model that the command line names."""
    sd = minidiff.load(args.model) if args.model else minidiff.bundled()
    if not isinstance(sd, minidiff.StableDiffusion):
        raise ConfigError(f"{args.model} takes no prompt; a model of the shapes is wanted")
    scale = 1.0 if args.no_guidance else args.scale

    def make(captions: Sequence[str], first: int) -> list[Image.Image]:
        seeds = [args.seed + first + k for k in range(len(captions))]
        images: list[Image.Image] = sd.generate(
            list(captions),
            steps=args.steps,
            guidance_scale=scale,
            sampler=args.sampler,
            seed=seeds,
            height=_judge.SIDE,
            width=_judge.SIDE,
            progress=False,
            guidance_interval=args.interval,
        )
        return images

    return make


def drawn_maker(kind: shapes.Kind, seed: int, count: int) -> Make:
    """Return a maker of the pictures that the data set itself draws for the prompts of ``kind``."""
    from minidiff.pipeline.png import to_pil, to_unit

    scenes = shapes.items(seed, 0, count, kind)

    def make(captions: Sequence[str], first: int) -> list[Image.Image]:
        return to_pil(to_unit(shapes.drawn(scenes[first : first + len(captions)])[0]))

    return make


def grid(folder: Path, result: Result) -> Image.Image:
    """Join the first pictures of a set, in frames that show the verdict."""
    from PIL import Image

    rows, columns = GRID
    cell = _judge.SIDE + 6
    sheet = Image.new("RGB", (columns * cell, rows * cell), (255, 255, 255))
    for k, verdict in enumerate(result.verdicts[: rows * columns]):
        y, x = divmod(k, columns)
        sheet.paste(
            GREEN if verdict.right else RED, (x * cell + 1, y * cell + 1, (x + 1) * cell - 1, (y + 1) * cell - 1)
        )
        with Image.open(folder / f"{k:03d}.png") as image:
            sheet.paste(image, (x * cell + 3, y * cell + 3))
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Stack the grids one under another."""
    from PIL import Image

    whole = Image.new("RGB", (sheets[0].width, sum(sheet.height + 10 for sheet in sheets) - 10), (255, 255, 255))
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height + 10
    return whole


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="a minidiff file; the bundled model if left out")
    parser.add_argument("--drawn", action="store_true", help="no model: judge the data set's own pictures")
    parser.add_argument("--prompts", type=int, default=500, metavar="N", help="of each set (default: 500)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="which sets (default: all four)")
    parser.add_argument("--steps", type=int, default=25, help="(default: 25)")
    parser.add_argument("--scale", type=float, default=5.0, help="guidance scale (default: 5)")
    parser.add_argument("--no-guidance", action="store_true", help="guidance scale 1: the plain prediction")
    parser.add_argument(
        "--interval", nargs=2, type=float, metavar=("LOW", "HIGH"), help="guidance on this part of the way only"
    )
    parser.add_argument("--sampler", help="by name (default: the model's own)")
    parser.add_argument("--shuffle", action="store_true", help="judge each picture against another one's caption")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the noise (default: 0)")
    parser.add_argument("--grid", default="out/eval_shapes.png", metavar="PNG", help="(default: out/eval_shapes.png)")
    parser.add_argument("--keep", metavar="FOLDER", help="keep every picture there, one folder a set")
    args = parser.parse_args(argv)
    if args.prompts < 2:
        parser.error(f"--prompts {args.prompts}: at least 2 are needed")
    return args


def run(args: argparse.Namespace, root: Path) -> None:
    """Evaluate every chosen set with its pictures in folders of ``root``; print the scores and write the grid."""
    model = None if args.drawn else model_maker(args)
    print(f"{'':10s}" + "".join(f"{column:>12s}" for column in COLUMNS) + "   pictures", flush=True)
    sheets = []
    for kind in args.sets:
        folder = root / kind
        folder.mkdir(parents=True, exist_ok=True)
        captions = [item.caption for item in shapes.items(args.seed, 0, args.prompts, kind)]
        result = evaluate(model or drawn_maker(kind, args.seed, args.prompts), captions, folder, args.shuffle)
        shares = "".join(f"{100 * result.score(column):10.1f} %" for column in COLUMNS)
        print(f"{kind:10s}{shares}   {args.prompts} in {result.seconds:.0f} s", flush=True)
        sheets.append(grid(folder, result))
    path = Path(args.grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    minidiff.save_png(stacked(sheets), path)
    print(f"grid: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run(args, Path(args.keep or scratch))
    except (MinidiffError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
