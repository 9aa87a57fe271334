"""How fast: a step of the UNet and a decoding, plain, with each switch of `minidiff.fast`, and diffusers beside.

    python scripts/bench.py                               # Stable Diffusion 1.5 at 512 x 512 with guidance, float32
    python scripts/bench.py --against diffusers           # the same weights' shapes in diffusers (the `parity` extra)
    python scripts/bench.py --part vae --batch 1          # the decoder instead
    python scripts/bench.py --size 256 --dtype bfloat16 --rounds 5 --json bench.json

Random weights; time does not depend on them. All candidates run in turn, in every round once, so that whatever else the
machine does falls on all of them; medians count, and the spread is the distance between the quartiles. The ceiling is
what a 3 x 3 convolution of 320 channels, the kernel that comes nearest to a processor's limit, reaches in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from minidiff import fast  # noqa: E402
from minidiff.config import SD15, VAE_SD  # noqa: E402
from minidiff.fast.switch import put_on  # noqa: E402
from minidiff.models.unet import UNet  # noqa: E402
from minidiff.models.vae import VAE  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXT = (77, 768)
CHANNELS = 4


@dataclass
class Candidate:
    """One way to do the work. ``before`` and ``after`` put it in place and away again, and are not timed."""

    name: str
    run: Callable[[], Tensor]
    before: Callable[[], Any] = lambda: None
    after: Callable[[], Any] = lambda: None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("unet", "vae"), default="unet")
    parser.add_argument("--size", type=int, default=512, help="of the picture's side (default: 512)")
    parser.add_argument("--batch", type=int, default=2, help="2 is one picture with guidance (default)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", choices=("diffusers",))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    work = Unet(args, device, dtype) if args.part == "unet" else Decoder(args, device, dtype)
    candidates = [*ours(work), *(theirs(work) if args.against else [])]
    flops = counted(work)
    ceiling = convolution(args, device, dtype)
    times = measured(candidates, args.rounds, device)
    rows = report(times, flops, ceiling)
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "rows": rows}, default=str, indent=1))
    return 0


# --- what is timed ---------------------------------------------------------------------------------------------------


class Unet:
    """One call of Stable Diffusion 1.5's UNet."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        side = args.size // VAE_SD.factor
        self.device, self.dtype = device, dtype
        self.x = torch.randn(args.batch, CHANNELS, side, side).to(device, dtype)
        self.context = torch.randn(args.batch, *CONTEXT).to(device, dtype)
        self.model = filled(lambda: UNet(SD15), device, dtype)

    def ours(self) -> Tensor:
        out: Tensor = self.model(self.x, 500, self.context)
        return out

    def reference(self) -> Callable[[], Tensor]:
        from check_full_size import UNET
        from diffusers import UNet2DConditionModel

        model = filled(lambda: UNet2DConditionModel(**UNET), self.device, self.dtype)
        return lambda: model(self.x, 500, self.context, return_dict=False)[0]


class Decoder:
    """One decoding by Stable Diffusion's VAE."""

    def __init__(self, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
        side = args.size // VAE_SD.factor
        self.device, self.dtype = device, dtype
        self.x = torch.randn(args.batch, CHANNELS, side, side).to(device, dtype)
        self.model = filled(lambda: VAE(VAE_SD), device, dtype)

    def ours(self) -> Tensor:
        out: Tensor = self.model.decode(self.x)
        return out

    def reference(self) -> Callable[[], Tensor]:
        from check_full_size import VAE as CONFIG
        from diffusers import AutoencoderKL

        model = filled(lambda: AutoencoderKL(**CONFIG), self.device, self.dtype)
        return lambda: model.decode(self.x, return_dict=False)[0]


def filled(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model with small random weights. One stretch of noise is repeated: a billion draws would take minutes."""
    with torch.device("meta"):
        model = make()
    noise = 0.02 * torch.randn(2**20, dtype=torch.float32)
    state = {}
    for name, p in model.state_dict().items():
        copies = -(-p.numel() // len(noise))
        state[name] = noise.repeat(copies)[: p.numel()].view(p.shape).to(device, dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


def ours(work: Unet | Decoder) -> list[Candidate]:
    """The plain model, each switch by itself, and all together."""

    def with_switches(names: tuple[str, ...]) -> Candidate:
        on: list[tuple[str, list[nn.Module]]] = []

        def before() -> None:
            on.extend((name, put_on(fast.SWITCHES[name], [work.model])) for name in names)
            if names:
                work.ours()  # weights are packed, and the prompt is remembered, at the first call

        def after() -> None:
            while on:
                name, layers = on.pop()
                for layer in layers:
                    fast.SWITCHES[name].take_off(layer)

        return Candidate("minidiff, " + ("+".join(names) or "plain"), work.ours, before, after)

    names = tuple(fast.SWITCHES)
    return [with_switches(some) for some in ((), *((name,) for name in names), names)]


def theirs(work: Unet | Decoder) -> list[Candidate]:
    return [Candidate("diffusers, eager", work.reference())]


# --- timing ----------------------------------------------------------------------------------------------------------


def counted(work: Unet | Decoder) -> int:
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        work.ours()
    return counter.get_total_flops()


def convolution(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a 3 x 3 convolution."""
    side, channels = args.size // VAE_SD.factor, SD15.levels[0].channels
    x = torch.randn(args.batch, channels, side, side).to(device, dtype)
    weight = torch.randn(channels, channels, 3, 3).to(device, dtype)
    times = measured([Candidate("", lambda: F.conv2d(x, weight, padding=1))], 20, device)[""]
    return 2 * x.numel() * channels * 9 / min(times)


def measured(candidates: list[Candidate], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, by candidate; every candidate runs once a round."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    for _ in range(rounds):
        for c in candidates:
            c.before()
            wait()
            begun = time.perf_counter()
            c.run()
            wait()
            times[c.name].append(time.perf_counter() - begun)
            c.after()
            print(f"  {c.name}: {times[c.name][-1]:.3f} s" if c.name else "", end="\r", file=sys.stderr, flush=True)
    return times


def report(times: dict[str, list[float]], flops: int, ceiling: float) -> list[dict[str, Any]]:
    """Print the table; its rows."""
    rows = []
    first = next(iter(times))
    print(f"\n{flops / 1e12:.3f} TFLOP a call; a 3 x 3 convolution reaches {ceiling / 1e9:.0f} GFLOP/s\n")
    print(f"| {'':32} | seconds | spread | GFLOP/s | of the ceiling | speed |")
    print(f"|{'-' * 34}|---:|---:|---:|---:|---:|")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 2 else [min(seconds), middle, max(seconds)]
        ratio = statistics.median(a / b for a, b in zip(times[first], seconds, strict=True))
        row = {
            "name": name,
            "seconds": middle,
            "spread": quarters[2] - quarters[0],
            "gflops": flops / middle / 1e9,
            "share": flops / middle / ceiling,
            "speed": ratio,
        }
        rows.append(row)
        figures = f"{middle:.3f} | {row['spread']:.3f} | {row['gflops']:.0f} | {row['share']:.0%} | {ratio:.2f}x"
        print(f"| {name:32} | {figures} |")
    return rows


if __name__ == "__main__":
    sys.exit(main())
