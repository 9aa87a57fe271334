"""What the methods that work in sigma have in common: their sample is the picture plus noise, at the picture's scale.

Two things follow from that and puzzle readers. The first noise is multiplied by the largest sigma (14.6146 for Stable
Diffusion at timestep 999; 1 for DDIM and PNDM, whose x keeps unit variance). And the model, trained on unit variance,
is shown x / sqrt(sigma**2 + 1): ``scale_input``, which the familiar loop calls ``scale_model_input``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidiff.config import Prediction
from minidiff.samplers.base import Plan
from minidiff.schedule import Spacing


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
