"""Measure the cost of a step outside the UNet: guidance, the sampler, the loop. Prints it for every sampler.

    python scripts/bench_overhead.py
    python scripts/bench_overhead.py --samplers pndm euler --rounds 20 --device cuda --json overhead.json

Stable Diffusion 1.5's latents with guidance, and in the UNet's place a function that hands out a tensor that lies
ready. Time is the median over the rounds of a whole run, divided by its calls. Exits with 1 if a sampler takes more
than a millisecond a call.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from _bench import in_turn, machine, show_machine, summarise, table, write_json  # noqa: E402
from _works import wait  # noqa: E402

import minidiff  # noqa: E402
from minidiff.config import SD15  # noqa: E402
from minidiff.errors import ConfigError  # noqa: E402
from minidiff.pipeline import random_model  # noqa: E402
from minidiff.samplers import SAMPLERS  # noqa: E402

BOUND = 1e-3  # seconds a call


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = parser.parse_args(argv)
    pipe = without_unet(torch.device(args.device))
    refused, able = {}, []
    for name in args.samplers:
        try:
            seconds_a_call(pipe, name, args.steps)  # once unmeasured: its module is imported
            able.append(name)
        except ConfigError as e:
            refused[name] = str(e)
    facts = machine() | {"threads": torch.get_num_threads()}
    show_machine(facts, [])
    rows = summarise(in_turn(able, args.rounds, lambda name: seconds_a_call(pipe, name, args.steps)))
    print(table(("sampler", "ms a call", "spread"), ((r.name, ms(r.seconds), ms(r.spread)) for r in rows)))
    for name, why in refused.items():
        print(f"\n{name}: left out: {why}")
    slowest = max(rows, key=lambda row: row.seconds)
    kept = slowest.seconds <= BOUND
    print(f"\nslowest: {slowest.name}, {ms(slowest.seconds)} ms ({'below' if kept else 'ABOVE'} {ms(BOUND)} ms)")
    write_json(args.json, args, facts, rows=rows, refused=refused)
    return 0 if kept else 1


def without_unet(device: torch.device) -> Any:
    """Build a pipeline with Stable Diffusion 1.5's latents, whose UNet returns at once, for both halves of guidance."""
    config = minidiff.bundled().config
    pipe: Any = random_model(replace(config, unet=replace(config.unet, sample_size=SD15.sample_size))).to(device)
    ready = torch.randn(2, SD15.out_channels, SD15.sample_size, SD15.sample_size).to(device)
    pipe.unet.forward = lambda *_: ready
    return pipe


def seconds_a_call(pipe: Any, sampler: str, steps: int) -> float:
    """Return the seconds per call of one run, with the prompt encoded and the plan made beforehand."""
    run = pipe.steps("a red star", steps=steps, sampler=sampler, seed=0)
    wait(pipe.device)
    begun = time.perf_counter()
    for _ in run:
        pass
    wait(pipe.device)
    return (time.perf_counter() - begun) / len(run)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


if __name__ == "__main__":
    sys.exit(main())
