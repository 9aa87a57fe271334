"""State of a training run on disk: everything that the next step depends on, in one atomically written file.

Weights, their average and the optimiser's moments are tensors of a safetensors file; its header holds the number of
steps and the settings as JSON. Random numbers and the order of the data follow from the number of the step, so they
need not be stored. A run that is resumed from the file ends with the same weights as one that never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.config import ModelConfig, from_json, quote
from minidiff.errors import CheckpointError, ConfigError
from minidiff.storage.files import Lazy, TensorFile, lazy, write_tensors
from minidiff.training import changes
from minidiff.training.loop import Trainer
from minidiff.training.settings import TrainConfig

KEY = "minidiff.training"
FREE = {"steps", "accumulate", "save_every", "sample_every", "samples"}  # settings that a resumed run may change


class Keeper:
    """State of a run in its folder: one file that the main process writes. (In slices: sharded.py.)"""

    name = "state.safetensors"

    def exists(self, folder: Path) -> bool:
        """Return True if ``folder`` holds a run."""
        return (folder / self.name).exists()

    def facts(self, folder: Path) -> dict[str, Any]:
        """Return the facts of the run in ``folder``, see :func:`facts`. Raises :class:`CheckpointError` if damaged."""
        file = TensorFile(folder / self.name)
        try:
            return read_facts(file)
        finally:
            file.close()

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Write the run; called by every process, and returns when it is written."""
        if trainer.ranks.main:
            save(trainer, folder / self.name)
        trainer.ranks.wait()

    def resume(self, trainer: Trainer, folder: Path) -> None:
        """Restore the trainer of this process from the run in ``folder``."""
        resume(trainer, folder / self.name)


def save(trainer: Trainer, path: str | os.PathLike[str]) -> None:
    """Write the run to ``path``, atomically.

    Raises OSError, with the old file intact, if the disk is full, and :class:`CheckpointError` for a missing folder.
    """
    tensors = {name: lazy(t) for name, t in contents(trainer).items()}
    try:
        write_tensors(path, tensors, {"format": "pt", KEY: json.dumps(facts(trainer))})
    except OSError as e:
        raise unsaved(e, trainer.done, path) from e


def unsaved(e: OSError, step: int, path: str | os.PathLike[str]) -> OSError:
    """Describe ``e``, the step that could not be saved, and the checkpoint that remains."""
    old = "; the checkpoint before it remains" if os.path.exists(path) else ""
    return OSError(e.errno, f"step {step} could not be saved ({e.strerror}){old}", str(path))


def contents(trainer: Trainer) -> dict[str, Tensor]:
    """Return the tensors of the run by name: "weights.unet.conv_in.weight", "ema. ...", "optimizer. ... .exp_avg"."""
    tensors = {f"weights.{name}": w for name, w in trainer.weights.items()}
    if trainer.ema is not None:
        tensors |= {f"ema.{name}": w for name, w in trainer.ema.average.items()}
    for name, w in trainer.weights.items():  # a weight that never had a gradient has no moments
        tensors |= {f"optimizer.{name}.{key}": m for key, m in sorted(trainer.optimizer.state.get(w, {}).items())}
    return tensors


def facts(trainer: Trainer) -> dict[str, Any]:
    """Return everything that is not a tensor: progress, settings, the model's config and origin, the loss scale."""
    return {
        "done": trainer.done,
        "begun": trainer.base_model,
        "settings": dataclasses.asdict(trainer.config),
        "model": dataclasses.asdict(trainer.pipe.config),
        "scaler": trainer.scaler.state_dict(),
        "pictures": changes.marks_of(trainer.data),
    }


def resume(trainer: Trainer, path: str | os.PathLike[str]) -> None:
    """Restore ``trainer`` from the run in ``path``.

    Raises :class:`CheckpointError` for a file that is no training state, is damaged, or belongs to another model or
    other settings (only the length of the run, ``accumulate``, and what is written when may change).
    """
    file = TensorFile(path)
    try:
        found = read_facts(file)
        compare(trainer, found, path)
        restore(trainer, file.lazy, path)
        trainer.scaler.load_state_dict(found["scaler"])
        trainer.done = found["done"]
    finally:
        file.close()


