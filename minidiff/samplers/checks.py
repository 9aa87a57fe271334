"""Checks of timesteps and of coefficients: what a method cannot run is refused by its plan, not found out by NaN."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.errors import ConfigError
from minidiff.samplers.method import Levels, Method


def rows_of(bad: Tensor) -> list[int]:
    """Return the first four rows at which ``bad`` (n, ...) holds anywhere, for messages."""
    rows: list[int] = (bad if bad.ndim == 1 else bad.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    return rows[:4]


def root(x: Tensor, method: Method[Any, Any], what: str) -> Tensor:
    """Return sqrt(x) of a (n,) row that rounding may have pushed below 0, for which the reference gives NaN.

    For a sampler chosen by name, entries down to -1e-6 count as 0. Raises ConfigError for other negative entries."""
    bad = rows_of(~(x >= (0.0 if method.like_diffusers else -1e-6)))
    check(not bad, f"{method.name}: {what} is the root of a negative number or NaN at rows {bad}")
    return x.clamp(min=0) ** 0.5


def whole(method: Method[Any, Any], timesteps: Sequence[float], lowest: int | None = None) -> NDArray[Any]:
    """Return ``timesteps`` as int64. Raises ConfigError for fractions, and for any below ``lowest``."""
    fits = all(float(t).is_integer() and (lowest is None or t >= lowest) for t in timesteps)
    range_ = "" if lowest is None else f", {lowest} or above"
    check(fits, f"{method.name}: timesteps must be whole numbers{range_}, got {list(timesteps)[:6]}")
    return np.array([int(t) for t in timesteps], dtype=np.int64)


def check_timesteps(method: Method[Any, Any], timesteps: Any, train_steps: int) -> None:
    """Raise ConfigError unless ``timesteps`` (a list or array) fall strictly and lie in 0..train_steps - 1.

    The reference also has -1, in the last row for some step counts of trailing spacing."""
    t = [float(v) for v in timesteps]
    check(len(t) > 0, f"{method.name}: timesteps is empty")
    falls = all(a > b for a, b in pairwise(t))
    check(falls, f"{method.name}: timesteps must fall strictly, got {t[:6]}")
    hint = "; use fewer steps or steps_offset=0" if t[0] == train_steps else ""
    inside = method.grid.lowest <= t[-1] and t[0] <= train_steps - 1
    check(
        inside, f"{method.name}: timesteps run from {t[0]:g} to {t[-1]:g}, the model knows 0 to {train_steps - 1}{hint}"
    )


def check_finite(method: Method[Any, Any], column: Tensor) -> None:
    """Raise ConfigError if a ``column`` (n, ...) of coefficients is not finite: 0 / 0, from two equal sigmas. The
    reference gives NaN there."""
    bad = rows_of(~column.isfinite())
    where = f"{method.name}: no finite coefficients at rows {bad} of {len(column)}, where two sigmas are equal"
    check(not bad, f"{where}; use fewer steps or steps_offset=0")


def check_some_noise(method: Method[Any, Any], at: Levels) -> None:
    """Raise ConfigError if a method that divides by 1 - alpha_bar visits a timestep without noise."""
    for row in rows_of(at.here == 1)[:1]:
        where = f"row {row}, timestep {at.timesteps[row].item():g}"
        raise ConfigError(f"{method.name}: alpha_bar is 1 at {where}: no noise to take away; use betas above 0")


PURE_NOISE = (
    "for alpha_bar is 0 there, and prediction='epsilon' says nothing of the picture (zero_snr); use a v_prediction "
    "model, or leading spacing"
)


def check_no_pure_noise(method: Method[Any, Any], at: Levels, prediction: Prediction, bounded: bool = False) -> None:
    """Raise ConfigError if x0 of an epsilon model is needed at pure noise (alpha_bar 0: zero terminal SNR), which
    divides by 0. ``bounded``: x0 is clamped, and the first row is allowed, where x is fresh noise and x0 infinite. In
    later rows (trailing spacing may end with a row at timestep -1) x is a picture that may equal the model's output,
    and 0 / 0 cannot be clamped."""
    rows = [row for row in rows_of(at.here == 0) if row > 0 or not bounded]
    if prediction == "epsilon" and rows:
        t = at.timesteps[rows[0]].item()
        other = "" if rows[0] == 0 else ", or another number of steps"
        raise ConfigError(f"{method.name}: x0 is not finite at row {rows[0]}, timestep {t:g}, {PURE_NOISE}{other}")


def usable(
    method: Method[Any, Any], orders: tuple[int, ...], order: int, columns: dict[str, Tensor], ahead: int = 1
) -> dict[str, Tensor]:
    """Return ``columns`` of coefficients (n,) for steps of ``order``, set to 0 where no step of that order is made:
    because of ``orders``, or because row i has at most i + ``ahead`` outputs.

    Raises ConfigError if a possible step has coefficients that are not finite: two sigmas are equal, or a higher-order
    step leads to sigma 0. The reference gives NaN there."""
    wanted = torch.tensor([min(o, i + ahead) >= order for i, o in enumerate(orders)], dtype=torch.bool, device="cpu")
    for column in columns.values():
        bad = rows_of(wanted & ~column.isfinite())
        where = f"{method.name}: no finite coefficients of order {order} at rows {bad} of {len(orders)}, where two "
        instead = "fewer steps, a lower solver_order, lower_order_final or another final_sigma"
        check(not bad, f"{where}sigmas are equal or the last is 0; use {instead}")
    return {name: torch.where(wanted, column, 0.0) for name, column in columns.items()}


def check_output(out_channels: int, channels: int, sampler: object) -> None:
    """Raise :class:`ConfigError` if a model with ``out_channels`` for a sample of ``channels`` predicts a variance as
    well, and ``sampler`` does not read it. A sampler of another library is not asked."""
    check(
        out_channels == channels or getattr(sampler, "reads_variance", True),
        f"this model's output has {out_channels} channels for a sample of {channels}, so it holds a variance as well; "
        "use a sampler that reads it: ddpm with variance='learned_range', or dpmpp_2m with learned_variance=True",
    )
