"""Description of a minidiff file as text: family, parts, sizes, schedule, sampler; and a check of its bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from minidiff.cli.controls import expects
from minidiff.config import (
    ControlConfig,
    ModelConfig,
    ScheduleConfig,
    T2IAdapterConfig,
    TAESDConfig,
    TokenizerConfig,
    UNetConfig,
)
from minidiff.console import one_line
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipeline.estimate import shown
from minidiff.pipeline.opening import estimate
from minidiff.pipeline.request import Request
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy, all_finite, content_hash
from minidiff.storage.identity import identify

Rows = list[tuple[str, str]]


def describe(path: str | os.PathLike[str]) -> str:
    """Return a page about a minidiff file. Its header is read, and the tensors' names and shapes are compared with its
    config.

    Raises :class:`CheckpointError` for anything that is not a sound minidiff file.
    """
    found = checkpoint.open_any(path)
    checkpoint.account(checkpoint.build(found.config), found.file.lazy, str(path))
    told = describe_any(found.config, path)
    rows = [("file", str(path)), *told, *_memory(found.config, path), ("hash", found.hash or "none")]
    rows.append(("identity", identify(found.config, found.file.lazy)))  # what pictures call it
    return f"{table(rows)}\n\n{size_table(found.file.lazy)}"


def _memory(config: ModelConfig | ControlConfig, path: str | os.PathLike[str]) -> Rows:
    """Return a row with the memory that a picture of the model's own size takes, if it can be had from a prompt."""
    prompt = None if isinstance(config, ControlConfig) or config.text_encoder is None else ""
    try:
        told = estimate(path, Request(prompt), "cpu", torch.float32)
    except (CheckpointError, ConfigError):  # a control, and models that need a picture
        return []
    e = told.extent
    one = f"for a picture of {e.width} x {e.height} in float32"
    return [("memory", f"about {shown(told.peak)} on a CPU {one}; `minidiff generate --estimate` says it of others")]


def describe_any(config: ModelConfig | ControlConfig, path: str | os.PathLike[str]) -> Rows:
    """Return the contents of the config of a model, or of a control at ``path``, as (name, text) rows."""
    return describe_config(config) if isinstance(config, ModelConfig) else describe_control(config, path)


def describe_control(config: ControlConfig, path: str | os.PathLike[str]) -> Rows:
    """Return the contents of a control's config, and what a file of this name expects to see, as rows."""
    c, wanted = config.control, expects(os.fspath(path))
    if isinstance(c, T2IAdapterConfig):
        text = f"T2I-Adapter ({c.kind}); features of widths {_list(c.channels)}, from squares of {c.factor} pixels"
    else:
        text = f"ControlNet; {_unet(c)}; outputs averaged over the picture" if c.pooled else f"ControlNet; {_unet(c)}"
    rows = [("family", config.family), ("control", text)]
    order = ", in the order blue, green, red" if getattr(c, "bgr", False) else ""
    rows.append(("picture", f"{c.image_channels} channels{order}"))
    return [*rows, ("expects", wanted)] if wanted else rows


def describe_config(config: ModelConfig) -> Rows:
    """Return the contents of a config as (name, text) rows."""
    rows = [("family", config.family), ("unet", _unet(config.unet))]
    if config.vae is not None:
        v = config.vae
        kind = f"tiny, width {v.width}" if isinstance(v, TAESDConfig) else f"widths {_list(v.channels)}"
        rows.append(("vae", f"{kind}; {v.latent_channels} latent channels, 1/{v.factor} the side"))
    for name in ("text_encoder", "text_encoder_2"):
        c = getattr(config, name)
        if c is not None:
            rows.append((name, f"{c.layers} layers of width {c.width}, {c.heads} heads, {c.activation}"))
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(config, name) is not None:
            rows.append((name, _tokenizer(getattr(config, name))))
    factor = config.vae.factor if config.vae else 1
    height, width = (side * factor for side in config.unet.sides)
    rows += [
        ("picture", f"{width} x {height} by default"),
        ("schedule", _schedule(config.schedule)),
        ("sampler", _sampler(config.sampler)),
    ]
    return rows


