"""The noise schedule of training, and the conversions between noise, picture and model output.

A diffusion model is trained on pictures to which noise was added (Ho et al. 2020, equation 4):

    x_t = signal * x0 + noise * epsilon        signal = sqrt(alpha_bar_t),  noise = sqrt(1 - alpha_bar_t)

``alpha_bar`` (``alphas_cumprod``) falls from nearly 1 at timestep 0 to nearly 0 at the last one. A noise level has
three names: the *timestep* t is the row of the table and an input of the model; *alpha_bar* is the picture's remaining
share of the variance; *sigma* = noise / signal is the standard deviation of the noise when the picture keeps its own
scale, as in Karras et al. 2022. A model predicts *epsilon* (the noise), *x0* (the picture, called "sample") or *v*
(signal * epsilon - noise * x0, Salimans & Ho 2022). Given x_t, each of them follows from any other.

Nothing here depends on the number of sampling steps, except :func:`spaced`, which picks the timesteps to visit.
All tables are computed in torch float32, in this order of operations: float64 or numpy changes nearly every entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.config import Prediction, ScheduleConfig, check, one_of

Spacing = Literal["leading", "trailing", "linspace"]

MAX_BETA = 0.999  # the cosine and laplace curves would reach 1, which leaves nothing of the picture


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """Noise schedule of a model.

    ``alphas_cumprod``: float32, shape (T,), entries in 0..1. ``prediction``: the quantity that the model predicts.
    Betas and alphas are not stored: samplers recover them, bit for bit, as quotients of neighbouring table entries.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    def __post_init__(self) -> None:
        a = self.alphas_cumprod
        check(a.ndim == 1 and len(a) > 0, f"alphas_cumprod has shape {tuple(a.shape)}, expected (T,)")
        check(a.dtype == torch.float32, f"alphas_cumprod is {a.dtype}, expected torch.float32")
        one_of(("epsilon", "v_prediction", "sample"), prediction=self.prediction)

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> NoiseSchedule:
        """Build the table that ``config`` describes. Raises ConfigError for betas outside 0..1."""
        table = betas(config)
        inside = bool(((table >= 0) & (table <= 1)).all())
        check(inside, f"betas run from {table.min():g} to {table.max():g}, but must lie in 0..1")
        if config.zero_snr:
            table = zero_terminal_snr(table)
        return cls(torch.cumprod(1.0 - table, dim=0), config.prediction)

    def __repr__(self) -> str:
        a, s = self.alphas_cumprod, self.sigmas
        ends = f"alpha_bar {a[0]:.6g} to {a[-1]:.6g}, sigma {s[0]:.6g} to {s[-1]:.6g}"
        return f"NoiseSchedule: {len(self)} timesteps, {ends}, prediction {self.prediction}, on {a.device}"

    def __len__(self) -> int:
        """Number T of training timesteps."""
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """noise / signal at every timestep, (T,); infinite where alpha_bar is 0. Stable Diffusion ends at 14.6146."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Return the schedule with its table on ``device``, for training loops that look up a batch of timesteps."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def rates(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return (signal, noise) at timesteps ``t`` (an int, scalar or (B,)), shaped (B, 1, ...) to multiply ``like``.

        The table is rounded to the dtype of ``like`` before the roots are taken, as the reference does.
        """
        table = self.alphas_cumprod
        index = torch.as_tensor(t, dtype=torch.int64, device=table.device).reshape(-1)
        alpha_bar = table.to(like.dtype).index_select(0, index).to(like.device)
        alpha_bar = alpha_bar.reshape(-1, *(1 for _ in like.shape[1:]))
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return x_t for clean ``x0`` and standard normal ``noise``, both (B, ...), at ``t`` (Ho 2020, equation 4)."""
        signal, noise_rate = self.rates(t, x0)
        return signal * x0 + noise_rate * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return v at timesteps ``t``: the training target of v-prediction (Salimans & Ho 2022, section 4)."""
        signal, noise_rate = self.rates(t, x0)
        return signal * noise - noise_rate * x0


# --- beta schedules -----------------------------------------------------------------------------------------------


def betas(config: ScheduleConfig) -> Tensor:
    """Return the variance of the noise that each timestep adds, (T,) float32, before any zero-SNR rescaling."""
    if config.betas is not None:
        return torch.tensor(config.betas, dtype=torch.float32, device="cpu")
    start, end, n = config.beta_start, config.beta_end, config.steps

    def even(low: float, high: float) -> Tensor:
        return torch.linspace(low, high, n, dtype=torch.float32, device="cpu")

    if config.beta_schedule == "linear":  # Ho et al. 2020
        return even(start, end)
    if config.beta_schedule == "scaled_linear":  # latent diffusion: linear in the square root
        return even(start**0.5, end**0.5) ** 2
    if config.beta_schedule == "sigmoid":  # GeoDiff
        return torch.sigmoid(even(-6, 6)) * (end - start) + start
    return _betas_from_curve(_cosine if config.beta_schedule == "squaredcos_cap_v2" else _laplace, n)


