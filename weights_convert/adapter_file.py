"""Files of adapters and of learned words, recognized by their content, not by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from minidiff.config import quote
from minidiff.errors import CheckpointError
from minidiff.storage.files import Lazy, TensorFile
from minidiff.storage.reading import PICKLES, content, mistaken
from weights_convert.ckpt import read_pickle


def file_of(path: Path, names: tuple[str, ...]) -> Path:
    """Return ``path``, or the file in that folder: one with one of ``names``, or else the only safetensors file.

    Raises :class:`CheckpointError` for a folder with none or several.
    """
    if not path.is_dir():
        return path
    inside = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin") and not p.name.startswith("."))
    known = [p for p in inside if p.stem in names] or [p for p in inside if p.suffix == ".safetensors"]
    stems = {p.stem for p in known}
    if len(stems) == 1:
        return known[-1]  # of a .bin and a .safetensors with the same name, which have the same content, the latter
    if not known:
        raise CheckpointError(f"{path}: a folder without {' or '.join(f'{n}.safetensors' for n in names)}; name a file")
    several = ", ".join(quote(p.name) for p in known[:3])
    raise CheckpointError(f"{path}: a folder of several ({several}{', ...' if known[3:] else ''}); name the file")


def is_pickle(path: Path) -> bool:
    """Return True if a file is a pickle; if not, it is a safetensors file.

    Raises :class:`CheckpointError` for a path that is missing or no regular file, and for a file that is neither.
    """
    found = content(path)
    if found == "safetensors" or found in PICKLES:
        return found in PICKLES
    raise CheckpointError(f"{path}: is {mistaken(path) or 'neither a safetensors file nor a pickle of torch'}")


@contextmanager
def open_tensors(path: Path) -> Iterator[tuple[Mapping[str, Lazy], Mapping[str, str]]]:
    """Open a file: its tensors, which are read on demand, and the texts in its header."""
    if is_pickle(path):
        yield read_pickle(path)[0], {}
        return
    with closing(TensorFile(path)) as file:
        yield file.lazy, file.metadata
