"""``minidiff explain``: a page that shows a run from the inside."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from minidiff.cli import generate, generate_options
from minidiff.cli.options import about, add_options, add_set, sampler_list
from minidiff.console import say, show
from minidiff.errors import ConfigError
from minidiff.pipeline.request import Request, options

EXAMPLES = """\
examples:
  minidiff explain "a red circle left of a blue star on a white background" --out explain.html
  minidiff explain "a lighthouse" --model sd15.safetensors --sampler euler --steps 20 --lang zh --out lighthouse.html
  minidiff explain "a blue square" --panels guidance,film
"""
LANGUAGES = ("en", "zh")
NOT_HERE = ("prompt", "num_images")


def add(commands: Any) -> None:
    """Add the command with its options."""
    what = "write a page that shows a run from the inside: guidance, timesteps, attention, every number of a step"
    p = about(commands, "explain", what, EXAMPLES, " It is one file of HTML, in English and Chinese.")
    p.late, p.elsewhere = sampler_list, generate_options.ELSEWHERE
    p.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the picture shows")
    names = ("page", "model", "picture", "from a picture", "sampling", "SDXL")
    groups = {name: p.add_argument_group(name) for name in names}
    g = groups["page"]
    g.add_argument("--out", metavar="FILE", default="explain.html", help="where the page goes (default: explain.html)")
    g.add_argument("--lang", choices=LANGUAGES, default="en", help="the language shown first (default: en)")
    g.add_argument(
        "--panels",
        metavar="NAMES",
        help="parts of the page, such as guidance,film (default: all that the "
        "model can show; those that need many runs only for the bundled model)",
    )
    g.add_argument("--force", action="store_true", help="replace a file of that name instead of adding a number")
    g.add_argument("--quiet", action="store_true", help="no progress bar and no hints")
    add_options(groups, Request, tuple(f.name for f, _ in options(Request) if f.name not in NOT_HERE))
    generate_options.add_model(groups["model"])
    add_set(groups["sampling"])


def run(args: Namespace) -> None:
    """Write the page and print its path."""
    from minidiff.console.progress import Counter
    from minidiff.explain import page
    from minidiff.explain.collect import collect
    from minidiff.storage.writing import Existing, atomic, check_place

    names = None if args.panels is None else [name.strip() for name in args.panels.split(",")]
    page.check_names(names)
    existing: Existing = "replace" if args.force else "next"
    check_place(args.out, existing)
    if isinstance(args.seed, list):
        raise ConfigError(f"--seed names {len(args.seed)} seeds; a page shows one run")
    prompt = [] if args.prompt is None else [args.prompt]
    full = Namespace(**{**vars(generate_options.blank()), **vars(args), "prompt": prompt})
    pipe, request = generate.prepared(full)
    with Counter(request.steps, "step", show=False if args.quiet else None) as counter:
        seen = collect(pipe, request, bundled=args.model is None, progress=lambda step: counter.count())
    html = page.explained(seen, args.lang, names)
    with atomic(args.out, existing) as file:
        file.write(html.encode())
    show(file.path)
    if not args.quiet:
        say(f"{len(html.encode()) / 1e6:.1f} MB; open it in a browser")
