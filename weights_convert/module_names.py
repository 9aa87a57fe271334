"""Correspondence of minidiff's modules to those of diffusers and transformers, derived from the key maps."""

from __future__ import annotations

from minidiff.config import ControlConfig, ModelConfig
from minidiff.storage.checkpoint import CONTROL_PARTS, PARTS
from weights_convert.component import key_map


def module_names(config: ModelConfig | ControlConfig) -> dict[str, dict[str, str]]:
    """Return part -> {minidiff's name: the reference's}, for every module that may hold weights.

    The names are those of modules in the installed diffusers and transformers, whatever the keys of the checkpoint. A
    map also contains modules that a model may lack, such as the ``skip`` of a ResBlock of constant width.
    """
    parts = {name: getattr(config, name) for name in (PARTS if isinstance(config, ModelConfig) else CONTROL_PARTS)}
    return {name: {m.ours: m.theirs for m in key_map(c, {})} for name, c in parts.items() if c is not None}