def _cosine(u: float) -> float:
    """Return alpha_bar at the fraction ``u`` of the way (Nichol & Dhariwal 2021, equation 17)."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """Return the curve of Hang et al. 2024 with mean 0 and scale 0.5, as in the reference (the root of alpha_bar)."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _betas_from_curve(curve: Callable[[float], float], n: int) -> Tensor:
    steps = [1 - curve((i + 1) / n) / curve(i / n) for i in range(n)]
    return torch.tensor([min(beta, MAX_BETA) for beta in steps], dtype=torch.float32, device="cpu")


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Rescale betas so that the last timestep is pure noise (Lin et al. 2023, algorithm 1).

    sqrt(alpha_bar) is shifted to end at 0 and scaled to keep its first entry. An epsilon model can learn nothing at
    pure noise: use v-prediction.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    check(bool(first != last), f"zero_snr needs at least two different timesteps, got {len(betas)}")
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


# --- the timesteps that a sampler visits -----------------------------------------------------------------------------


def check_steps(steps: Any, train_steps: int) -> int:
    """Return ``steps`` as an int. Raises ConfigError unless it is a whole number in 1..train_steps."""
    whole = isinstance(steps, (int, np.integer)) and not isinstance(steps, bool)
    check(whole, f"steps={steps!r} must be a whole number")
    check(1 <= steps <= train_steps, f"steps={steps} must lie in 1..{train_steps}, the timesteps of training")
    return int(steps)


def spaced(
    spacing: Spacing,
    train_steps: int,
    steps: int,
    offset: int = 0,
    *,
    dtype: type[np.generic] = np.int64,
) -> NDArray[Any]:
    """Return the timesteps to visit, falling: (steps,) int64, or of another ``dtype``, unrounded (Lin 2023, table 2).

    For 50 steps of 1000 timesteps:

    * leading: 980, 960, ..., 0. The lower end of every interval, so the highest timestep is never visited. Stable
      Diffusion adds ``offset`` 1, and therefore starts at 981. Only this spacing uses the offset.
    * trailing: 999, 979, ..., 19. The upper end of every interval; preferable for few steps and zero terminal SNR.
    * linspace: 999, 979 (978.6), ..., 0. Both ends included.

    Raises ConfigError for ``steps`` that are not a whole number in 1..train_steps, or for an unknown spacing.
    """
    n = check_steps(steps, train_steps)
    if spacing == "leading":
        t = np.arange(n)[::-1] * (train_steps // n) + float(offset)
    elif spacing == "trailing":
        t = np.round(np.arange(train_steps, 0, -(train_steps / n)))[:n] - 1
    else:
        one_of(("leading", "trailing", "linspace"), spacing=spacing)
        t = np.linspace(0, train_steps - 1, n)[::-1]
        if n == 1:
            t = np.array([train_steps - 1.0])
        t = np.round(t) if dtype is np.int64 else t
    return t.astype(dtype)


# --- conversions of predictions: x = signal * x0 + noise * epsilon, v = signal * epsilon - noise * x0 ----------------


def x0_from_epsilon(x: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Return (x - noise * epsilon) / signal (Ho 2020, eq. 15). ``signal`` and ``noise`` broadcast against ``x``."""
    return (x - noise * epsilon) / signal


def x0_from_v(x: Tensor, v: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Return signal * x - noise * v, which holds since signal**2 + noise**2 = 1."""
    return signal * x - noise * v


def epsilon_from_x0(x: Tensor, x0: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Return (x - signal * x0) / noise."""
    return (x - signal * x0) / noise


def epsilon_from_v(x: Tensor, v: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Return signal * v + noise * x."""
    return signal * v + noise * x


def v_from_x0(x0: Tensor, epsilon: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Return signal * epsilon - noise * x0, the definition of v."""
    return signal * epsilon - noise * x0


def to_x0(prediction: Prediction, x: Tensor, out: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Convert model output ``out`` at sample ``x`` to x0."""
    if prediction == "epsilon":
        return x0_from_epsilon(x, out, signal, noise)
    return out if prediction == "sample" else x0_from_v(x, out, signal, noise)


def to_epsilon(prediction: Prediction, x: Tensor, out: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Convert model output ``out`` at sample ``x`` to epsilon."""
    if prediction == "epsilon":
        return out
    return epsilon_from_x0(x, out, signal, noise) if prediction == "sample" else epsilon_from_v(x, out, signal, noise)
