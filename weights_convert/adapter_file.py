"""The file of an adapter or of learned words: told by what it holds, whatever it is called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from minidiff.errors import CheckpointError
from minidiff.files import Lazy, TensorFile
from minidiff.reading import PICKLES, content, mistaken
from weights_convert.ckpt import read_pickle


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle; if not, it is a safetensors file.

    Raises :class:`CheckpointError` for a path that is missing or no regular file, and for a file that is neither.
    """
    found = content(path)
    if found == "safetensors" or found in PICKLES:
        return found in PICKLES
    raise CheckpointError(f"{path}: is {mistaken(path) or 'neither a safetensors file nor a pickle of torch'}")


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Mapping[str, Lazy], Mapping[str, str]]]:
    """The tensors of a file, of which none is read before it is asked for, and the texts in its header."""
    if is_pickle(path):
        yield read_pickle(path)[0], {}
        return
    with closing(TensorFile(path)) as file:
        yield file.lazy, file.metadata
