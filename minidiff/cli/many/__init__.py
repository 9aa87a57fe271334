"""``minidiff generate --prompts``: the pictures of a file of lines, in fixed groups, by one process or several.

    lines --pictures--> pictures --groups--> groups --deal--> this process: [ request -> run -> files ] x n

Under ``torchrun`` each process takes its share of the groups that are not finished, and the first one decides what all
need to know (:mod:`job`). The files are the same as from one process, and so are their bytes if each process has as
many threads.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from minidiff.cli.many.groups import PATTERN, pictures
from minidiff.cli.many.inputs import hashes
from minidiff.cli.many.job import Job, given
from minidiff.cli.many.lines import Check, read_lines
from minidiff.cli.many.work import Maker, Work, agreed
from minidiff.cli.output import FIELD, Output
from minidiff.console import say
from minidiff.errors import ConfigError
from minidiff.storage.reading import missing

if TYPE_CHECKING:
    from minidiff.training.ranks import Alone

PATIENCE = timedelta(days=7)  # of a process that has done its share, with the slowest other one
ALONE = ("prompt", "recipe", "force", "strip", "gif", "apng", "preview", "grid")  # options for a few pictures


def run(args: Namespace, asked: Mapping[str, Any], check_sampler: Check, opened: Callable[[], Maker]) -> int:
    """Make the pictures of all lines and print their paths; return 1 if a line was broken.

    ``asked``: the fields of a request that the command line gives, with a seed. ``opened`` opens the model.
    """
    output = place(args)
    base = {name: value for name, value in asked.items() if name != "seed"}
    seeds = asked["seed"] if isinstance(asked["seed"], list) else [asked["seed"]]
    if len(seeds) > 1:
        del base["num_images"]  # is what --seed says
    lines = read_lines(args.prompts, base, check_sampler)
    wanted = Job(
        lines=lines.hash,
        options=given(args),
        names=output.name or PATTERN,
        seeds=tuple(seeds),
        inputs=hashes(args, lines.good),
    )
    ranks = joined(args)
    try:
        with ExitStack() as stack:
            work = Work(args, ranks, output, dict(lines.broken))
            before = agreed(ranks, lambda: work.claim(stack, wanted, seeded=args.seed is not None))
            wanted = before or wanted
            found = pictures(lines.good, wanted.seeds, wanted.names)
            if found:
                work.all(found, before, wanted, opened)
            broken = {number: why for part in ranks.gathered(work.broken) for number, why in part.items()}
    finally:
        ranks.leave()
    if ranks.main:
        for number, why in sorted(broken.items()):
            say(f"{args.prompts}, line {number}: {why}", "error")
    return 1 if broken else 0


def place(args: Namespace) -> Output:
    """Return where pictures go. Raises :class:`ConfigError` for options that do not go with --prompts."""
    if not os.path.exists(args.prompts):
        raise ConfigError(f"--prompts {missing(args.prompts)}")
    beside = next((name for name in ALONE if getattr(args, name, None)), None)
    if beside is not None:
        what = "prompts" if beside == "prompt" else f"--{beside}"
        raise ConfigError(f"--prompts and {what} are both given; use one or the other")
    if args.out is None:
        raise ConfigError("--prompts makes many pictures; name a folder for them: --out pictures/")
    output = Output(args.out, mark=not args.no_mark, infotext=args.infotext)
    if output.name and not FIELD.search(output.name):
        raise ConfigError(f"--out {args.out}: is one name for many pictures; name a folder, {args.out}/, or use {{k}}")
    return output


def joined(args: Namespace) -> Alone:
    """Join the other processes, if torchrun started some; each takes a GPU of its own, and only one speaks."""
    import torch

    from minidiff.cli.opening import device_of
    from minidiff.training.distributed import Replicas, local_device, started_by_torchrun
    from minidiff.training.ranks import Alone

    if not started_by_torchrun():
        return Alone()
    device = device_of(args.device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.device = str(local_device(device))
    ranks = Replicas(torch.device("cpu"), PATIENCE)  # what they tell each other are a few words
    args.quiet = args.quiet or not ranks.main
    return ranks
