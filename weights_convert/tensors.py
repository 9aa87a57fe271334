"""Reader of the tensors of a single file, safetensors or pickle, which is recognized by its first bytes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from minidiff.storage.files import Lazy, TensorFile
from minidiff.storage.reading import PICKLES, content
from weights_convert.ckpt import read_pickle


class Tensors(NamedTuple):
    """Contents of a file: its tensors, not read yet; texts of a safetensors header; other entries of a pickle."""

    lazy: dict[str, Lazy]
    metadata: dict[str, str]
    others: list[str]


def read_tensors(path: Path) -> Tensors:
    """Return the tensors of a safetensors file or a pickle.

    Raises :class:`CheckpointError` for a file that is missing, damaged or something else (a web page, a Git LFS
    pointer), and :class:`UnsupportedError` for quantized weights with scales.
    """
    if content(path) in PICKLES:
        tensors, others = read_pickle(path)
        return Tensors(tensors, {}, others)
    file = TensorFile(path)
    return Tensors(file.lazy, file.metadata, [])
