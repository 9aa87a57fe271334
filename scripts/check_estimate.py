"""Hold the estimate of a run's memory against what the run takes, each in a process of its own.

    python scripts/check_estimate.py                         # SD1.5's shape with random weights, 512 x 512
    python scripts/check_estimate.py --width 8 --set num_images=4 --mode low_memory
    python scripts/check_estimate.py --model FILE.safetensors --set height=768 --set width=768

Printed are the estimate, the peak that the system measured (resident memory on the CPU, allocations on CUDA) and their
ratio. Exit status 1 if they differ by more than 15 %.

malloc keeps freed memory below 32 MB for later, some hundred megabytes of a large run, and most of a small one: with
``--exact`` it gives everything back at once (Linux), so that what is counted can be seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODES = ("memory", "mapped", "low_memory")
BOUND = 0.15

CHILD = """
import gc, json, sys
import torch
import minidiff
from minidiff.cli.many.memory import RESET, STATUS, _field

path, mode, asked, device, dtype, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
dtype = None if dtype is None else getattr(torch, dtype)
how = {"low_memory": mode == "low_memory", "copy": mode == "memory"}
request = minidiff.Request("a red star", output="tensor", seed=0, progress=False, **asked)
told = minidiff.estimate(path, request, device, dtype, **how)
minidiff.bundled(device).generate("a star", steps=1, output="tensor", progress=False)  # code is loaded, too
gc.collect()
if device == "cuda":
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    minidiff.load(path, device, dtype, **how).generate(request)
    taken = torch.cuda.max_memory_allocated() - before
else:
    RESET.write_text("5")
    before = _field(STATUS, "VmRSS")
    minidiff.load(path, device, dtype, **how).generate(request)
    taken = _field(STATUS, "VmHWM") - before
print(json.dumps([told.peak, taken, str(told)]))
"""


def narrow(width: int) -> Any:
    """Return the config of SD1.5 with all channels of the UNet and the text encoder divided by ``width``."""
    from minidiff.config import CLIP_L, SD15, VAE_SD, ModelConfig, ScheduleConfig, TokenizerConfig

    def less(level: Any) -> Any:
        return replace(level, channels=level.channels // width)

    text = replace(CLIP_L, width=CLIP_L.width // width, heads=12 // min(width, 12), mlp=CLIP_L.mlp // width)
    unet = replace(
        SD15,
        levels=tuple(map(less, SD15.levels)),
        mid=less(SD15.mid),
        context_dim=text.width,
        groups=max(1, 32 // width),
    )
    vae = VAE_SD if width < 8 else replace(VAE_SD, channels=(64, 128, 256, 256))
    return ModelConfig(
        family="sd1",
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=TokenizerConfig(),
        schedule=ScheduleConfig(),
        sampler={"name": "ddim"},
    )


def write(width: int, path: Path) -> None:
    """Write a model of that shape with random weights."""
    from minidiff.pipeline.opening import random_model

    random_model(narrow(width)).save(path)


def compare(
    path: Path,
    asked: dict[str, Any],
    mode: str = "memory",
    device: str = "cpu",
    dtype: str | None = None,
    threads: int = 1,
    exact: bool = True,
) -> tuple[int, int, str]:
    """Return the estimate, what was measured, and the estimate in words."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    if exact:
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"
    told = json.dumps([str(path), mode, {"steps": 1, **asked}, device, dtype, threads])
    done = subprocess.run([sys.executable, "-c", CHILD, told], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    peak, taken, words = json.loads(done.stdout.splitlines()[-1])
    return peak, taken, words


def main() -> int:
    """Compare and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, help="a minidiff file (default: SD1.5's shape, random weights)")
    p.add_argument("--width", type=int, default=1, help="divide the channels of that shape by this")
    p.add_argument("--mode", choices=MODES, action="append", help="how weights are held; may be repeated (all)")
    p.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="an option of Request, in JSON")
    p.add_argument("--device", default="cpu")
    p.add_argument("--dtype", help="such as bfloat16")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--exact", action="store_true", help="let malloc give memory back at once")
    args = p.parse_args()
    asked = {name: json.loads(value) for name, _, value in (one.partition("=") for one in args.set)}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder) / "model.safetensors"
        if args.model is None:
            write(args.width, path)
        for mode in args.mode or MODES:
            peak, taken, words = compare(path, asked, mode, args.device, args.dtype, args.threads, args.exact)
            wrong += abs(peak / taken - 1) > BOUND
            print(f"{mode}: estimated {peak / 1e6:,.0f} MB, taken {taken / 1e6:,.0f} MB, ratio {peak / taken:.3f}")
            print(f"  {words}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
