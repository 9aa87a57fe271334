"""Measure how fast the error of each sampler falls with the number of steps: a table, and a plot as an SVG.

    python scripts/order_of_accuracy.py [--svg orders.svg]

Data is a Gaussian, for which the exact solution is known; ``tests/support/gaussian.py`` says what is measured. The
table has, for each method, its theoretical order, the errors at rising numbers of steps (of the deviation of what is
sampled, in units of the exact one) and the slope between the last two; the plot has both logarithms as axes, so that
an order is the steepness of a line. Nothing is needed but minidiff; it takes seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WIDTH, HEIGHT, MARGIN = 900, 620, 60
HUES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--svg", type=Path, help="where the plot goes")
    args = parser.parse_args()

    from minidiff.storage.writing import atomic
    from tests.support.gaussian import DETERMINISTIC, NOT_MEASURED, STOCHASTIC, errors_of, slope_of

    curves = []
    for title, runs in (("deterministic", DETERMINISTIC), ("stochastic (mean and deviation)", STOCHASTIC)):
        print(f"\n{title:70} order  slope  error at n steps")
        for run in runs:
            errors = errors_of(run)
            shown = "  ".join(f"{n}: {error:.1e}" for n, error in zip(run.steps, errors, strict=True))
            print(f"{run.label:70} {run.order:5}  {slope_of(run, errors):5.2f}  {shown}")
            curves.append((run.label, run.order, run.steps, errors))
    print("\nnot measured:")
    for name, reason in NOT_MEASURED.items():
        print(f"{name}: {reason}")
    if args.svg is not None:
        with atomic(args.svg) as file:
            file.write(plot(curves).encode())
        print(f"\n{args.svg}: one line for each method; the pointer on it shows its name")


def plot(curves: list[tuple[str, float, tuple[int, ...], list[float]]]) -> str:
    """Plot error over steps, both logarithmic. Lines of one order share a colour and a dashed line of that slope."""
    steps = [n for _, _, ns, _ in curves for n in ns]
    errors = [e for _, _, _, es in curves for e in es]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))
    left, right = math.log2(min(steps)) - 0.2, math.log2(max(steps)) + 0.2

    def at(n: float, error: float) -> str:
        x = MARGIN + (math.log2(n) - left) / (right - left) * (WIDTH - 2 * MARGIN)
        y = HEIGHT - MARGIN - (math.log10(error) - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return f"{x:.1f},{y:.1f}"

    def text(place: str, words: str, colour: str = "black") -> str:
        x, y = place.split(",")
        return f'<text x="{x}" y="{y}" fill="{colour}">{words}</text>'

    colours = {
        order: f"hsl({(k * 360 // HUES * 5) % 360},70%,40%)" for k, order in enumerate(sorted({c[1] for c in curves}))
    }
    size = f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>']
    parts += [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for power in range(low, high + 1):
        ends = at(2**left, 10.0**power), at(2**right, 10.0**power)
        parts += [
            f'<polyline points="{" ".join(ends)}" stroke="#ddd"/>',
            text(f"8,{ends[0].split(',')[1]}", f"1e{power}"),
        ]
    for n in sorted({2**k for k in range(math.ceil(left), math.floor(right) + 1)}):
        parts += [text(f"{at(n, 10.0**low).split(',')[0]},{HEIGHT - MARGIN + 20}", str(n))]
    parts += [text(f"{WIDTH // 2},{HEIGHT - 12}", "steps"), text("8,20", "error, in units of the exact deviation")]
    for label, order, ns, es in curves:
        points = " ".join(at(n, e) for n, e in zip(ns, es, strict=True))
        line = f'<polyline points="{points}" fill="none" stroke="{colours[order]}" stroke-width="1.5">'
        parts += [f"{line}<title>{label}</title></polyline>"]
    for k, (order, colour) in enumerate(colours.items()):
        first, last = 12, 64
        guide = at(first, 0.5 / 4**k), at(last, 0.5 / 4**k * (first / last) ** order)
        if 0.5 / 4**k * (first / last) ** order > 10.0**low:
            parts += [f'<polyline points="{" ".join(guide)}" stroke="{colour}" stroke-dasharray="6 4" fill="none"/>']
        parts += [text(f"{WIDTH - MARGIN - 90},{MARGIN + 18 * k}", f"order {order:g}", colour)]
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    main()
