"""Set up everything, then write a first picture: `python3 scripts/demo.py "a large red star on a blue background"`.

Needs nothing but Python 3.10 or newer; what it installs goes into .venv beside this checkout. The model is the one
that comes with minidiff: it draws one or two coloured shapes on a coloured background. Beside the picture lies a strip
of what the model expected to see in the end (x0) at eight steps on the way.
"""

import argparse
import os
import sys
import warnings
from typing import TYPE_CHECKING

import _setup

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPT = "a large red star on a blue background"
VIEWS = 8  # of the denoising, from left to right
ENLARGED = 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=PROMPT, help=f"what to paint (default: {PROMPT!r})")
    parser.add_argument("--steps", type=int, default=25, help="model calls, more or less (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="which picture (default: 0)")
    parser.add_argument("--out", default=str(_setup.ROOT / "out" / "demo.png"), help="where to (default: out/demo.png)")
    options = parser.parse_args()
    _setup.enter()
    try:
        return picture(options.prompt, options.steps, options.seed, options.out)
    except KeyboardInterrupt:
        return _setup.INTERRUPTED


def picture(prompt: str, steps: int, seed: int, out: str) -> int:
    """Write the picture and the strip; return 0, or 2 after one line on an error in the arguments."""
    import minidiff
    from minidiff.pipeline import BUNDLED_SCALE
    from minidiff.pipeline.png import label, to_pil

    warnings.showwarning = lambda message, *_: print(f"demo: {message}", file=sys.stderr)
    try:
        model = minidiff.bundled()
        run = model.steps(prompt, steps=steps, seed=seed, guidance_scale=BUNDLED_SCALE)
        views = [step.x0 for step in run]
        image = to_pil(model.decode(run.last().x))[0]
        pictures = [to_pil(model.decode(x0))[0] for x0 in some(views)]
        path, ending = os.path.splitext(os.path.abspath(out))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        minidiff.save_png(label(image, run.recipes[0]), out)
        minidiff.save_png(strip(pictures), f"{path}-steps{ending}")
    except (minidiff.MinidiffError, OSError) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    print(f"{path}{ending}: the picture, with its recipe inside (prompt, seed, sampler, versions)")
    print(f"{path}-steps{ending}: what the model expected to see in the end, at {len(pictures)} of {len(run)} steps")
    return 0


def some(views: list) -> list:
    """Return the last of ``views`` and others at equal distances before it, ``VIEWS`` in all if there are as many."""
    count = min(VIEWS, len(views))
    return [views[(k + 1) * len(views) // count - 1] for k in range(count)]


def strip(pictures: "list[Image]") -> "Image":
    """Join pictures side by side, enlarged."""
    from PIL import Image

    width, height = (ENLARGED * side for side in pictures[0].size)
    whole = Image.new("RGB", (width * len(pictures), height))
    for k, each in enumerate(pictures):
        whole.paste(each.resize((width, height), Image.Resampling.NEAREST), (k * width, 0))
    return whole


if __name__ == "__main__":
    sys.exit(main())
