"""Replacement of parts of a model: a better VAE, a finetuned text encoder, a tiny autoencoder for previews.

Such parts come in many forms: a component's folder with its config, a bare file of tensors with diffusers' or the
original names (with or without the prefix in the checkpoint that they are from), a whole checkpoint, the two files of
TAESD. A bare file has no config, so it must fit the config of the part that it replaces.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from minidiff.config import CLIPTextConfig, TAESDConfig, UNetConfig, VAEConfig
from minidiff.errors import CheckpointError, ConfigError
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy
from weights_convert import keys_diffusers, keys_taesd, openclip, shapes_original
from weights_convert import keys_original as originals
from weights_convert.component import AnyConfig, key_map, meta_model, read_component
from weights_convert.engine import Drop, Pair, Part, expand, translate
from weights_convert.folder import is_xl
from weights_convert.report import Source
from weights_convert.tensors import read_tensors

Swaps = Mapping[str, str | os.PathLike[str] | None]
TRANSFORMERS, OPEN_CLIP = "encoder.layers.0.layer_norm1.weight", "transformer.resblocks.0.ln_1.weight"
TAESD = re.compile(r"(.*)(encoder|decoder)(\.(?:safetensors|pth|pt))", re.DOTALL)  # the names of the author's files
HALVES = ("encoder", "decoder")


def swap(source: Source, files: Swaps) -> Source:
    """Replace parts of ``source``: {"vae": path, "text_encoder_2": path, ...}; None keeps a part.

    Raises :class:`ConfigError` for a part that the model does not have, and :class:`CheckpointError` for a file that
    contains no such part, or one that does not fit.
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
        if isinstance(found, VAEConfig) and not is_xl(config.family):
            found = dataclasses.replace(found, upcast=False)  # as in folder.py: only SDXL's pipelines use it
        changed[part] = found
        tensors = {k: t for k, t in tensors.items() if not k.startswith(f"{part}.")}
        tensors |= {f"{part}.{k}": t for k, t in translated.tensors.items()}
        source.report.mapped[part] = len(translated.tensors)
        source.report.drop(translated.dropped)
        source.report.notes.append(f"{part}: taken from {os.fspath(given)} ({layout})")
    try:  # at the end, since a UNet and its text encoder may be replaced together
        config = dataclasses.replace(config, **changed)
    except ConfigError as e:
        raise CheckpointError(f"{' and '.join(changed)} given: they do not fit the rest of the model ({e})") from None
    return Source(config, tensors, source.report)


def read_part(path: Path, part: str, mine: AnyConfig) -> tuple[AnyConfig, Part, str]:
    """Return config, tensors and layout of the part at ``path``; ``mine`` is the config that it has to fit."""
    author = _author(path) if part == "vae" else None
    if author is not None:
        return *_taesd(author), "TAESD's two files"
    if path.is_dir():
        place = path / part if (path / part).is_dir() else path
        component = read_component(place)
        if not isinstance(component.config, (VAEConfig, TAESDConfig) if part == "vae" else type(mine)):
            raise CheckpointError(
                f"{place}: is of another kind, a {type(component.config).__name__}; a {part} is wanted"
            )
        return component.config, component.part, "a component's folder"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    tensors, metadata, _ = read_tensors(path)
    if checkpoint.is_minidiff(metadata):
        return _from_minidiff(path, part)
    if part == "vae" and "decoder.layers.0.weight" in tensors:
        return *_tiny(path, tensors, original=False), "diffusers layout"
    model = meta_model(mine)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}

    def fit(form: Form) -> tuple[int, int]:
        """Return the number of tensors that match the names of a form, and of those that also match its shapes."""
        here = [p for p in form.pairs if p.theirs in tensors]
        return len(here), sum(p.form.stored(shapes[p.ours]) == tensors[p.theirs].shape for p in here)

    form = max(forms(mine, model, tensors), key=fit)
    if fit(form)[0]:
        others = (Drop("other parts", rf"(?!{re.escape(form.prefix)}).*", "only one part of that file is wanted"),)
        drops = (*form.drops, *originals.DROPS, *(others if form.prefix else ()))
        try:
            return mine, translate(form.pairs, tensors, model, where=str(path), drops=drops), form.layout
        except CheckpointError as e:
            raise CheckpointError(f"{e}; it has to fit the {part} that it replaces") from None
    shown = ", ".join(repr(k) for k in sorted(tensors)[:4]) or "none"
    raise CheckpointError(f"{path}: holds no {part} in a known form; its {len(tensors)} keys begin with {shown}")


