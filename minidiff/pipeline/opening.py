"""Pipelines of either kind, and controls: from a minidiff file, from tensors, the bundled one, and an untrained one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import nn

from minidiff.adapters.control import ControlModel
from minidiff.config import ControlConfig, ModelConfig
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.models.initial import first_weights
from minidiff.pipeline import assembly
from minidiff.pipeline.estimate import Estimate
from minidiff.pipeline.request import Request
from minidiff.pipeline.stable_diffusion import StableDiffusion
from minidiff.pipeline.unconditional import Unconditional
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy

BUNDLED = "assets/shapes.safetensors"


def kind_of(config: ModelConfig, source: str = "") -> type[StableDiffusion] | type[Unconditional]:
    """Return the class of pipeline for ``config``: with a text encoder :class:`StableDiffusion`."""
    return StableDiffusion if StableDiffusion.fits(config) else Unconditional


def any_kind_of(
    config: ModelConfig | ControlConfig, source: str = ""
) -> type[StableDiffusion] | type[Unconditional] | type[ControlModel]:
    """Return the class of pipeline for ``config``, or :class:`ControlModel` for that of a control."""
    return ControlModel if isinstance(config, ControlConfig) else kind_of(config, source)


def assemble(
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    source: str = "checkpoint",
    hash: str = "",
    low_memory: bool = False,
) -> StableDiffusion | Unconditional:
    """Build a pipeline from a config and tensors by name ("unet.conv_in.weight", ...), whatever their origin.

    ``device``: None for CUDA if available, else the CPU. ``dtype``: None for float32 on the CPU and the dtype of the
    tensors on CUDA. ``low_memory``: the parts take turns in memory (:mod:`minidiff.storage.low_memory`): each reads its
    tensors when it is called and frees them when another part is called. The results are bit-identical, but alternating
    between parts costs time for reading.
    """
    return assembly.build(kind_of(config), config, tensors, device, dtype, source, hash, low_memory)


def from_parts(config: ModelConfig, parts: Mapping[str, nn.Module], hash: str = "") -> StableDiffusion | Unconditional:
    """Return the pipeline that fits ``config``: :class:`StableDiffusion` with a text encoder, else
    :class:`Unconditional`.

    Raises :class:`UnsupportedError` for a model that no pipeline runs, such as a text UNet without a text encoder, or
    input channels other than a mask and a masked picture.
    """
    return kind_of(config)(config, parts, hash)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    low_memory: bool = False,
    copy: bool = False,
) -> StableDiffusion | Unconditional | ControlModel:
    """Open a minidiff file: a pipeline, or a control beside one. ``device``, ``dtype`` and ``low_memory`` are described
    in :func:`assemble`.

    :meth:`StableDiffusion.load`, :meth:`Unconditional.load` and :meth:`ControlModel.load` do the same for a known kind
    of model, and have that return type.

    Weights that need no conversion to another device or dtype are memory-mapped. Writing into the file while it is in
    use changes them, and truncating it ends the process with SIGBUS on the next access. Replacing the file by another
    of the same name is safe. ``copy`` reads everything into memory at once instead. With ``low_memory`` the file stays
    open.

    Raises :class:`CheckpointError` if ``path`` is not a minidiff file, and :class:`ConfigError` for ``copy`` together
    with ``low_memory``.
    """
    return assembly.open_file(path, any_kind_of, device, dtype, low_memory, copy)


def bundled(
    device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, low_memory: bool = False
) -> StableDiffusion:
    """Load the small model that ships with minidiff: 64 x 64 pictures of coloured shapes from captions such as "a red
    star on a blue background".

    ``minidiff/training/README.md`` describes its training data and its accuracy; ``scripts/train_shapes.py`` trains it
    from scratch. The arguments are those of :func:`assemble`. Raises :class:`UnsupportedError` if the model is not
    installed.
    """
    with bundled_file() as path:
        return StableDiffusion.load(path, device, dtype, low_memory=low_memory)


@contextmanager
def bundled_file() -> Iterator[Path]:
    """Return a context with the path of the bundled model. Raises :class:`UnsupportedError` if it is not installed."""
    asset = files("minidiff") / BUNDLED
    if not asset.is_file():
        raise UnsupportedError("no model given, and none is bundled with this version; name one with --model PATH")
    with as_file(asset) as path:
        yield path


def estimate(
    path: str | os.PathLike[str],
    request: Request,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    low_memory: bool = False,
    copy: bool = False,
) -> Estimate:
    """Return the memory that a run of ``request`` will take with the model at ``path``, whose weights are not read.

    The other arguments are those of :func:`load`. Raises :class:`CheckpointError` if ``path`` holds no pipeline, and
    :class:`ConfigError` for a request that the model cannot run.
    """
    pipe = load(path, device, dtype, low_memory=True)
    if isinstance(pipe, ControlModel):
        raise CheckpointError(f"{path}: a {pipe.config.family}, which steers a model; estimate a run of the model")
    pipe.mapped = pipe.mapped and not copy
    return pipe._estimate(request, in_turn=low_memory)


def random_model(config: ModelConfig, seed: int = 0) -> StableDiffusion | Unconditional:
    """Return an untrained model with random weights drawn from ``seed``, for experiments and as a start of training."""
    generator = torch.Generator("cpu").manual_seed(seed)
    parts = {name: part.to_empty(device="cpu") for name, part in checkpoint.build(config).items()}
    for part in parts.values():
        for module in part.modules():
            first_weights(module, generator)
    return from_parts(config, parts)
