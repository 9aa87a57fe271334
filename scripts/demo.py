"""Set up everything, then write a first picture: `python3 scripts/demo.py "a prompt"` on a fresh clone.

Needs nothing but Python 3.10 or newer; what it installs goes into .venv beside this checkout. The model is tiny and its
weights are random: the picture shows that every part works together, not what a trained model can do.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

import _setup

if TYPE_CHECKING:
    from minidiff.config import ModelConfig

PROMPT = "a photo of an astronaut riding a horse on mars"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default=PROMPT, help=f"what to paint (default: {PROMPT!r})")
    parser.add_argument("--steps", type=int, default=20, help="model calls, more or less (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="which picture (default: 0)")
    parser.add_argument("--out", default=str(_setup.ROOT / "out" / "demo.png"), help="where to (default: out/demo.png)")
    options = parser.parse_args()
    _setup.enter()
    try:
        return picture(options.prompt, options.steps, options.seed, options.out)
    except KeyboardInterrupt:
        return _setup.INTERRUPTED


def picture(prompt: str, steps: int, seed: int, out: str) -> int:
    """Build the model, run it, write the PNG; 0, or 2 after one line on what the arguments have wrong."""
    import minidiff
    from minidiff.pipeline import random_model

    print(
        "The model is a tiny one with RANDOM weights, never trained: expect coloured noise, whatever the prompt says."
    )
    print("For real pictures convert a Stable Diffusion 1.x checkpoint; the README says how.")
    model = random_model(tiny(), seed=0)
    try:
        image = model.generate(prompt, steps=steps, seed=seed)[0]
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        minidiff.save_png(image, out)
    except (minidiff.MinidiffError, OSError) as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    width, height = image.size
    print(
        f"{os.path.abspath(out)}: {width} x {height} pixels, with its recipe inside (prompt, seed, sampler, versions)"
    )
    return 0


def tiny() -> "ModelConfig":
    """Stable Diffusion 1 in all but size: the same parts, wired the same way, about a million weights."""
    from minidiff.config import (
        CLIPTextConfig,
        Level,
        ModelConfig,
        ScheduleConfig,
        TokenizerConfig,
        UNetConfig,
        VAEConfig,
        text,
    )

    return ModelConfig(
        family="tiny random model",
        unet=UNetConfig(
            levels=(text(32, 2), Level(channels=64)), mid=text(64, 2), context_dim=32, groups=8, sample_size=32
        ),
        vae=VAEConfig(channels=(16, 16, 32, 32), layers=1, groups=8, sample_size=256),
        text_encoder=CLIPTextConfig(width=32, layers=2, heads=2, mlp=128),
        tokenizer=TokenizerConfig(),
        schedule=ScheduleConfig(),
        sampler={"name": "pndm"},
    )


if __name__ == "__main__":
    sys.exit(main())
