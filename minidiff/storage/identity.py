"""A name for a model, made of itself: 32 hex digits from its config, its tensors' table and some values of each.

It tells one model from another without reading either whole: what a picture notes of where it came from. It identifies
and does not verify, which takes every byte (``minidiff info --check``). Samples are taken of the tensors as they are
stored, before anything is converted, so one file has one name whatever it is computed in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.config import ModelConfig
from minidiff.storage.files import Lazy

SAMPLES = 16  # values of each tensor, evenly spaced from the first on, and the last
DIGITS = 32


def identify(config: ModelConfig, tensors: Mapping[str, Lazy]) -> str:
    """The name of the model that these tensors are, by their names, in 32 hex digits."""
    table = {name: [str(t.dtype), list(t.shape)] for name, t in sorted(tensors.items())}
    told = _told(config)
    told.pop("sampler", None)  # which one is the default does not make the model
    digest = hashlib.sha256(json.dumps([told, table], sort_keys=True).encode(errors="surrogatepass"))
    for name in table:
        digest.update(sample(tensors[name].load()))
    return digest.hexdigest()[:DIGITS]


def taught(identity: str, words: Mapping[str, Tensor]) -> str:
    """The name of a model that has learned ``words``, vectors by what they are called."""
    digest = hashlib.sha256(identity.encode())
    for name, vectors in words.items():
        digest.update(name.encode(errors="surrogatepass") + sample(vectors))
    return digest.hexdigest()[:DIGITS]


def sample(tensor: Tensor) -> bytes:
    """Some of a tensor's values, as bytes. Of a sliced model (FSDP) all processes take part."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    if type(whole) not in (Tensor, nn.Parameter):
        return b""  # a tensor without values to read, as a FakeTensor is
    flat = whole.detach().reshape(-1)
    if flat.numel() > SAMPLES:
        flat = torch.cat([flat[:: -(-flat.numel() // SAMPLES)], flat[-1:]])
    return bytes(flat.contiguous().cpu().view(torch.uint8).numpy())


def _told(config: Any) -> Any:
    """A config without the fields that are as they are by default: those that a later minidiff adds change no name."""
    if dataclasses.is_dataclass(config):
        values = {f.name: (getattr(config, f.name), f.default) for f in dataclasses.fields(config)}
        return {name: _told(value) for name, (value, default) in values.items() if value != default}
    if isinstance(config, Mapping):
        return {str(name): _told(value) for name, value in config.items()}
    return [_told(value) for value in config] if isinstance(config, (list, tuple)) else config