def config_of(path: Path, part: str, rule: Mapping[str, Any], *, open_clip: bool = False) -> dict[str, Any]:
    """Return the config fields of the part at ``path``, for a model that has no config of that part yet.

    For a bare file they follow from its shapes and from ``rule``, the common values of its family; a folder and a
    minidiff file have a config. ``open_clip``: a text encoder that may have OpenCLIP's names.
    """
    pair = part == "vae" and TAESD.fullmatch(path.name)
    tensors, metadata, _ = ({}, {}, []) if pair or path.is_dir() else read_tensors(path)
    if not tensors or checkpoint.is_minidiff(metadata) or "decoder.layers.0.weight" in tensors:
        default: AnyConfig = VAEConfig() if part == "vae" else CLIPTextConfig()
        return dataclasses.asdict(read_part(path, part, default)[0])
    if part == "vae":
        root = originals.VAE if any(k.startswith(f"{originals.VAE}.") for k in tensors) else ""
        return {**shapes_original.vae(tensors, str(path), root), **rule}
    fused, named = _ends(tensors, OPEN_CLIP), _ends(tensors, TRANSFORMERS)
    pooled = part == "text_encoder_2"
    if fused and (open_clip or not named):
        return openclip.shapes(tensors, fused[0].removesuffix("."), str(path), pooled=pooled)
    prefix = named[0] if named else "text_model."
    fields = shapes_original.clip(tensors, str(path), prefix, "")
    if pooled:
        projection = tensors.get(f"{prefix.removesuffix('text_model.')}text_projection.weight")
        fields["projection"] = None if projection is None else projection.shape[0]
    return {**fields, **rule}


class Form(NamedTuple):
    """One form of a part in a bare file: the layout's name, the key map, the prefix of its keys, and the keys that are
    dropped."""

    layout: str
    pairs: list[Pair]
    prefix: str = ""
    drops: tuple[Drop, ...] = ()


def forms(config: AnyConfig, model: nn.Module, tensors: Mapping[str, Lazy]) -> Iterator[Form]:
    """Return every form that a bare file of this part may have."""
    if isinstance(config, CLIPTextConfig):
        yield from _text_forms(config, model, tensors)
        return
    yield Form("diffusers layout", expand(key_map(config, tensors), model))
    if isinstance(config, UNetConfig):
        modules, prefix = list(originals.unet(config)), f"{originals.UNET}."
    elif isinstance(config, VAEConfig):
        modules, prefix = list(originals.vae(config)), f"{originals.VAE}."
    else:
        return
    yield Form("original layout", expand(modules, model), prefix)
    bare = [m._replace(theirs=m.theirs.removeprefix(prefix)) for m in modules]
    yield Form("original layout, no prefix", expand(bare, model))


def _text_forms(config: CLIPTextConfig, model: nn.Module, tensors: Mapping[str, Lazy]) -> Iterator[Form]:
    """Return the forms of a text encoder by transformers' names or OpenCLIP's, under any prefix.

    The names of the first layer tell. The prefix before "text_model." is that of the encoder in the file.
    """
    pictures = Drop("picture encoder", r"(.*\.)?(visual|vision_model|visual_projection)\..*", "the other half of CLIP")
    yield Form("diffusers layout", expand(key_map(config, tensors), model), "", (pictures,))
    for prefix in _ends(tensors, TRANSFORMERS):
        outer = prefix.removesuffix("text_model.")
        modules = keys_diffusers.clip(config, prefix=prefix.removeprefix(outer))
        pairs = expand((m._replace(theirs=outer + m.theirs) for m in modules), model)
        yield Form("original layout" if outer else "diffusers layout", pairs, outer, (pictures,))
    for prefix in _ends(tensors, OPEN_CLIP):
        root = prefix.removesuffix(".")
        drops = (pictures, *openclip.drops(root, config.layers))
        yield Form("OpenCLIP layout", openclip.pairs(config, root, ""), prefix, drops)


