"""Which timesteps a distilled model (LCM, TCD) is asked at: some of those that it was distilled at, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.config import check
from minidiff.samplers.base import Options, check_timesteps, whole
from minidiff.schedule import check_steps


def check_distilled(sampler: Options, original_steps: int | None, strength: float) -> None:
    """Raise ConfigError unless the options of a distilled sampler make sense."""
    name = type(sampler).__name__
    check(original_steps is None or original_steps >= 1, f"{name}: original_steps={original_steps} must be positive")
    check(0 < strength <= 1, f"{name}: strength={strength} must lie above 0, up to 1")


def visited(
    sampler: Options,
    total: int,
    steps: int | None,
    timesteps: Sequence[float] | None,
    original_steps: int | None,
    strength: float,
) -> tuple[Tensor, bool]:
    """(n,) falling int64 timesteps of ``total``, for ``steps`` or of ``timesteps``, and whether the last of them is not
    taken for the last (like_diffusers: where ``strength`` cuts off given ones)."""
    if timesteps is None:
        found = distilled_timesteps(sampler, check_steps(steps, total), total, original_steps, strength)
        return torch.from_numpy(found), False
    found = given_timesteps(sampler, timesteps, total, strength)
    return torch.from_numpy(found), sampler.like_diffusers and len(found) < len(timesteps)


def distilled_timesteps(
    sampler: Options, steps: int, total: int, original_steps: int | None, strength: float
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(steps,) falling int64: some of the ``original_steps`` (None: all ``total``) timesteps of distillation, evenly
    spaced by their number, the lower ``strength`` of them."""
    name = type(sampler).__name__
    if original_steps is None:
        origin = np.arange(int(total * strength))
    else:
        known = original_steps <= total
        check(known, f"{name}: original_steps={original_steps} exceeds the {total} timesteps of training")
        origin = np.arange(1, int(original_steps * strength) + 1) * (total // original_steps) - 1
    share = "" if strength == 1 else f" with strength={strength}"
    what = "original_steps" if original_steps is not None else "timesteps of training"
    enough = steps <= len(origin)
    check(enough, f"{name}: steps={steps} is more than the {len(origin)} {what}{share} that the model was distilled at")
    chosen = np.floor(np.linspace(0, len(origin), num=steps, endpoint=False)).astype(np.int64)
    return origin[::-1][chosen].astype(np.int64)


def given_timesteps(
    sampler: Options, timesteps: Sequence[float], total: int, strength: float
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``timesteps`` as int64, the last ``strength`` of them. ConfigError unless they are whole numbers that fall
    strictly within 0..total - 1."""
    name = type(sampler).__name__
    check_timesteps(sampler, timesteps, total)
    found = whole(sampler, timesteps, lowest=0)
    kept = int(len(timesteps) * strength)
    check(kept >= 1, f"{name}: strength={strength} leaves none of {len(timesteps)} timesteps")
    return found[len(found) - kept :]
