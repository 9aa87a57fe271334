"""Building a model from tensors and from files, for a class of model that the caller chooses."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch

from minidiff.config import ControlConfig, ModelConfig
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy
from minidiff.storage.identity import identify
from minidiff.storage.low_memory import LowMemory

if TYPE_CHECKING:
    from minidiff.pipeline.model import Model

Own = TypeVar("Own", bound="Model")
AnyConfig = ModelConfig | ControlConfig
Choose = Callable[[AnyConfig, str], type[Own]]  # the class for a config, and the name of its source for errors


def build(
    kind: type[Own],
    config: AnyConfig,
    tensors: Mapping[str, Lazy],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    source: str,
    hash: str,
    low_memory: bool,
) -> Own:
    """Build a model of class ``kind``; the arguments are those of :func:`minidiff.pipeline.assemble`."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    parts = checkpoint.build(config)
    if low_memory:
        checkpoint.sketch(parts, tensors, dtype, source)
    else:
        checkpoint.fill(parts, tensors, device, dtype, source)
    pipe = kind(config, parts, hash)  # decides which modules stay in float32
    pipe.name = os.path.basename(os.path.normpath(source))
    pipe.source = identify(config, tensors)
    if low_memory:
        pipe.low_memory = LowMemory(parts, checkpoint.fetching(parts, tensors, device), device)
        pipe.low_memory.install()
    return pipe


def open_file(
    path: str | os.PathLike[str],
    choose: Choose[Own],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    low_memory: bool,
    copy: bool,
) -> Own:
    """Open a minidiff file; the arguments are those of :func:`minidiff.load`. Raises :class:`CheckpointError`."""
    found = checkpoint.open_any(path)
    try:
        kind = choose(found.config, str(path))
        tensors = checkpoint.copied(found.file.lazy, low_memory) if copy else found.file.lazy
        model = build(kind, found.config, tensors, device, dtype, str(path), found.hash, low_memory)
        kept = {t.dtype for t in tensors.values()} == {model.dtype} and model.device.type == "cpu"
        model.mapped = kept and not copy  # nothing was converted: the weights are the file
        return model
    finally:
        if not low_memory:
            found.file.close()  # converted tensors no longer need the map; the others hold it themselves
