"""``minidiff plan``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from minidiff.cli.options import about, add_prediction, add_set, sampler_list
from minidiff.console import show
from minidiff.pipeline.request import read_whole

EXAMPLES = """\
examples:
  minidiff plan --sampler euler --steps 20
  minidiff plan --sampler ddim --steps 50 --set steps_offset=0
  minidiff plan --sampler euler --steps 20 --like a1111,comfyui:karras,diffusers
  minidiff plan --model sd15.safetensors
"""


def add(commands: Any) -> None:
    """Add the command with its options."""
    p = about(commands, "plan", "print every number that a sampler will use: timesteps, sigmas, coefficients", EXAMPLES)
    p.late = sampler_list
    p.add_argument("--model", metavar="PATH", help="take schedule and sampler from it (default: Stable Diffusion's)")
    add_prediction(p)
    p.add_argument("--sampler", metavar="NAME", help="one of those listed below (default: the model's own, else pndm)")
    p.add_argument("--steps", type=read_whole, default=50, metavar="N", help="how many (default: 50)")
    p.add_argument(
        "--like",
        metavar="PROGRAMS",
        help="as diffusers, ldm, k-diffusion, a1111 or comfyui plan it; several: a1111,ldm",
    )
    add_set(p)


def run(args: Namespace) -> None:
    """Run the command."""
    from minidiff.config import ScheduleConfig
    from minidiff.samplers import sampler_from_config
    from minidiff.schedule import NoiseSchedule

    config: dict[str, Any] = {"name": "pndm"}
    schedule = ScheduleConfig()
    if args.model is not None:
        import weights_convert

        found = weights_convert.open_source(args.model, prediction=args.prediction, sampler=args.sampler).config
        config, schedule = found.sampler, found.schedule
    if args.sampler is not None:
        config = {"name": args.sampler}
    if args.like is not None:
        from minidiff.programs.table import plans

        show(plans(args.like.split(","), schedule, {"name": config["name"], **dict(args.set)}, args.steps))
        return
    show(sampler_from_config({**config, **dict(args.set)}).plan(NoiseSchedule.from_config(schedule), args.steps))
