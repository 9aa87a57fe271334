"""Measure cost and gain of bfloat16: pictures against the same in float32, and the choice of `--dtype auto`.

    python scripts/bench_dtype.py                  # ten pictures of the bundled model
    python scripts/bench_dtype.py --model FILE --prompts 40

The error is the signal-to-noise ratio of pixels in 0..255, of each picture, float32 being the signal; "right" counts
pictures that show what their prompt says (scripts/_judge.py), for models of shapes. The gain is that of a convolution
and a matrix product on this processor, measured as `--dtype auto` does it, but without its cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import _judge  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import minidiff  # noqa: E402
from minidiff.fast import machine, probe  # noqa: E402
from minidiff.pipeline.png import to_pil  # noqa: E402
from minidiff.training import shapes  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="a minidiff file; the bundled model if left out")
    parser.add_argument("--prompts", type=int, default=10, metavar="N", help="(default: 10)")
    parser.add_argument("--steps", type=int, default=25, help="(default: 25)")
    parser.add_argument("--scale", type=float, default=5.0, help="guidance scale (default: 5)")
    args = parser.parse_args()
    begun = time.perf_counter()
    gain = probe.measured()
    taken = time.perf_counter() - begun
    print(f"{machine.description()}: bfloat16 is {gain:.2f} times as fast as float32 (measured in {taken:.2f} s)")
    print(f"--dtype auto takes {'bfloat16' if gain >= probe.WORTH else 'float32'} for large models here")
    captions = [item.caption for item in shapes.items(0, 0, args.prompts, "single")]
    exact, rough = (made(args, captions, dtype) for dtype in (torch.float32, torch.bfloat16))
    ratios = [psnr(a, b) for a, b in zip(rough, exact, strict=True)]
    print(f"PSNR of {len(ratios)} pictures: median {statistics.median(ratios):.1f} dB, least {min(ratios):.1f} dB")
    print(f"right: {right(exact, captions)} in float32, {right(rough, captions)} in bfloat16")
    return 0


def made(args: argparse.Namespace, captions: list[str], dtype: torch.dtype) -> Tensor:
    """Make a picture for each caption, (N, 3, H, W) in [0, 1]."""
    sd = minidiff.bundled(dtype=dtype) if args.model is None else minidiff.load(args.model, dtype=dtype)
    assert isinstance(sd, minidiff.StableDiffusion)
    options = {"steps": args.steps, "guidance_scale": args.scale, "seed": 0, "output": "tensor"}
    found: Tensor = sd.generate(captions, **options)
    return found.float().cpu()


def psnr(picture: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio in decibels; infinite for equal pictures."""
    error = (picture - truth).square().mean()
    return float(-10 * torch.log10(error))


def right(pictures: Tensor, captions: list[str]) -> int:
    """Return the number of pictures that show what their caption says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        count = 0
        for image, caption in zip(to_pil(pictures), captions, strict=True):
            image.save(path)
            count += bool(_judge.judge(_judge.read(path), _judge.parse(caption)).right)
    return count


if __name__ == "__main__":
    sys.exit(main())