def check_tensors(path: str | os.PathLike[str]) -> str:
    """Read every byte of a minidiff file, and return a line that says what was checked.

    Raises :class:`CheckpointError` if the content hash is not the one in the header, or for the first tensor (in the
    order of their names) that holds a NaN or an infinity.
    """
    found = checkpoint.open_any(path)
    wrong = []
    actual = content_hash(path)
    if actual != found.hash:
        wrong.append(f"the content's hash is {actual}, the header says {found.hash or 'nothing'}: the file was changed")
    bad = first_not_finite(found.file.lazy)
    if bad:
        wrong.append(f"tensor {bad[0]!r} holds {bad[1]}")
    if wrong:
        raise CheckpointError(f"{path}: {'; '.join(wrong)}; get or convert it again")
    return f"checked: the hash fits, and all {len(found.file.lazy):,} tensors are finite"


def first_not_finite(tensors: Mapping[str, Lazy]) -> tuple[str, str] | None:
    """Return (name, "3 NaN and 1 infinite values of 64") of the first tensor that is not finite."""
    for name in sorted(tensors):
        tensor = tensors[name].load()
        if not all_finite(tensor):
            nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            return name, f"{nan:,} NaN and {inf:,} infinite values of {tensor.numel():,}"
    return None


def size_table(tensors: Mapping[str, Lazy]) -> str:
    """Return tensors, parameters, bytes and dtypes by part ("unet" of "unet.conv_in.weight"), with their sum."""
    parts: dict[str, list[Lazy]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(name.partition(".")[0], []).append(tensor)
    order = [p for p in checkpoint.PARTS if p in parts]
    rows = [_size_row(p, parts[p]) for p in [*order, *sorted(parts.keys() - set(order))]]
    rows.append(_size_row("total", tensors.values()))
    lines = [("part", "tensors", "parameters", "size", "dtype"), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(_aligned(line, widths) for line in lines)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Format (name, text) rows with the texts one below another, one line each whatever a file may say."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {one_line(text)}" for name, text in rows)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers, dtype = line
    cells = [name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=False)), dtype]
    return "  ".join(cells)


def _size_row(name: str, tensors: Iterable[Lazy]) -> tuple[str, str, str, str, str]:
    tensors = list(tensors)
    count = sum(torch.Size(t.shape).numel() for t in tensors)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors})
    return name, f"{len(tensors):,}", f"{count:,}", _bytes(sum(t.nbytes for t in tensors)), ", ".join(dtypes)


def _bytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} B"


def _unet(c: UNetConfig) -> str:
    kinds = {level.attention for level in (*c.levels, c.mid)} - {"none"}
    reads = f"; reads a context of width {c.context_dim}" if "text" in kinds else "; no prompt"
    added = f", added {c.added_dim}" if c.added_dim else ""
    return f"widths {_list(level.channels for level in c.levels)}; {c.in_channels} channels in{reads}{added}"


def _tokenizer(c: TokenizerConfig) -> str:
    which = "CLIP's public table" if c.vocab is None else f"its own table of {len(c.vocab):,} tokens"
    return f"{which}; {c.length} ids a prompt, filled up with id {c.pad}"


def _schedule(c: ScheduleConfig) -> str:
    betas = f"{c.beta_schedule} betas" if c.betas is None else "betas of its own"
    if c.betas is None and c.beta_schedule in ("linear", "scaled_linear", "sigmoid"):
        betas += f" from {c.beta_start:g} to {c.beta_end:g}"
    return f"{c.steps} timesteps, {betas}; the model predicts {c.prediction}{', zero terminal SNR' * c.zero_snr}"


def _sampler(config: Mapping[str, Any]) -> str:
    options = ", ".join(f"{k}={v}" for k, v in _flat(config))
    return f"{config.get('name', 'unknown')}{' (' + options + ')' if options else ''}"


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif key != "name":
            yield key, value


def _list(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
