"""Opening what the command line names: a model of any layout, its device and dtype."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from minidiff.cli.options import PARTS
from minidiff.errors import CheckpointError, ConfigError
from minidiff.storage.reading import PICKLES, content, missing

if TYPE_CHECKING:
    import torch

    from minidiff.adapters.control import ControlModel
    from minidiff.pipeline import StableDiffusion, Unconditional


def device_of(name: str | None) -> torch.device | None:
    """Return the device by that name. Raises :class:`ConfigError` if there is none."""
    if name is None:
        return None
    import torch

    usable = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    usable += ["mps"] * torch.backends.mps.is_available()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not {name, f"{device.type}:{device.index or 0}"} & set(usable):
        raise ConfigError(f"--device {name}: there is no such device here; use one of {', '.join(usable)}")
    return device


def dtype_of(name: str | None) -> torch.dtype | None:
    """Return the dtype by that name; None for "auto" and none."""
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return dtypes.get(name or "auto")


def probed(path: str | None, device: torch.device | None) -> torch.dtype | None:
    """Return the dtype of --dtype auto, if it is not the library's default: bfloat16, for a large model on
    a CPU that is faster in it."""
    import torch

    if path is None or (torch.cuda.is_available() if device is None else device.type != "cpu"):
        return None
    from minidiff.fast import probe

    found = probe.choice(probe.size_on_disk(path))
    return None if found == torch.float32 else found


def large(path: str | None) -> bool:
    """Return True for a model so large that a trial of what this processor is fast at pays for itself."""
    from minidiff.fast import probe

    return path is not None and probe.size_on_disk(path) >= probe.LARGE


def parts_of(args: Namespace) -> dict[str, Any]:
    """Return the options that choose weights, a variant and parts from elsewhere, and say what the model predicts."""
    swap = {part: getattr(args, part) for part in PARTS if getattr(args, part) is not None}
    return {"variant": args.variant, "swap": swap, "prediction": args.prediction}


def open_model(
    path: str | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
    *,
    variant: str | None = None,
    swap: dict[str, str] | None = None,
    prediction: str | None = None,
    sampler: str | None = None,
    low_memory: bool = False,
) -> tuple[StableDiffusion | Unconditional, bool]:
    """Open any file or folder that minidiff or weights_convert knows; return the pipeline, and True if converted.

    Without a path it is the bundled one. ``sampler``: what the run uses, for a file that says of none. ``low_memory``:
    its parts take turns.
    """
    import minidiff

    corrected = bool(swap) or variant is not None or prediction is not None
    if path is None:
        if corrected:
            raise ConfigError(
                "parts from elsewhere, --variant and --prediction need --model PATH; the bundled model is of a piece"
            )
        return minidiff.bundled(device, dtype, low_memory=low_memory), False
    own = is_minidiff_file(path)
    if own and not corrected:
        return _no_control(minidiff.load(path, device, dtype, low_memory=low_memory), path), False
    import weights_convert

    options: dict[str, Any] = {"variant": variant, "swap": swap, "prediction": prediction, "sampler": sampler}
    found = weights_convert.load(path, device=device, dtype=dtype, low_memory=low_memory, **options)
    return _no_control(found, path), not own


def _no_control(found: StableDiffusion | Unconditional | ControlModel, path: str) -> StableDiffusion | Unconditional:
    """Return a model. Raises :class:`ConfigError` for a control that was named in its place."""
    from minidiff import ControlModel

    if isinstance(found, ControlModel):
        raise ConfigError(f"{path}: a {found.config.family} steers a model; name it with --control, and a model here")
    return found


def is_minidiff_file(path: str) -> bool:
    """Return True for a file in minidiff's own layout. Raises :class:`CheckpointError` for a missing path."""
    from minidiff.storage.checkpoint import is_minidiff
    from minidiff.storage.files import TensorFile

    if not os.path.exists(path):
        raise CheckpointError(missing(path, "file or folder"))
    if os.path.isdir(path) or content(path) in PICKLES:
        return False
    file = TensorFile(path)
    try:
        return is_minidiff(file.metadata)
    finally:
        file.close()