def read_facts(file: TensorFile) -> dict[str, Any]:
    """Read and check the result of :func:`facts`."""
    if KEY not in file.metadata:
        raise CheckpointError(f"{file.path}: holds no training run; `minidiff train --model` starts one from a model")
    return parse_facts(file.metadata[KEY], file.path)


def parse_facts(text: str, path: Path) -> dict[str, Any]:
    """Parse the JSON of :func:`facts`. Raises :class:`CheckpointError`, naming ``path``, for an invalid value."""
    try:
        found: dict[str, Any] = json.loads(text)
        from_json(TrainConfig, found["settings"])
        from_json(ModelConfig, found["model"])
        base_model = found.get("begun")
        known = isinstance(found["done"], int) and isinstance(found["scaler"], dict)
        known = known and isinstance(found.get("pictures", {}), dict)  # missing from states of older versions
        known = known and (base_model is None or all(isinstance(base_model[key], str) for key in ("path", "hash")))
    except (ValueError, KeyError, TypeError, ConfigError) as e:
        raise CheckpointError(f"{path}: its record of the run cannot be used ({e})") from None
    if not known:
        raise CheckpointError(f"{path}: its record of the run is damaged")
    return found


def compare(trainer: Trainer, found: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise :class:`CheckpointError` for the first field in which the run on disk differs from this one; a warning
    tells of other pictures."""
    for what, now in (("model", trainer.pipe.config), ("settings", trainer.config)):
        before, here = from_json(type(now), found[what]), json.loads(json.dumps(dataclasses.asdict(now)))
        before = json.loads(json.dumps(dataclasses.asdict(before)))  # with the defaults of fields that came later
        for name, value in here.items():
            then = before[name]
            if then != value and not (what == "settings" and name in FREE):
                was, wanted = _first_difference(name, then, value)
                raise CheckpointError(
                    f"{path}: was trained with {was}, now it is {wanted}; use that, or another folder"
                )
    other = changes.said(found["pictures"], changes.marks_of(trainer.data)) if "pictures" in found else None
    if other is not None:
        warnings.warn(f"{path}: continues with other pictures or captions than before: {other}", stacklevel=2)


def _first_difference(name: str, then: Any, now: Any) -> tuple[str, str]:
    """Return the first difference of two JSON values, as "name=then" and "now": a whole config is too long to quote."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in now:
            if then.get(key) != now[key]:
                return _first_difference(f"{name}.{key}", then.get(key), now[key])
    return f"{name}={quote(then)}", quote(now)


@torch.no_grad()
def restore(trainer: Trainer, tensors: dict[str, Lazy], path: str | os.PathLike[str]) -> None:
    """Restore every tensor. Raises :class:`CheckpointError` for a missing one, an extra one or a wrong shape."""
    moments: dict[str, dict[str, Tensor]] = {name: {} for name in trainer.weights}
    places = {f"weights.{name}": w for name, w in trainer.weights.items()}
    if trainer.ema is not None:
        places |= {f"ema.{name}": w for name, w in trainer.ema.average.items()}
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise CheckpointError(f"{path}: tensor {missing[0]!r} is missing; the file is damaged")
    for name, entry in tensors.items():
        kind, _, rest = name.partition(".")
        owner, _, key = rest.rpartition(".")
        if name in places:
            if tuple(places[name].shape) != entry.shape:
                shapes = f"{entry.shape}, the model's has {tuple(places[name].shape)}"
                raise CheckpointError(f"{path}: tensor {quote(name)} has shape {shapes}")
        elif kind != "optimizer" or owner not in moments:
            raise CheckpointError(f"{path}: tensor {quote(name)} does not belong to this model")
        else:
            moments[owner][key] = entry.load()
    for name, place in places.items():
        place.copy_(tensors[name].load())
    state = trainer.optimizer.state_dict()
    names = list(trainer.weights)
    state["state"] = {
        i: {key: laid_out(m, trainer.weights[name]) for key, m in moments[name].items()}
        for i, name in enumerate(names)
        if moments[name]
    }
    trainer.optimizer.load_state_dict(state)


def laid_out(moment: Tensor, weight: Tensor) -> Tensor:
    """Copy a moment of ``weight`` in the same memory layout: a fused optimiser walks through both in parallel.

    A copy, because the tensors are mapped from a file that may be replaced during this run.
    """
    return torch.empty_like(weight).copy_(moment) if moment.shape == weight.shape else moment.clone()
