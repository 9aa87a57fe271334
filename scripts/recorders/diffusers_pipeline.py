"""Writer for diffusers: a pipeline's run from prompt to pixels, with the layers of the first step, by hooks.

    python scripts/recorders/diffusers_pipeline.py FOLDER OUT "a red fox"       # a model in diffusers' layout

Layers have diffusers' own names, unless ``names`` maps them: :func:`minidiff_names` asks minidiff's converter, and
``minidiff parity compare --names auto`` proposes them from the values. Needs torch, diffusers and
``minidiff/parity/writer.py``; ``minidiff parity`` does all this and more by itself where minidiff is installed.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from named_modules import add, recorded

from minidiff.parity.writer import Writer

Names = Mapping[str, Mapping[str, str]]
SECTIONS = {  # of the calls of each network; that of the VAE's decoder has no number
    "text_encoder": ("prompt/text_encoder/", "negative/text_encoder/"),
    "unet": ("step.0/unet/",),
    "vae": ("decode/vae/",),
}


def record(pipe: Any, path: str | os.PathLike[str], names: Names | None = None, **request: Any) -> None:
    """Run a text pipeline of one prompt with the arguments ``request``, and record it.

    ``names``: {network: {module's name in diffusers: the stage's}}; None keeps diffusers' own.
    """
    import diffusers

    numbers = itertools.count(-1)
    step = next(numbers)

    def before(module: Any, args: Any, given: Any) -> None:
        nonlocal step
        step = next(numbers)
        for name, value in zip(("input", "t", "context"), [*args, given.get("encoder_hidden_states")], strict=False):
            add(writer, f"step.{step}/{name}", value)

    def after(module: Any, args: Any, out: Any) -> None:
        add(writer, f"step.{step}/prediction", out[0])

    @functools.wraps(method := pipe.scheduler.step)  # the pipeline looks at its arguments
    def stepped(out: Any, t: Any, x: Any, *args: Any, **given: Any) -> Any:
        if step == 0:
            add(writer, "start/x", x)
        add(writer, f"step.{step}/out", out)
        result = method(out, t, x, *args, **given)
        add(writer, f"step.{step}/x", result[0])
        return result

    with ExitStack() as stack:
        version, dtype = diffusers.__version__, str(pipe.dtype).removeprefix("torch.")
        writer = stack.enter_context(Writer(path, "diffusers", version=version, dtype=dtype))
        for part, sections in SECTIONS.items():
            stack.enter_context(recorded(getattr(pipe, part), writer, sections, names and names[part]))
        stack.callback(pipe.unet.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(pipe.unet.register_forward_hook(after).remove)
        pipe.scheduler.step = stepped
        stack.callback(delattr, pipe.scheduler, "step")
        add(writer, "decode/pixels", pipe(**request, output_type="pt").images)


def minidiff_names(pipe: Any, folder: str | os.PathLike[str]) -> Names:
    """Return the names that minidiff has for the modules of ``pipe``, which was opened from ``folder``."""
    import weights_convert
    from minidiff.parity.command import pair
    from minidiff.parity.theirs import renamed
    from weights_convert.module_names import module_names

    model: Any = weights_convert.load(folder, device="cpu")
    return renamed(pair(model.parts, pipe, module_names(model.config)))


if __name__ == "__main__":
    from diffusers import DiffusionPipeline

    if len(sys.argv) != 4:
        sys.exit("usage: diffusers_pipeline.py FOLDER OUT PROMPT")
    opened = DiffusionPipeline.from_pretrained(sys.argv[1], local_files_only=True, safety_checker=None)
    record(opened, sys.argv[2], minidiff_names(opened, sys.argv[1]), prompt=sys.argv[3], num_inference_steps=4)
