"""Writer for PyTorch: the output of every module inside one, in the order of computation, under its own name.

    with Writer("mine.safetensors", "my port") as writer, torch.no_grad(), recorded(unet, writer, ["step.0/unet/"]):
        unet(x, t, context)

Needs torch and ``minidiff/parity/writer.py``. Modules that are called otherwise are mapped by ``names``, or when two
recordings are compared (``minidiff parity compare --names``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from minidiff.parity.writer import Writer


def add(writer: Writer, stage: str, value: torch.Tensor) -> None:
    """Add a tensor; bfloat16, which numpy lacks, is widened, and keeps its value."""
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        writer.add(stage, value.float().numpy(), computed="bfloat16")
    else:
        writer.add(stage, value.numpy())


@contextmanager
def recorded(
    module: nn.Module, writer: Writer, sections: Sequence[str] = ("",), names: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Return a context in which the outputs of all modules inside ``module`` are added to ``writer``.

    ``sections``: what stands before the names in the first call of ``module``, in the second, ...; later calls are
    not recorded. ``names``: a module's name -> that of the stage, for those that are recorded; None takes all.
    """
    calls, seen = -1, Counter[str]()

    def begin(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def after(name: str, out: Any) -> None:
        while isinstance(out, (tuple, list, dict)) and out:  # the first value of several
            out = next(iter(out.values() if isinstance(out, dict) else out))
        if isinstance(out, torch.Tensor) and max(calls, 0) < len(sections):  # parts may be called without the whole
            stage = sections[max(calls, 0)] + name
            seen[stage] += 1
            add(writer, stage if seen[stage] == 1 else f"{stage}#{seen[stage]}", out)

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(begin).remove)
        for name, part in module.named_modules():
            stage = name if names is None else names.get(name, "")
            if stage:
                hook = part.register_forward_hook(lambda _, args, out, stage=stage: after(stage, out))
                stack.callback(hook.remove)
        yield
