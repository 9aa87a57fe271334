"""What the methods that work in sigma have in common: their sample is the picture plus noise, at the picture's scale.

Two things follow from that and puzzle readers. The first noise is multiplied by the largest sigma (14.6146 for Stable
Diffusion at timestep 999; 1 for DDIM and PNDM, whose x keeps unit variance). And the model, trained on unit variance,
is shown x / sqrt(sigma**2 + 1): ``scale_input``, which the familiar loop calls ``scale_model_input``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.config import Prediction, check
from minidiff.errors import ConfigError
from minidiff.samplers import sigmas as spacings
from minidiff.samplers.base import Options, Plan, check_timesteps
from minidiff.samplers.sigmas import Floats, SigmaSpacing
from minidiff.schedule import NoiseSchedule, Spacing, spaced


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SigmaPlan(Plan):
    """``sigmas`` has an entry more than there are rows: where the last step lands. Rows: ``in_scale``, what the
    model's input is divided by; ``variance`` = sigma**2 + 1 and ``c_out``, which make x0 of v."""

    sigmas: Tensor
    in_scale: Tensor
    variance: Tensor
    c_out: Tensor

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        return x0 + noise * self.sigmas[i].to(x0.dtype)

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        n = len(self)
        own = {"to sigma": self.sigmas[1 : n + 1], "in_scale": self.in_scale}
        return super().columns() | {"sigma": self.sigmas[:n]} | own


def sigma_rows(timesteps: Tensor, sigmas: Tensor, spacing: Spacing, prediction: Prediction) -> dict[str, Any]:
    """The fields of a :class:`SigmaPlan` for float32 ``timesteps`` (n,) and ``sigmas`` (n + 1 or more).

    The first x has standard deviation sigma where the spacing starts at the last timestep, as k-diffusion has it; for
    leading, which starts lower, sqrt(sigma**2 + 1): the picture's own variance is no longer negligible there.
    """
    top = sigmas.max()
    sigma = sigmas[: len(timesteps)]
    for row in (~(sigma.isfinite() & (sigma > 0))).nonzero().flatten().tolist():
        raise ConfigError(f"sigma is {sigma[row]:g} at row {row}: the betas leave no picture there, or no noise")
    variance = sigma**2 + 1
    return {
        "timesteps": timesteps,
        "alpha_bars": 1 / variance,
        "init_noise_sigma": top if spacing in ("linspace", "trailing") else (top**2 + 1) ** 0.5,
        "prediction": prediction,
        "sigmas": sigmas,
        "in_scale": variance**0.5,
        "variance": variance,
        "c_out": -sigma / variance**0.5,
    }


def sigma_x0(plan: SigmaPlan, i: int, x: Tensor, out: Tensor, sigma: Tensor) -> Tensor:
    """The picture in float32 ``x`` at row ``i``, whose noise has standard deviation ``sigma`` (0-dim)."""
    if plan.prediction == "epsilon":
        return x - widen(sigma * out)
    if plan.prediction == "v_prediction":
        return widen(out * plan.c_out[i]) + x / plan.variance[i]
    return out


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32: in half precision the sum of picture and noise would lose the picture at large sigma."""
    return x.to(torch.float32)


def widen(y: Tensor) -> Tensor:
    """``y`` in float32 at least: what a sum with a float32 sample makes of it anyway, written down."""
    return y.to(torch.promote_types(y.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class SpacedSigmas(Options):
    """Options of the methods that take their sigmas from the schedule and know no other ways to bend them.

    ``sigma_spacing``: "timesteps" takes the sigmas at ``spacing``'s timesteps; "karras", "exponential" and "beta"
    space them between the same ends in their own ways. ``last_alpha_bar`` replaces the 0 at the end of a zero-SNR
    schedule, where sigma would be infinite.
    """

    in_sigma: ClassVar[bool] = True

    spacing: Spacing = "linspace"
    steps_offset: int = 0
    sigma_spacing: SigmaSpacing = "timesteps"
    last_alpha_bar: float = 2**-24

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.last_alpha_bar < 1, f"last_alpha_bar={self.last_alpha_bar} must lie between 0 and 1")

    def levels(
        self,
        schedule: NoiseSchedule,
        steps: int | None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> tuple[Floats, Floats, Floats]:
        """Timesteps (n,), float32 or (away from "timesteps") float64; sigmas (n + 1,) float32, the last of them 0
        unless they are given; and the schedule's table of sigmas."""
        table = spacings.sigma_table(schedule, self.last_alpha_bar)
        if sigmas is not None:
            levels = spacings.given(sigmas)
            return spacings.to_timesteps(levels[:-1], table), levels, table
        like = self.like_diffusers
        if timesteps is not None:
            name, plain = type(self).__name__, self.sigma_spacing == "timesteps"
            check(plain, f"{name}: timesteps can't be given with sigma_spacing={self.sigma_spacing!r}, give steps")
            t: Floats = np.array(timesteps, dtype=np.float32)
        else:
            t = spaced(self.spacing, len(table), steps or 0, self.steps_offset, whole=False, like_diffusers=like)
        check_timesteps(self, t, len(table) + like)
        levels = spacings.at_timesteps(t, table)
        if self.sigma_spacing != "timesteps":
            levels = spacings.CURVES[self.sigma_spacing](float(levels[-1]), float(levels[0]), len(t))
            t = spacings.to_timesteps(levels, table)
        return t, np.concatenate([levels, [0.0]]).astype(np.float32), table


def sample_x0(prediction: Prediction, x: Tensor, out: Tensor, sigma: Tensor, variance: Tensor, c_out: Tensor) -> Tensor:
    """The picture in ``x`` with noise ``sigma`` (0-dim, as the rows of the plan that go with it), in the dtype of
    ``x``: for the methods that never go to float32."""
    if prediction == "epsilon":
        return x - sigma * out
    return out * c_out + x / variance if prediction == "v_prediction" else out
