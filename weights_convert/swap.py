"""One part of a model taken from elsewhere: a better VAE, a finetuned text encoder, a tiny autoencoder for previews.

Such parts lie about in every form: a component's folder with its config, a bare file of tensors in diffusers' names or
in the original ones (with the prefix of the checkpoint they were cut from, or without), a whole checkpoint of which one
part is wanted, the two files of TAESD. A bare file has no config, so it must fit that of the part which it replaces.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minidiff import checkpoint
from minidiff.config import CLIPTextConfig, TAESDConfig, UNetConfig, VAEConfig
from minidiff.errors import CheckpointError, ConfigError
from minidiff.files import Lazy, TensorFile
from weights_convert import keys_original as originals
from weights_convert import keys_taesd
from weights_convert.ckpt import read_pickle
from weights_convert.component import AnyConfig, key_map, meta_model, read_component
from weights_convert.detection import PICKLE_MAGIC, PICKLES
from weights_convert.engine import Drop, Module, Part, expand, translate
from weights_convert.report import Source

Swaps = Mapping[str, str | os.PathLike[str] | None]
TAESD = re.compile(r"(.*)(encoder|decoder)(\.(?:safetensors|pth|pt))", re.DOTALL)  # the names of the author's files


def swap(source: Source, files: Swaps) -> Source:
    """``source`` with parts replaced: {"vae": path, "unet": path, "text_encoder": path}; None leaves one as it is.

    Raises :class:`ConfigError` for a part that the model does not have, and :class:`CheckpointError` for a file that
    holds no such part, or one that does not fit.
    """
    config, tensors, changed = source.config, dict(source.tensors), dict[str, Any]()
    for part, given in files.items():
        if given is None:
            continue
        mine = getattr(config, part, None) if part in checkpoint.PARTS else None
        if mine is None:
            have = ", ".join(p for p in checkpoint.PARTS if getattr(config, p) is not None)
            raise ConfigError(f"{part}={os.fspath(given)!r}: the model has no such part to replace; it has {have}")
        found, translated, layout = read_part(Path(given), part, mine)
        changed[part] = found
        tensors = {k: t for k, t in tensors.items() if not k.startswith(f"{part}.")}
        tensors |= {f"{part}.{k}": t for k, t in translated.tensors.items()}
        source.report.mapped[part] = len(translated.tensors)
        source.report.drop(translated.dropped)
        source.report.notes.append(f"{part}: taken from {os.fspath(given)} ({layout})")
    try:  # at the end: a UNet and the text encoder that goes with it may come together
        config = dataclasses.replace(config, **changed)
    except ConfigError as e:
        raise CheckpointError(f"{' and '.join(changed)} given: they do not fit the rest of the model ({e})") from None
    return Source(config, tensors, source.report)


def read_part(path: Path, part: str, mine: AnyConfig) -> tuple[AnyConfig, Part, str]:
    """Config and tensors of the part at ``path``, and in which layout it was; ``mine`` is the config it has to fit."""
    if path.is_dir():
        pair = sorted(p for p in path.iterdir() if TAESD.fullmatch(p.name)) if part == "vae" else []
        if pair and not (path / "config.json").is_file():
            return _taesd(pair[0])
        place = path / part if (path / part).is_dir() else path
        component = read_component(place)
        if not isinstance(component.config, (VAEConfig, TAESDConfig) if part == "vae" else type(mine)):
            raise CheckpointError(
                f"{place}: is of another kind, a {type(component.config).__name__}; a {part} is wanted"
            )
        return component.config, component.part, "a component's folder"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    if part == "vae" and TAESD.fullmatch(path.name):
        return _taesd(path)
    tensors, metadata = _tensors(path)
    if checkpoint.is_minidiff(metadata):
        return _from_minidiff(path, part)
    model = meta_model(mine)
    known = [(expand(modules, model), prefix, layout) for layout, modules, prefix in layouts(mine, tensors)]
    pairs, prefix, layout = max(known, key=lambda k: sum(p.theirs in tensors for p in k[0]))
    if any(p.theirs in tensors for p in pairs):
        others = (Drop("other parts", rf"(?!{re.escape(prefix)}).*", "only one part of that file is wanted"),)
        drops = (*originals.DROPS, *(others if prefix else ()))
        try:
            return mine, translate(pairs, tensors, model, where=str(path), drops=drops), layout
        except CheckpointError as e:
            raise CheckpointError(f"{e}; it has to fit the {part} that it replaces") from None
    shown = ", ".join(repr(k) for k in sorted(tensors)[:4]) or "none"
    raise CheckpointError(f"{path}: holds no {part} that is known; its {len(tensors)} keys begin with {shown}")


def layouts(config: AnyConfig, tensors: Mapping[str, Lazy]) -> Iterator[tuple[str, list[Module], str]]:
    """Every layout that a bare file of this part may have: its name, its key map, the prefix of the part's keys."""
    yield "diffusers layout", list(key_map(config, tensors)), ""
    whole: list[tuple[list[Module], str]] = []
    if isinstance(config, UNetConfig):
        whole = [(list(originals.unet(config)), f"{originals.UNET}.")]
    elif isinstance(config, VAEConfig):
        whole = [(list(originals.vae(config)), f"{originals.VAE}.")]
    elif isinstance(config, CLIPTextConfig):
        for prefix in ("text_model.", ""):
            whole.append((list(originals.clip(config, prefix=prefix)), f"{originals.CLIP}."))
    for modules, prefix in whole:
        yield "original layout", modules, prefix
        yield "original layout, no prefix", [m._replace(theirs=m.theirs.removeprefix(prefix)) for m in modules], ""


def _tensors(path: Path) -> tuple[Mapping[str, Lazy], Mapping[str, str]]:
    with open(path, "rb") as start:
        magic = start.read(4)
    if magic in PICKLE_MAGIC or path.suffix.lower() in PICKLES:
        return read_pickle(path)[0], {}
    file = TensorFile(path)
    return file.lazy, file.metadata


def _from_minidiff(path: Path, part: str) -> tuple[AnyConfig, Part, str]:
    found = checkpoint.read(path)
    config: AnyConfig | None = getattr(found.config, part)
    if config is None:
        raise CheckpointError(f"{path}: a minidiff file of family {found.config.family}, which has no {part}")
    own = {k.removeprefix(f"{part}."): t for k, t in found.file.lazy.items() if k.startswith(f"{part}.")}
    checkpoint.account({"": meta_model(config)}, {f".{k}": t for k, t in own.items()}, str(path))
    return config, Part(own), "a minidiff file"


def _taesd(path: Path) -> tuple[AnyConfig, Part, str]:
    """The author's pair of files, of which ``path`` is one."""
    named = TAESD.fullmatch(path.name)
    assert named is not None
    tensors: dict[str, Lazy] = {}
    for half in ("encoder", "decoder"):
        file = path.with_name(f"{named[1]}{half}{named[3]}")
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; the tiny autoencoder is a pair, encoder and decoder")
        tensors |= {f"{half}.{k}": t for k, t in _tensors(file)[0].items()}
    first = tensors.get("encoder.0.weight")
    last = tensors.get("decoder.1.weight")
    if first is None or last is None or len(first.shape) != 4 or len(last.shape) != 4:
        raise CheckpointError(f"{path}: not the tiny autoencoder's layers ('0.weight' of the encoder is missing)")
    config = TAESDConfig(width=first.shape[0], image_channels=first.shape[1], latent_channels=last.shape[1])
    model = meta_model(config)
    pairs = expand(keys_taesd.taesd(config, original=True), model)
    return config, translate(pairs, tensors, model, where=str(path)), "TAESD's two files"
