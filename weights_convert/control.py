"""Controls of other projects: ControlNets and T2I-Adapters, from folders and single files, and back.

ControlNets come as folders of diffusers, as files with the names of their author's code (``control_model.*``, with or
without that prefix, alone or inside a whole checkpoint), and as bare files with diffusers' names; T2I-Adapters
likewise. Bare files have no config: it follows from their shapes (``shapes_control.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minidiff.config import ControlConfig, ControlNetConfig, T2IAdapterConfig, from_json
from minidiff.errors import CheckpointError, ConfigError
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy, write_tensors
from minidiff.storage.writing import Existing
from weights_convert import keys_original, keys_t2i, shapes_control
from weights_convert.component import key_map, meta_model, read_component
from weights_convert.detection import Found, family_of_control
from weights_convert.engine import Drop, Module, expand, restore, translate
from weights_convert.export_folder import write_component
from weights_convert.overlay import merge, overlay
from weights_convert.report import Report

BESIDE = Drop("the model beside it", rf"(?!{keys_original.CONTROL}\.).*", "a ControlNet alone is wanted")


@dataclass
class ControlSource:
    """A whole control under minidiff's names ("control.conv_in.weight"), not read yet."""

    config: ControlConfig
    tensors: dict[str, Lazy]
    report: Report


def read_control(found: Found, override: Mapping[str, Any], variant: str | None) -> ControlSource:
    """Translate config and names of a control of any layout; no tensor is read.

    Raises :class:`CheckpointError` for keys or shapes that do not fit, and :class:`UnsupportedError` for an option that
    minidiff's networks do not have.
    """
    report = Report(str(found.path), found.layout, found.family, list(found.evidence))
    if found.layout == "minidiff":
        saved = checkpoint.open_any(found.path)
        assert isinstance(saved.config, ControlConfig)
        config, tensors = overlay(saved.config, override), saved.file.lazy
        report.mapped = {"control": len(tensors)}
    else:
        own = override.get("control", {})
        if found.path.is_dir():
            component = read_component(found.path, None, own, variant)
            net, part = component.config, component.part
            report.notes += component.notes
        else:
            net, part = _bare(found, own)
            report.notes.append("heads and norm groups follow the rule of the public models, as a single file has none")
        assert isinstance(net, (ControlNetConfig, T2IAdapterConfig))
        report.drop(part.dropped)
        config = ControlConfig(family=family_of(net), control=net)
        config = overlay(config, {key: value for key, value in override.items() if key != "control"})
        tensors = {f"control.{k}": t for k, t in part.tensors.items()}
        report.mapped = {"control": len(tensors)}
    report.family = config.family
    return ControlSource(config, tensors, report)


def family_of(net: ControlNetConfig | T2IAdapterConfig) -> str:
    """Return the family of a control: the models that it steers, and what it is."""
    if isinstance(net, T2IAdapterConfig):
        return f"{'sdxl' if net.kind == 'xl' else 'sd1'}-t2i-adapter"
    return f"{'sdxl' if net.added_dim is not None else 'sd2' if net.linear_proj else 'sd1'}-controlnet"


def _bare(found: Found, override: Mapping[str, Any]) -> tuple[Any, Any]:
    """Read a single file: config and tensors."""
    where, tensors, original = str(found.path), found.tensors, found.layout == "original"
    family, root = family_of_control(tensors) or ("", "")
    drops: tuple[Drop, ...] = ()
    kind: type[ControlNetConfig] | type[T2IAdapterConfig]
    if family == "controlnet":
        kind, fields = ControlNetConfig, shapes_control.controlnet(tensors, where, root, original=original)
        drops = (BESIDE,) if root else ()
    else:
        kind, fields = T2IAdapterConfig, shapes_control.t2i_adapter(tensors, where, original=original)
    try:
        config = from_json(kind, merge(fields, override))
    except ConfigError as e:
        if override:
            raise
        raise CheckpointError(f"{where}: {e}; config= says what shapes can't tell") from None
    model = meta_model(config)
    prefix = f"{root}." if root else ""
    pairs = expand(_original(config, prefix) if original else key_map(config, {}), model)
    return config, translate(pairs, tensors, model, where=where, drops=drops)


def _original(config: ControlNetConfig | T2IAdapterConfig, prefix: str = f"{keys_original.CONTROL}.") -> list[Module]:
    if isinstance(config, T2IAdapterConfig):
        return list(keys_t2i.t2i_adapter(config, original=True))
    return list(keys_original.controlnet(config, prefix=prefix))


def write_control(
    dst: str | os.PathLike[str],
    to: str,
    config: ControlConfig,
    tensors: Mapping[str, Lazy],
    existing: Existing,
    sharded: int | None = None,
) -> str | None:
    """Write a control in layout ``to``; return the content hash of a file."""
    if to == "minidiff":
        return checkpoint.write_checkpoint(dst, config, tensors, existing)
    own = {k.removeprefix("control."): t for k, t in tensors.items()}
    if to == "original":
        pairs = expand(_original(config.control), meta_model(config.control))
        return write_tensors(dst, restore(pairs, own), {"format": "pt"}, existing)
    write_component(dst, config.control, own, sharded)
    return None
