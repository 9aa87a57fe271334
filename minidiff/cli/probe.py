"""``minidiff probe``: what this processor computes fast, as it was measured."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from minidiff.cli.options import about
from minidiff.console import say, show

EXAMPLES = """\
examples:
  minidiff probe
  minidiff probe --renew
"""


def add(commands: Any) -> None:
    """Add the command with its options."""
    more = (
        " The result is kept in the user's cache folder. `minidiff generate` measures once, for models of 1 GB and "
        "more, and uses it; fast.optimize uses it for any model."
    )
    p = about(commands, "probe", "show which dtype and which kernels are the fastest on this processor", EXAMPLES, more)
    p.add_argument("--renew", action="store_true", help="measure again, and replace what was kept")


def run(args: Namespace) -> None:
    """Measure what is not known yet, and print it."""
    import torch

    from minidiff.fast import machine, probe, trial

    for notes in (probe.NOTES, trial.NOTES):
        wrong = notes.damaged()
        if wrong is not None:
            say(f"{wrong}; it is measured again", "warning")
    gain = probe.gain(args.renew)
    show(machine.description())
    show(f"level 2 cache of a core: {machine.private_cache() / 2**20:g} MiB")
    show(f"bfloat16: {gain:.2f} times the speed of float32; large models are computed in {_name(probe.dtype_of(gain))}")
    for dtype in trial.DTYPES if gain >= 1 else (torch.float32,):
        results = trial.results(dtype, measure=True, anew=args.renew)
        chosen = trial.choices(dtype)
        show(f"\n{_name(dtype)}" + ("" if results is not None else ", by rule: the cache folder cannot be written"))
        for name, way in chosen.items():
            result = (results or {}).get(name)
            times = () if result is None else sorted(result.seconds.items(), key=lambda entry: entry[1])
            took = ", ".join(f"{other} {seconds * 1e3:.3g} ms" for other, seconds in times)
            show(f"  {name}: {way}" + (f" ({took})" if took else ""))


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
