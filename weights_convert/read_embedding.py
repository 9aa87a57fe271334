"""Reader of textual inversion files: learned words and their vectors, in every common format.

{"<cat-toy>": (768,) or (n, 768)}                         diffusers (learned_embeds.bin, .safetensors), also several
{"string_to_param": {"*": (n, 768)}, "name": "cat-toy"}   the first ones, in a ParameterDict, and A1111 (.pt)
{"emb_params": (n, 768)}                                  A1111 (.safetensors); the word is the file's name
{"clip_l": (n, 768), "clip_g": (n, 1280)}                 for SDXL's two encoders; the word is the file's name
{"text_encoders_0": (n, 768), "text_encoders_1": ...}     the same by diffusers' trainers of SDXL (.pti)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from minidiff.adapters.lora import KINDS
from minidiff.adapters.words import Word
from minidiff.config import ModelConfig, quote
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.storage.files import Lazy, TensorFile, lazy
from minidiff.storage.reading import content
from weights_convert.adapter_file import file_of, is_pickle
from weights_convert.ckpt import read_object
from weights_convert.unpickle import Foreign

ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
NAMELESS = ("emb_params", "*")
WEIGHTS = (".weight", ".bias", ".alpha")  # endings of keys of networks and adapters
MOST_WORDS = 256  # of one file
NAMES = ("learned_embeds",)  # name of the file that diffusers writes into a folder


def read_embedding(path: str | os.PathLike[str], config: ModelConfig, name: str | None = None) -> Word:
    """Read the word in ``path`` for a model of ``config``, named ``name``, or as in the file, or after the file.

    For a file with several words the first is returned, with the others in :attr:`Word.others`; they keep their names.
    Raises :class:`CheckpointError` for a file that is damaged or contains no vectors of a text encoder, and
    :class:`UnsupportedError` for the pictures in which A1111 embeds words.
    """
    path = Path(path)
    file = file_of(path, NAMES)
    if content(file) == "png":
        raise UnsupportedError(f"{file}: is a picture; words that are hidden in one are not read, get the .safetensors")
    with ExitStack() as stack:
        found, told = read_file(file, stack)
        by_encoder = {key: ENCODERS[key] for key in found if key in ENCODERS}
        if by_encoder:
            if len(by_encoder) < len(found) or len(set(by_encoder.values())) < len(found):
                raise CheckpointError(f"{file}: {listed(found)} do not belong together in one learned word")
            vectors = {part: rows(file, key, found[key]) for key, part in by_encoder.items()}
            return Word(name or told or path.stem, vectors, file=path.name)
        if not 1 <= len(found) <= MOST_WORDS or any(key.endswith(WEIGHTS) for key in found):
            raise CheckpointError(
                f"{file}: {listed(found) or 'no tensors'}; no learned words (an adapter is for --lora, a model for "
                "--model)"
            )
        if len(found) > 1 and name is not None:
            raise CheckpointError(
                f"{file}: has several words, {listed(found)}; they keep their names, leave {name!r} out"
            )
        only = "text_encoder" if config.text_encoder is not None or config.text_encoder_2 is None else "text_encoder_2"
        words = [
            Word(path.stem if key in NAMELESS else key, {only: rows(file, key, entry)}) for key, entry in found.items()
        ]
    if len(words) == 1:
        return Word(name or told or words[0].name, words[0].vectors, file=path.name)
    return Word(words[0].name, words[0].vectors, tuple(words[1:]), path.name)


def listed(found: Mapping[str, Lazy]) -> str:
    """List the first few of a file's tensors for a message."""
    return ", ".join(map(quote, list(found)[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def rows(path: Path, key: str, entry: Lazy) -> Tensor:
    """Return vectors as (n, width): a single one may lack the first dimension."""
    if len(entry.shape) not in (1, 2) or 0 in entry.shape or entry.dtype not in KINDS:
        raise CheckpointError(
            f"{path}: {quote(key)} has shape {list(entry.shape)} and {entry.dtype}; no vectors of a word"
        )
    tensor = entry.load().clone()
    return tensor[None] if tensor.ndim == 1 else tensor


def read_file(path: Path, stack: ExitStack) -> tuple[dict[str, Lazy], str | None]:
    """Return the tensors of a file, open until ``stack`` is closed, and the word's name if the file has it."""
    if not is_pickle(path):
        file = TensorFile(path)
        stack.callback(file.close)
        return {key.removeprefix("string_to_param."): entry for key, entry in file.lazy.items()}, None
    found = read_object(path)
    inner, name = found, None
    if "string_to_param" in found:
        inner, name = found["string_to_param"], found.get("name")
        if not isinstance(inner, dict):
            raise CheckpointError(f"{path}: its string_to_param is a {type(inner).__name__}; no learned word")
    foreign = next(((key, value.kind) for key, value in inner.items() if isinstance(value, Foreign)), None)
    if foreign is not None:
        raise CheckpointError(f"{path}: {quote(str(foreign[0]))} is {foreign[1]}; no vectors of a word")
    tensors = {str(key): tensor for key, tensor in inner.items() if isinstance(tensor, Tensor)}
    return {key: plain(path, key, t) for key, t in tensors.items()}, name if isinstance(name, str) and name else None


def plain(path: Path, key: str, tensor: Tensor) -> Lazy:
    """Return a tensor of a pickle after checking that all its entries are stored, not expanded from a few bytes."""
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise CheckpointError(f"{path}: {quote(key)} has entries that are not stored; no vectors of a word")
    return lazy(tensor.detach())
