"""Conversion to a file on disk, or to a pipeline in memory, by the same code."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.adapters.control import ControlModel
from minidiff.config import ModelConfig, from_json, one_of
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.pipeline import StableDiffusion, Unconditional, assemble
from minidiff.pipeline.assembly import build
from minidiff.samplers import sampler_from_config
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy, all_finite
from minidiff.storage.writing import Existing, check_place
from weights_convert.control import ControlSource, read_control, write_control
from weights_convert.detection import CONVERTED, Found, detect
from weights_convert.export_folder import shard_size, write_folder
from weights_convert.export_original import write_original
from weights_convert.folder import read_folder
from weights_convert.overlay import Choice, Override, merge, overlay, read_override, said
from weights_convert.report import Report, Source
from weights_convert.single import read_original
from weights_convert.swap import Swaps
from weights_convert.swap import swap as swap_parts

AnyPath = str | os.PathLike[str]
LAYOUTS = ("minidiff", "diffusers", "original")
SAFETENSORS, OTHER_FILES = (".safetensors", ".sft"), (".ckpt", ".pt", ".pth", ".bin", ".gguf", ".txt", ".json", ".zip")
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def open_source(
    src: AnyPath,
    *,
    ema: bool = False,
    config: Override = None,
    variant: str | None = None,
    swap: Swaps | None = None,
    prediction: str | None = None,
    sampler: Choice = None,
) -> Source:
    """Recognize ``src`` and translate its config and names; no tensor is read.

    ``ema`` takes the averaged weights of an original file; ``config`` (a dict, or the path of a JSON file) sets what
    shapes cannot tell, as fields of :class:`~minidiff.config.ModelConfig`. ``variant`` ("fp16", "non_ema"): variant of
    a folder's weights. ``swap`` replaces parts, {"vae": "better.safetensors"}, and supplies those that a single file
    lacks. ``prediction`` ("epsilon", "v_prediction", "sample") and ``sampler`` set what a single file may leave open:
    the prediction type, and the sampler that the model was distilled for: a name, or ``{"name": "dpmpp_2m",
    "sigma_spacing": "karras"}``; options without a name change those of the sampler that is found.

    Raises :class:`CheckpointError` and :class:`UnsupportedError` for problems of ``src`` or a part, and
    :class:`ConfigError` for problems of ``config``.
    """
    path, override = Path(src), said(config, prediction, sampler)
    found = detect(path)
    if found.is_control:
        raise CheckpointError(f"{path}: a {found.family}, which steers a model and is none; give it as a control")
    if found.layout != "minidiff" and found.family not in CONVERTED[found.layout]:
        why = "; ".join(found.evidence)
        raise UnsupportedError(
            f"{path}: family {found.family}, which minidiff does not convert from this layout ({why})"
        )
    report = Report(str(path), found.layout, found.family, list(found.evidence))
    if ema and found.layout != "original":
        raise CheckpointError(f"{path}: --ema is for original single files; a {found.layout} one has no EMA weights")
    if variant is not None and found.layout != "diffusers":
        raise CheckpointError(f"{path}: variant={variant!r} is for diffusers folders; a {found.layout} file has one")
    if found.layout == "diffusers":
        source = read_folder(path, found.index, report, override=override, variant=variant)
    elif found.layout == "original":
        if found.others:
            report.dropped.append(("training state", len(found.others), f"no tensors: {', '.join(found.others[:4])}"))
        source = _original(found, report, ema, override, swap)
    else:
        saved = checkpoint.open_checkpoint(path)
        report.family = saved.config.family
        source = Source(overlay(saved.config, override), saved.file.lazy, report)
        report.mapped = {n: sum(k.startswith(f"{n}.") for k in source.tensors) for n in checkpoint.build(saved.config)}
    if sampler is not None:
        sampler_from_config(source.config.sampler)
    source = swap_parts(source, swap or {})
    vae, unet = source.config.vae, source.config.unet
    if vae is not None and unet.out_channels != vae.latent_channels:
        clash = f"UNet makes {unet.out_channels} channels, the VAE reads {vae.latent_channels}"
        raise CheckpointError(f"{path}: the {clash}; the parts are from different models")
    return source


def open_control(src: AnyPath, *, config: Override = None, variant: str | None = None, **others: Any) -> ControlSource:
    """Recognize a ControlNet or T2I-Adapter and translate its config and names; no tensor is read.

    ``config`` sets what shapes cannot tell, as fields of :class:`~minidiff.config.ControlConfig`; ``variant``: variant
    of a folder's weights. Raises :class:`CheckpointError` and :class:`UnsupportedError` for problems of ``src``, and
    :class:`ConfigError` for any of ``others``, the arguments of :func:`open_source` that are about models.
    """
    found = detect(src)
    given = next((name for name, value in others.items() if value), None)
    if given is not None:
        raise ConfigError(f"{found.path}: {given} is given, which is for models; this is a {found.family}")
    if not found.is_control:
        raise CheckpointError(f"{found.path}: a {found.family} model, no control (a ControlNet or a T2I-Adapter)")
    return read_control(found, read_override(config), variant)


def _original(found: Found, report: Report, ema: bool, override: dict[str, Any], given: Swaps | None) -> Source:
    """Read a single file. One that minidiff wrote has its config in the header, which takes precedence over rules."""
    header = found.metadata.get(checkpoint.CONFIG_KEY)
    if header is None:
        return read_original(found.tensors, report, ema=ema, override=override, given=given)
    try:
        known = dataclasses.asdict(from_json(ModelConfig, header))
    except ConfigError as e:
        raise CheckpointError(f"{found.path}: the config in its header cannot be used ({e})") from None
    known = merge(known, override)
    source = read_original(found.tensors, report, ema=ema, override=known, given=given)
    source.config = replace(source.config, sampler=known["sampler"])  # without options of the family's
    report.notes.append("config: minidiff wrote it into the file's header; it takes precedence over the family's rule")
    return source


def convert(
    src: AnyPath,
    dst: AnyPath,
    to: str = "minidiff",
    dtype: torch.dtype | str | None = None,
    *,
    ema: bool = False,
    config: Override = None,
    variant: str | None = None,
    swap: Swaps | None = None,
    sharded: int | str | None = None,
    prediction: str | None = None,
    sampler: Choice = None,
    existing: Existing = "replace",
) -> Report:
    """Convert the checkpoint ``src``, of any supported layout, to ``dst`` in layout ``to``; return a report.

    ``to``: "minidiff" and "original" write one file, whose name must end with .safetensors; "diffusers" writes a
    pipeline folder, with weights in files of at most ``sharded`` bytes ("5GB"). ``dtype`` (a torch dtype or its name)
    converts floating-point tensors; None keeps their dtypes. One tensor at a time is in memory, and ``dst`` appears
    whole or not at all. ``existing``: "replace" replaces an existing file, "refuse" raises :class:`ConfigError`, even
    if it appears during the conversion; a folder is never replaced. The other arguments are those of
    :func:`open_source`.

    Raises what that raises, :class:`CheckpointError` for a tensor with NaN or infinite values and for a target folder
    that is not empty, and :class:`UnsupportedError` for a model that the layout cannot represent.
    """
    one_of(LAYOUTS, to=to)
    if sharded is not None and to != "diffusers":
        raise ConfigError(f"sharded={sharded!r} is for to='diffusers'; {to!r} is one file")
    target, shard = _dtype(dtype), None if sharded is None else shard_size(sharded)
    if Path(dst).exists() and Path(src).exists() and os.path.samefile(src, dst):
        raise ConfigError(f"{dst}: would overwrite its own source; name another file")
    if to != "diffusers":
        check_name(dst, to)
        check_place(dst, existing)
    of_models = {"ema": ema, "swap": swap, "prediction": prediction, "sampler": sampler}
    source: Source | ControlSource
    if detect(src).is_control:
        source = open_control(src, config=config, variant=variant, **of_models)
    else:
        source = open_source(
            src, ema=ema, config=config, variant=variant, swap=swap, prediction=prediction, sampler=sampler
        )
    tensors = {name: _checked(name, t, str(src), target) for name, t in source.tensors.items()}
    if target is not None:
        source.report.notes.append(f"floating-point tensors converted to {str(target).removeprefix('torch.')}")
    if isinstance(source, ControlSource):
        source.report.hash = write_control(dst, to, source.config, tensors, existing, shard)
        return replace(source.report, target=os.fspath(dst))
    tables = (source.config.tokenizer, source.config.tokenizer_2)
    words = [name for table in tables if table is not None for name, _ in table.added]
    if words and to != "minidiff":  # other projects keep them in separate files, and the model with the public table
        raise UnsupportedError(f"{src}: has learned {words[0]!r}; the layout {to!r} keeps no such words")
    if to == "diffusers":
        write_folder(dst, source.config, tensors, source.report, shard)
    elif to == "original":
        source.report.hash = write_original(dst, source.config, tensors, source.report, existing)
    else:
        source.report.hash = checkpoint.write_checkpoint(dst, source.config, tensors, existing)
    return replace(source.report, target=os.fspath(dst))


def load(
    src: AnyPath,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    ema: bool = False,
    config: Override = None,
    variant: str | None = None,
    swap: Swaps | None = None,
    prediction: str | None = None,
    sampler: Choice = None,
    low_memory: bool = False,
    copy: bool = False,
) -> StableDiffusion | Unconditional | ControlModel:
    """Load any supported layout as a pipeline, or a control beside one, converted in memory.

    ``device``, ``dtype``, ``low_memory`` and ``copy`` are those of :func:`minidiff.load`, which also describes what
    happens if the mapped file of a model is truncated. Raises what :func:`open_source` raises.
    """
    if detect(src).is_control:
        of_models = {"ema": ema, "swap": swap, "prediction": prediction, "sampler": sampler}
        control = open_control(src, config=config, variant=variant, **of_models)
        tensors = checkpoint.copied(control.tensors, low_memory) if copy else control.tensors
        return build(ControlModel, control.config, tensors, device, dtype, os.fspath(src), "", low_memory)
    source = open_source(
        src, ema=ema, config=config, variant=variant, swap=swap, prediction=prediction, sampler=sampler
    )
    tensors = checkpoint.copied(source.tensors, low_memory) if copy else source.tensors
    return assemble(source.config, tensors, device, dtype, os.fspath(src), low_memory=low_memory)


def check_name(dst: AnyPath, to: str) -> None:
    """Raise :class:`ConfigError` for a target whose name does not match what the layout writes.

    The command lines check the names of folders, too; a program may name a folder freely.
    """
    dst = Path(dst)
    suffix = dst.suffix.lower()
    if to != "diffusers" and suffix not in ("", *SAFETENSORS):
        why = "single files are written as safetensors, never as pickles or anything else"
        raise ConfigError(f"{dst}: {why}; name it .safetensors")
    if to == "diffusers" and suffix in (*SAFETENSORS, *OTHER_FILES) and not dst.is_dir():
        raise ConfigError(f"{dst}: to='diffusers' writes a folder; name it {dst.stem}")


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    found = FLOATS.get(given) if isinstance(given, str) else given
    if given is not None and found not in FLOATS.values():
        one_of(FLOATS, dtype=given)
    return found


def _checked(name: str, tensor: Lazy, where: str, dtype: torch.dtype | None) -> Lazy:
    """Return ``tensor`` so that it is converted to ``dtype`` and checked for NaN and infinity when it is loaded."""
    if not tensor.dtype.is_floating_point:
        return tensor
    want = dtype or tensor.dtype

    def load() -> Tensor:
        found = tensor.load()
        if not all_finite(found):
            bad = int((~torch.isfinite(found)).sum())
            raise CheckpointError(f"{where}: {bad} of {found.numel()} values of {name!r} are NaN or infinite")
        out = found.to(want)
        if want != found.dtype and not all_finite(out):
            most = float(found.abs().max())
            raise CheckpointError(f"{where}: {name!r} reaches {most:g}, too much for {want}; choose another dtype")
        return out

    return Lazy(tensor.shape, want, load)
