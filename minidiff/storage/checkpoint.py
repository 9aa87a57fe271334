"""minidiff's checkpoint format: one safetensors file with all parts, and all configs as JSON in its header.

Loading builds the modules on the meta device (shapes without memory), maps the file, and assigns each mapped tensor
with ``assign=True``. Only tensors that change device or dtype are copied, and the bytes of a weight are read from disk
when the network first uses it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidiff.config import (
    CLIPTextConfig,
    ControlConfig,
    ControlNetConfig,
    ModelConfig,
    T2IAdapterConfig,
    TAESDConfig,
    UNetConfig,
    VAEConfig,
    check,
    from_json,
    quote,
    to_json,
)
from minidiff.errors import CheckpointError, ConfigError
from minidiff.models.clip import CLIPText
from minidiff.models.control import ControlNet
from minidiff.models.t2i_adapter import T2IAdapter
from minidiff.models.taesd import TAESD
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE
from minidiff.storage.files import ALIGNMENT, HASH_KEY, Lazy, TensorFile, check_header, write_tensors
from minidiff.storage.reading import PICKLES, content
from minidiff.storage.writing import Existing

VERSION = "1"
VERSION_KEY = "minidiff.version"
CONFIG_KEY = "minidiff.config"
CONTROL_KEY = "minidiff.control"  # in its place in the file of a control
ELSEWHERE = "`minidiff convert` converts it, and weights_convert.load opens it unconverted"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONTROL_PARTS = ("control",)
MODELS: dict[type, type[nn.Module]] = {
    UNetConfig: UNet,
    VAEConfig: VAE,
    TAESDConfig: TAESD,
    CLIPTextConfig: CLIPText,
    ControlNetConfig: ControlNet,
    T2IAdapterConfig: T2IAdapter,
}
AnyConfig = ModelConfig | ControlConfig
Config = TypeVar("Config", bound=AnyConfig, covariant=True)


@dataclass(frozen=True)
class Checkpoint(Generic[Config]):
    """An open minidiff file: its config, its tensors (not read yet) and its content hash."""

    config: Config
    file: TensorFile
    hash: str


def build(config: AnyConfig) -> dict[str, nn.Module]:
    """Build the parts of a checkpoint by name on the meta device: all shapes, without memory or initial weights."""
    names = PARTS if isinstance(config, ModelConfig) else CONTROL_PARTS
    return {name: build_part(config, name) for name in names if getattr(config, name) is not None}


def build_part(config: AnyConfig, name: str) -> nn.Module:
    """Build one of these parts, which the checkpoint must have."""
    own = getattr(config, name)
    with torch.device("meta"), _Undrawn():
        return _make(MODELS[type(own)], own).eval()


class _Undrawn(TorchFunctionMode):
    """Mode in which new layers draw no random weights.

    On the meta device there is no memory to initialize, but torch would load its compiler (2 s) anyway, because normal_
    has no kernel of its own there.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _make(part: Any, config: Any) -> nn.Module:
    module: nn.Module = part(config)
    return module


def fill(
    parts: Mapping[str, nn.Module],
    tensors: Mapping[str, Lazy],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    source: str = "checkpoint",
) -> None:
    """Assign a tensor, named "part.parameter", to every parameter of ``parts``, converted if requested.

    Raises :class:`CheckpointError`, naming ``source``, for a missing tensor, an extra one, or another shape.
    """
    account(parts, tensors, source)
    for name, part in parts.items():
        state = {key: convert(tensors[f"{name}.{key}"].load(), device, dtype) for key in part.state_dict()}
        part.load_state_dict(state, assign=True)
        part.to(device=device)  # moves the buffers, which follow from the config; the weights are already there


def copied(tensors: Mapping[str, Lazy], low_memory: bool) -> dict[str, Lazy]:
    """Return ``tensors`` that are copied when they are read, so that their file does not stay mapped.

    Raises :class:`ConfigError` with ``low_memory``, which reads them from the file repeatedly.
    """
    check(not low_memory, "copy=True keeps the weights in memory, low_memory=True in their file; choose one of them")
    return {name: replace(t, load=lambda t=t: t.load().clone()) for name, t in tensors.items()}  # type: ignore[misc]


def sketch(
    parts: Mapping[str, nn.Module],
    tensors: Mapping[str, Lazy],
    dtype: torch.dtype | None = None,
    source: str = "checkpoint",
) -> None:
    """Give every parameter of ``parts`` the dtype that :func:`fill` would; they stay on the meta device.

    Raises what :func:`fill` raises, without reading any tensor.
    """
    account(parts, tensors, source)
    for name, part in parts.items():
        shapes = {key: tensors[f"{name}.{key}"] for key in part.state_dict()}
        state = {k: torch.empty(t.shape, dtype=dtype or t.dtype, device="meta") for k, t in shapes.items()}
        part.load_state_dict(state, assign=True)


