"""Measure a training step of diffusers' unconditional tutorial, in minidiff and in diffusers with accelerate.

    python scripts/bench_training.py                                    # batch 4 and 16, float32 and bfloat16
    python scripts/bench_training.py --batch 4 --dtype float32 --rounds 5 --json training.json

The network is the tutorial's, at 64 x 64; both begin with the same random weights and learn from the same pictures of
noise. A step is everything from a batch in memory to new weights: timesteps and noise, forward, backward, clipping,
AdamW, the learning-rate schedule. minidiff is measured three times: with equal weights, with `--fused`, and with
`--fused --channels-last`. They run in turn.
Needs the `parity` extra.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _bench import in_turn, machine, need, progress, show_machine, summarise, table, write_json  # noqa: E402
from torch import Tensor, nn  # noqa: E402

UNET: dict[str, Any] = {  # of diffusers' "Train a diffusion model", which has sample_size 128
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
TINY: dict[str, Any] = {
    **UNET,
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
RATE, STEPS, WARMUP = 1e-4, 1000, 500
OURS: dict[str, dict[str, bool]] = {
    "minidiff": {},
    "minidiff, fused": {"fused": True},
    "minidiff, fused, channels last": {"fused": True, "channels_last": True},
}
PRECISIONS = {"float32": "no", "bfloat16": "bf16"}  # in accelerate's words


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="for trying this script out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = parser.parse_args()
    need("diffusers", "pip install '.[parity]'")
    facts = machine() | {"threads": torch.get_num_threads()}
    show_machine(facts, [])
    rows, summaries = [], []
    for dtype in args.dtype:
        for batch in args.batch:
            pixels = torch.randn(batch, 3, *[(TINY if args.tiny else UNET)["sample_size"]] * 2).clamp(-1, 1)
            steps = both(TINY if args.tiny else UNET, pixels, dtype)
            for step in steps.values():
                step()
            found = summarise(in_turn(list(steps), args.rounds, lambda name, steps=steps: seconds(steps[name], name)))
            summaries.append({"dtype": dtype, "batch": batch, "ways": found})
            rows += [(f"{dtype}, batch {batch}: {r.name}", *cells(r)) for r in found]
    print("\n" + table(("one optimiser step", "seconds", "spread", "speed"), rows))
    write_json(args.json, args, facts, results=summaries)
    return 0


def cells(row: Any) -> tuple[str, str, str]:
    return f"{row.seconds:.3f}", f"{row.spread:.3f}", f"{row.speed:.2f}x"


def seconds(step: Callable[[], object], name: str) -> float:
    begun = time.perf_counter()
    step()
    taken = time.perf_counter() - begun
    progress(f"{name}: {taken:.3f} s")
    return taken


def both(config: dict[str, Any], pixels: Tensor, dtype: str) -> dict[str, Callable[[], object]]:
    """Return the step of each side, on models with the same weights; the reference's comes first."""
    import diffusers

    import weights_convert

    unet = diffusers.UNet2DModel(**config)
    with tempfile.TemporaryDirectory() as folder:
        diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder)
        steps = {"diffusers with accelerate": theirs(unet, pixels, dtype)}
        for name, options in OURS.items():
            steps[name] = ours(weights_convert.load(folder, device="cpu"), pixels, dtype, options)
        return steps


def theirs(unet: nn.Module, pixels: Tensor, dtype: str) -> Callable[[], object]:
    """Return a step of the loop of the reference's tutorial."""
    import diffusers
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers.optimization import get_cosine_schedule_with_warmup

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=PRECISIONS[dtype])
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE)
    rates = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    unet, optimizer, rates = accelerator.prepare(unet.train(), optimizer, rates)
    scheduler = diffusers.DDPMScheduler()

    def step() -> None:
        noise = torch.randn_like(pixels)
        t = torch.randint(len(scheduler.betas), (len(pixels),))
        with accelerator.accumulate(unet):
            out = unet(scheduler.add_noise(pixels, noise, t), t, return_dict=False)[0]
            accelerator.backward(F.mse_loss(out, noise))
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()

    return step


def ours(pipe: Any, pixels: Tensor, dtype: Any, options: dict[str, bool]) -> Callable[[], object]:
    """Return a step of minidiff's loop on ``pipe``, with further ``options`` of TrainConfig."""
    from minidiff.training.batch import Batch
    from minidiff.training.loop import Trainer
    from minidiff.training.settings import TrainConfig

    class Same:
        def batch(self, start: int, count: int) -> Batch:
            return Batch(pixels)

    config = TrainConfig(steps=STEPS, warmup=WARMUP, batch=len(pixels), rate=RATE, precision=dtype, ema=None, **options)
    return Trainer(pipe, Same(), config).step


if __name__ == "__main__":
    sys.exit(main())
