"""Every candidate for attention (`minidiff/fast/many_keys.py`), for every shape of Stable Diffusion 1.5.

    python scripts/bench_attention.py                            # 512 x 512 with guidance, float32
    python scripts/bench_attention.py --dtype bfloat16 --size 256

GFLOP/s of each, and what `fast.optimize` takes on this machine (`minidiff probe`). They run in turn; the best counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from minidiff.config import SD15, VAE_SD  # noqa: E402
from minidiff.fast import machine, many_keys, trial  # noqa: E402

PROMPT = 77


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="of the picture's side (default: 512)")
    parser.add_argument("--batch", type=int, default=2, help="2 is one picture with guidance (default)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.dtype}, {machine.description()}")
    print("| heads x width | queries | keys | GFLOP/s | taken |")
    print("|---|---:|---:|---|---|")
    for heads, width, queries, keys in shapes(args.size // VAE_SD.factor):
        row(heads, width, queries, keys, args)
    return 0


def shapes(side: int) -> list[tuple[int, int, int, int]]:
    """Return (heads, width of each, queries, keys) of the UNet's levels, then of the VAE's middle."""
    found = []
    for i, level in enumerate((*SD15.levels[:-1], SD15.mid)):
        tokens = (side >> i) ** 2
        found += [(level.heads, level.channels // level.heads, tokens, keys) for keys in (tokens, PROMPT)]
    return [*found, (1, VAE_SD.channels[-1], side**2, side**2)]


@torch.no_grad()
def row(heads: int, width: int, queries: int, keys: int, args: argparse.Namespace) -> None:
    """Measure one shape and print its line."""
    dtype = getattr(torch, args.dtype)
    q, k, v = (
        torch.randn(args.batch, n, heads * width).to(dtype).unflatten(2, (heads, width)).transpose(1, 2)
        for n in (queries, keys, keys)
    )
    near = next((of.keys for of in many_keys.RANGES.values() if keys >= of.least), keys)  # whose candidates it has
    kernels = many_keys.kernels(near, dtype)
    best = dict.fromkeys(kernels, float("inf"))
    for _ in range(args.rounds):
        for name, kernel in kernels.items():
            begun = time.perf_counter()
            kernel(q, k, v, False)
            best[name] = min(best[name], time.perf_counter() - begun)
    flops = 4 * args.batch * heads * queries * keys * width
    rates = ", ".join(f"{name} {flops / seconds / 1e9:.0f}" for name, seconds in best.items())
    ways = ((of.least, trial.choices(dtype)[name]) for name, of in many_keys.RANGES.items())
    taken = next((way for least, way in ways if keys >= least), many_keys.PLAIN)
    print(f"| {heads} x {width} | {queries} | {keys} | {rates} | {taken} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