def _ends(tensors: Mapping[str, Lazy], name: str) -> list[str]:
    """Return the prefixes of ``name`` in the keys that end with it."""
    return sorted(key.removesuffix(name) for key in tensors if key.endswith(name))


def _from_minidiff(path: Path, part: str) -> tuple[AnyConfig, Part, str]:
    found = checkpoint.open_checkpoint(path)
    config: AnyConfig | None = getattr(found.config, part)
    if config is None:
        raise CheckpointError(f"{path}: a minidiff file of family {found.config.family}, which has no {part}")
    own = {k.removeprefix(f"{part}."): t for k, t in found.file.lazy.items() if k.startswith(f"{part}.")}
    checkpoint.account({"": meta_model(config)}, {f".{k}": t for k, t in own.items()}, str(path))
    return config, Part(own), "a minidiff file"


def read_decoder(path: Path, mine: VAEConfig | TAESDConfig) -> tuple[VAEConfig | TAESDConfig, Mapping[str, Lazy]]:
    """Return config and tensors of the VAE at ``path``, of TAESD's author's files only of the decoder's.

    ``mine`` is the config that a bare file has to fit.
    """
    author = _author(path)
    if author is not None:
        tiny, part = _taesd(author, ("decoder",))
        return tiny, part.tensors
    found, part, _ = read_part(path, "vae", mine)
    assert isinstance(found, (VAEConfig, TAESDConfig))
    return found, part.tensors


def _author(path: Path) -> Path | None:
    """Return one of TAESD's author's files at ``path``, or in the folder there; None for anything else.

    Raises :class:`CheckpointError` for a folder with several of his models.
    """
    if not path.is_dir():
        return path if path.is_file() and TAESD.fullmatch(path.name) else None
    if (path / "config.json").is_file():
        return None
    found = {}
    for file in sorted(path.iterdir()):
        named = TAESD.fullmatch(file.name)
        if named is not None:
            found[named[1]] = file  # with the same name, .safetensors is the last
    if len(found) > 1:
        names = ", ".join(file.name for file in found.values())
        raise CheckpointError(f"{path}: holds several tiny autoencoders; name a file of one: {names}")
    return next(iter(found.values()), None)


def _taesd(path: Path, halves: tuple[str, ...] = HALVES) -> tuple[TAESDConfig, Part]:
    """Read the author's pair of files, of which ``path`` is one, or the named ``halves`` of it."""
    named = TAESD.fullmatch(path.name)
    assert named is not None
    tensors: dict[str, Lazy] = {}
    for half in halves:
        file = path.with_name(f"{named[1]}{half}{named[3]}")
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file; the tiny autoencoder is a pair, encoder and decoder")
        tensors |= {f"{half}.{k}": t for k, t in read_tensors(file).lazy.items()}
    return _tiny(path, tensors, halves, original=True)


def _tiny(
    path: Path, tensors: Mapping[str, Lazy], halves: tuple[str, ...] = HALVES, *, original: bool
) -> tuple[TAESDConfig, Part]:
    """Read a tiny autoencoder from its tensors, or the named ``halves`` of one. Its sizes follow from their shapes."""
    config = TAESDConfig()
    for half in halves:
        name = f"{half}.{'' if original else 'layers.'}{int(original and half == 'decoder')}.weight"
        first = tensors.get(name)
        if first is None or len(first.shape) != 4:
            raise CheckpointError(f"{path}: not the tiny autoencoder's layers ({name!r} is missing, or no convolution)")
        width, channels = first.shape[:2]
        if half == "encoder":
            config = dataclasses.replace(config, width=width, image_channels=channels)
        else:
            config = dataclasses.replace(config, width=width, latent_channels=channels)
    model = meta_model(config)
    pairs = [p for p in expand(keys_taesd.taesd(config, original=original), model) if p.ours.startswith(halves)]
    return config, translate(pairs, tensors, model, where=str(path))
