"""Application of a user's corrections to a config that was read or inferred."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from minidiff.config import from_json
from minidiff.errors import CheckpointError, ConfigError
from minidiff.samplers import sampler_from_config
from minidiff.storage.reading import read_object

C = TypeVar("C")
Override = Mapping[str, Any] | str | os.PathLike[str] | None
Choice = str | Mapping[str, Any] | None  # a sampler's name or config; without a name, options for the one that is found


def read_override(given: Override) -> dict[str, Any]:
    """Return a dict as it is, the JSON object in the file of a path, or no corrections for None."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    try:
        return read_object(given)
    except CheckpointError as e:
        raise ConfigError(f"config={e}; it must hold a JSON object like {{'unet': {{...}}}}") from None


def said(config: Override, prediction: str | None, sampler: Choice) -> dict[str, Any]:
    """Return the corrections in ``config`` and in the two arguments for prediction and sampler.

    Raises :class:`ConfigError` if there is no such sampler or option, or if ``config`` contradicts it.
    """
    found = read_override(config)
    given: dict[str, Any] = {}
    if prediction is not None:
        given["schedule"] = {"prediction": prediction}
    if sampler is not None:
        given["sampler"] = {"name": sampler} if isinstance(sampler, str) else dict(sampler)
        if "name" in given["sampler"]:  # otherwise options for the checkpoint's own sampler, which is not known yet
            sampler_from_config(given["sampler"])
    for part, options in given.items():
        for option, value in options.items():
            other = found[part].get(option, value) if isinstance(found.get(part), Mapping) else value
            if other != value:
                raise ConfigError(f"{part} {option}={value!r} is given, and {other!r} in config; leave one out")
    return dict(merge(found, given))


def overlay(config: C, patch: Mapping[str, Any]) -> C:
    """Return ``config`` with the fields of ``patch`` replaced, recursively: {"schedule": {"prediction": "sample"}}.

    Lists of the same length are patched entry by entry: {"unet": {"levels": [{"heads": 5}, {"heads": 10}]}}.
    Raises :class:`ConfigError` for a field that does not exist or a value that does not fit.
    """
    if not patch:
        return config
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)  # noqa: PT018
    return from_json(type(config), merge(dataclasses.asdict(config), patch))


def merge(base: Any, patch: Any) -> Any:
    """Merge as :func:`overlay` does, on parsed JSON. A patch with another ``name`` (a sampler's) replaces the whole."""
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        if patch.get("name", base.get("name")) != base.get("name"):
            return dict(patch)  # options of another sampler do not apply to this one
        return {**base, **{k: merge(base.get(k), v) for k, v in patch.items()}}
    if isinstance(base, (list, tuple)) and isinstance(patch, (list, tuple)) and len(base) == len(patch):
        return [merge(b, p) for b, p in zip(base, patch, strict=True)]
    return patch