def fetching(
    parts: Mapping[str, nn.Module], tensors: Mapping[str, Lazy], device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Return a function for each weight of ``parts`` that reads it from ``tensors``, on ``device`` and in its dtype."""

    def fetch(tensor: Lazy, dtype: torch.dtype) -> Callable[[], Tensor]:
        return lambda: convert(tensor.load(), device, dtype)

    weights = {f"{name}.{key}": p for name, part in parts.items() for key, p in part.named_parameters()}
    return {name: fetch(tensors[name], p.dtype) for name, p in weights.items()}


def account(parts: Mapping[str, nn.Module], tensors: Mapping[str, Lazy], source: str) -> None:
    """Check that ``tensors`` are exactly the parameters of ``parts``, names, shapes and kind, without reading any."""
    wanted = {f"{name}.{key}": tuple(p.shape) for name, part in parts.items() for key, p in part.state_dict().items()}
    for problem, names in (
        ("is missing", sorted(wanted.keys() - tensors.keys())),
        ("does not belong to this model", sorted(tensors.keys() - wanted.keys())),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{source}: tensor {quote(names[0])} {problem}{more}; the file and its config disagree"
            )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise CheckpointError(f"{source}: tensor {name!r} has shape {tensors[name].shape}, the config says {shape}")
        if not tensors[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{source}: tensor {name!r} has dtype {tensors[name].dtype}; weights must be floating point"
            )


def convert(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor of a file as models compute with it: on ``device``, in ``dtype`` (None: its own), aligned."""
    tensor = tensor.to(device=device, dtype=dtype)
    # A matrix-vector product on the CPU sums in another order if its matrix is not aligned to a cache line, and the
    # alignment of a mapped tensor is that of its file. In minidiff's own files few tensors need the copy.
    misplaced = tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT != 0
    return tensor.clone() if misplaced else tensor


def write_checkpoint(
    path: str | os.PathLike[str], config: AnyConfig, tensors: Mapping[str, Lazy], existing: Existing = "replace"
) -> str:
    """Write a minidiff file atomically, streaming; return its content hash (64 hex digits).

    The order of ``tensors`` does not matter: a model always gives the same file, byte for byte.
    ``existing``: treatment of an existing file, see :func:`~minidiff.storage.writing.atomic`.
    Raises :class:`CheckpointError` if the tensors are not exactly those that ``config`` describes.
    """
    parts = build(config)
    account(parts, tensors, str(path))
    tensors = {f"{name}.{key}": tensors[f"{name}.{key}"] for name, part in parts.items() for key in part.state_dict()}
    key = CONFIG_KEY if isinstance(config, ModelConfig) else CONTROL_KEY
    header = {"format": "pt", VERSION_KEY: VERSION, key: to_json(config)}
    return write_tensors(path, tensors, header, existing)


def is_minidiff(metadata: Mapping[str, str]) -> bool:
    """Return True if a safetensors header was written by :func:`write_checkpoint`."""
    return VERSION_KEY in metadata


def is_control(metadata: Mapping[str, str]) -> bool:
    """Return True if a minidiff file's header is that of a control, not of a model."""
    return CONTROL_KEY in metadata


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint[ModelConfig]:
    """Open the minidiff file of a model; no tensor is read.

    Raises :class:`CheckpointError` for anything but a minidiff file of a known version, and for that of a control.
    """
    found = open_any(path)
    if isinstance(found.config, ControlConfig):
        found.file.close()
        raise CheckpointError(f"{path}: {found.config.family}, a control beside a model, is no model; give it as one")
    return cast(Checkpoint[ModelConfig], found)


def open_any(path: str | os.PathLike[str]) -> Checkpoint[AnyConfig]:
    """Open the minidiff file of a model or of a control; no tensor is read.

    Raises :class:`CheckpointError` for anything but a minidiff file of a known version.
    """
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: is a folder, not a single file of minidiff's; {ELSEWHERE}")
    if content(path) in PICKLES:
        raise CheckpointError(f"{path}: is a pickle, as torch.save writes them, not minidiff's; {ELSEWHERE}")
    file = TensorFile(path)
    if not is_minidiff(file.metadata):
        raise CheckpointError(f"{path}: a safetensors file, but not minidiff's; {ELSEWHERE}")
    version = file.metadata[VERSION_KEY]
    if version != VERSION:
        raise CheckpointError(
            f"{path}: format version {quote(version)}, this minidiff reads {VERSION!r}; update minidiff"
        )
    check_header(path)
    config: AnyConfig
    try:
        if is_control(file.metadata):
            config = from_json(ControlConfig, file.metadata[CONTROL_KEY])
        else:
            config = from_json(ModelConfig, file.metadata.get(CONFIG_KEY, ""))
    except ConfigError as e:
        raise CheckpointError(f"{path}: its config cannot be used ({e})") from None
    return Checkpoint(config, file, file.metadata.get(HASH_KEY, ""))
