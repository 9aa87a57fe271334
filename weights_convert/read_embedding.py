"""Textual inversion files: a learned word and its vectors, in each of the forms that are about.

{"<cat-toy>": (768,) or (n, 768)}                         diffusers (learned_embeds.bin, .safetensors)
{"string_to_param": {"*": (n, 768)}, "name": "cat-toy"}   the first ones, and A1111 (.pt)
{"emb_params": (n, 768)}                                  A1111 (.safetensors); the word is the file's name
{"clip_l": (n, 768), "clip_g": (n, 1280)}                 for SDXL's two encoders; the word is the file's name
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minidiff.config import ModelConfig, quote
from minidiff.embeddings import Word
from minidiff.errors import CheckpointError
from minidiff.files import TensorFile
from weights_convert.ckpt import read_object

SDXL = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}


def read_embedding(path: str | os.PathLike[str], config: ModelConfig, name: str | None = None) -> Word:
    """The word in ``path`` for a model of ``config``, called ``name``, or as the file or its name says.

    Raises :class:`CheckpointError` for a file that is damaged or holds no vectors of a text encoder.
    """
    path = Path(path)
    found, told = read_file(path)
    only = next((part for part in SDXL.values() if getattr(config, part) is not None), "text_encoder")
    if found.keys() == SDXL.keys():
        vectors = {SDXL[key]: rows(path, tensor) for key, tensor in found.items()}
    elif len(found) == 1:
        (key, tensor), *_ = found.items()
        vectors = {only: rows(path, tensor)}
        told = told or (key if key not in ("emb_params", "*") else None)
    else:
        raise CheckpointError(
            f"{path}: {len(found)} tensors, {', '.join(map(quote, list(found)[:3]))}; no learned word"
        )
    return Word(name or told or path.stem, vectors)


def rows(path: Path, tensor: Tensor) -> Tensor:
    """Vectors as (n, width): a single one may come without the first dimension."""
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or tensor.numel() == 0 or not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: a tensor of shape {list(tensor.shape)} and {tensor.dtype}; no vectors of a word"
        )
    return tensor


def read_file(path: Path) -> tuple[Mapping[str, Tensor], str | None]:
    """The tensors of a file, and the word's name where it is told."""
    if path.suffix.lower() not in (".safetensors", ".sft"):
        found = read_object(path)
        inner = found.get("string_to_param", found)
        told = found.get("name") if "string_to_param" in found else None
        inner = inner if isinstance(inner, dict) else {}
        return {str(k): t.detach() for k, t in inner.items() if isinstance(t, Tensor)}, told if isinstance(
            told, str
        ) else None
    file = TensorFile(path)
    try:
        return {key: tensor.load().clone() for key, tensor in file.lazy.items()}, None
    finally:
        file.close()
