"""``minidiff plan``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from minidiff.cli.options import about, add_prediction, add_set, sampler_list
from minidiff.console import show, show_json
from minidiff.pipeline.request import read_whole

EXAMPLES = """\
examples:
  minidiff plan --sampler euler --steps 20
  minidiff plan --sampler ddim --steps 50 --set steps_offset=0
  minidiff plan --sampler euler --steps 20 --like a1111,comfyui:karras,diffusers
  minidiff plan --model sd15.safetensors
  minidiff plan --sampler dpmpp_2m --steps 20 --json
  minidiff plan --sampler euler,ddim,dpmpp_2m --steps 20 --plot plan.svg
"""


def add(commands: Any) -> None:
    """Add the command with its options."""
    p = about(commands, "plan", "print every number that a sampler will use: timesteps, sigmas, coefficients", EXAMPLES)
    p.late = sampler_list
    p.add_argument("--model", metavar="PATH", help="take schedule and sampler from it (default: Stable Diffusion's)")
    add_prediction(p)
    p.add_argument(
        "--sampler",
        metavar="NAME",
        help="one of those listed below (default: the model's own, else pndm); with --plot several: euler,ddim",
    )
    p.add_argument("--steps", type=read_whole, default=50, metavar="N", help="how many (default: 50)")
    p.add_argument(
        "--like",
        metavar="PROGRAMS",
        help="as diffusers, ldm, k-diffusion, a1111 or comfyui plan it; several: a1111,ldm",
    )
    p.add_argument(
        "--json",
        action="store_true",
        help="as JSON: each step as weights of the sample, the model's output, the noise and what is remembered",
    )
    p.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the sigmas and timesteps of every --sampler, and of every program of --like, into one SVG file",
    )
    p.add_argument("--force", action="store_true", help="replace a file of that name instead of adding a number")
    add_set(p)


def run(args: Namespace) -> None:
    """Run the command."""
    from minidiff.config import ScheduleConfig, check
    from minidiff.samplers import sampler_from_config
    from minidiff.schedule import NoiseSchedule

    config: dict[str, Any] = {"name": "pndm"}
    schedule = ScheduleConfig()
    if args.model is not None:
        import weights_convert

        found = weights_convert.open_source(
            args.model, prediction=args.prediction, sampler=args.sampler if args.plot is None else None
        ).config
        config, schedule = found.sampler, found.schedule
    if args.sampler is not None and args.plot is None:
        check("," not in args.sampler, f"--sampler {args.sampler}: several samplers go into --plot FILE; name one")
        config = {"name": args.sampler}
    likes = None if args.like is None else args.like.split(",")
    if args.plot is not None:
        check(not args.json, "--json and --plot are two answers; ask for one")
        show(_plot(args, likes, schedule, config))
        return
    check(not args.force, "--force replaces the file of --plot, and --plot is not given")
    if args.json:
        check(likes is None or len(likes) == 1, f"--json writes one plan; name one program, got --like {args.like}")
        show_json(_table(likes and likes[0], schedule, config, dict(args.set), args.steps))
    elif likes is not None:
        from minidiff.programs.table import plans

        show(plans(likes, schedule, {"name": config["name"], **dict(args.set)}, args.steps))
    else:
        show(sampler_from_config({**config, **dict(args.set)}).plan(NoiseSchedule.from_config(schedule), args.steps))


def _table(like: str | None, schedule: Any, config: dict[str, Any], given: dict[str, Any], steps: int) -> Any:
    """Return the plan as JSON: the weights of each step; see minidiff/samplers/linear.py."""
    from dataclasses import asdict

    from minidiff.samplers import sampler_from_config, sampler_to_config
    from minidiff.samplers.linear import table
    from minidiff.schedule import NoiseSchedule

    if like is None:
        sampler: Any = sampler_from_config({**config, **given})
        plan = sampler.plan(NoiseSchedule.from_config(schedule), steps)
    else:
        from minidiff.programs import read

        told = read(like).sampler(schedule, {"name": config["name"], **given})
        sampler, plan = told.inner, told.plan(None, steps)
    asked = {"sampler": sampler_to_config(sampler), "schedule": asdict(schedule), "like": like}
    return {"format": "minidiff plan 1", **asked, **table(sampler, plan).to_json()}


def _plot(args: Namespace, likes: list[str] | None, schedule: Any, config: dict[str, Any]) -> Any:
    """Write the picture of all plans and return its path."""
    from minidiff.programs import read
    from minidiff.programs.plot import plot
    from minidiff.samplers import sampler_from_config
    from minidiff.schedule import NoiseSchedule
    from minidiff.storage.writing import Existing, atomic, check_place

    existing: Existing = "replace" if args.force else "next"
    check_place(args.plot, existing)
    given, plans, without = dict(args.set), {}, set()
    table = NoiseSchedule.from_config(schedule)
    for choice in [config] if args.sampler is None else [{"name": name.strip()} for name in args.sampler.split(",")]:
        for like in likes or (None,):
            if like is None:
                name, sampler = str(choice["name"]), sampler_from_config({**choice, **given})
                plans[name] = sampler.plan(table, args.steps)
            else:
                told = read(like).sampler(schedule, {"name": choice["name"], **given})
                name, sampler = f"{choice['name']} as {like}", told.inner
                plans[name] = told.plan(None, args.steps)
            if sampler.own_levels:
                without.add(name)
    drawn = plot(plans, len(table), without)
    with atomic(args.plot, existing) as file:
        file.write(drawn.encode())
    return file.path
