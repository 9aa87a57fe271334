"""Identity of a model: 32 hex digits from its config, the table of its tensors and some values of each.

The recipe of a picture holds it, since it distinguishes models without reading them completely. It identifies but does
not verify, which takes every byte (``minidiff info --check``). The values are taken from the tensors as they are
stored, before any conversion, so the identity of a file does not depend on the dtype of the computation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.config import ControlConfig, ModelConfig
from minidiff.storage.files import Lazy

SAMPLES = 16  # values of each tensor, evenly spaced from the first on, and the last
DIGITS = 32


def identify(config: ModelConfig | ControlConfig, tensors: Mapping[str, Lazy]) -> str:
    """Return the identity of the model with these tensors, by name, as 32 hex digits."""
    table = {name: [str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())}
    told = _told(config)
    told.pop("sampler", None)  # the default sampler is no part of the model
    digest = hashlib.sha256(json.dumps([told, table], sort_keys=True).encode(errors="surrogatepass"))
    for name in table:
        digest.update(sample(tensors[name].load()))
    return digest.hexdigest()[:DIGITS]


def taught(identity: str, words: Mapping[str, Tensor]) -> str:
    """Return the identity of a model that has learned ``words``, vectors by name."""
    digest = hashlib.sha256(identity.encode())
    for name, vectors in words.items():
        digest.update(name.encode(errors="surrogatepass") + sample(vectors))
    return digest.hexdigest()[:DIGITS]


def sample(tensor: Tensor) -> bytes:
    """Return some of a tensor's values as bytes. If the model is sharded (FSDP), all processes call this."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    if type(whole) not in (Tensor, nn.Parameter):
        return b""  # a tensor without readable values, such as a FakeTensor
    flat = whole.detach().reshape(-1)
    if flat.numel() > SAMPLES:
        flat = torch.cat([flat[:: -(-flat.numel() // SAMPLES)], flat[-1:]])
    return bytes(flat.contiguous().cpu().view(torch.uint8).numpy())


def _told(config: Any) -> Any:
    """Return a config without the fields that have their defaults, so that new fields change no identity."""
    if dataclasses.is_dataclass(config):
        values = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
        return {name: _told(value) for name, (value, default) in values.items() if value != default}
    if isinstance(config, Mapping):
        return {str(name): _told(value) for name, value in config.items()}
    return [_told(value) for value in config] if isinstance(config, (list, tuple)) else config
