"""Training objective of a diffusion model (Ho et al. 2020, algorithm 1).

Take a picture x0, a timestep t and noise; mix them to x_t; ask the network which noise it was. The loss is the squared
error of its answer. The rest of this file are refinements that have proved useful: other targets than the noise (x0,
v), weights that keep any timestep from dominating (Hang et al. 2023), noise whose mean varies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.config import Prediction
from minidiff.schedule import NoiseSchedule
from minidiff.training.draws import Draws


def draw_timesteps(draws: Draws, count: int, noisy: float = 1.0) -> Tensor:
    """Draw timesteps, int64 (B,) in 0 .. ``count`` - 1, with density proportional to t ** (``noisy`` - 1).

    1 is uniform. Composition is decided, and learned, at high noise levels; fine edges at low ones.
    """
    if noisy == 1:
        return draws.integers(count)
    return (draws.uniform() ** (1 / noisy) * count).long().clamp(max=count - 1)


def draw_noise(draws: Draws, shape: tuple[int, ...], offset: float = 0.0) -> Tensor:
    """Draw noise (B, \\*shape) for samples of ``shape`` (C, H, W).

    ``offset`` adds a normal constant with that standard deviation to each channel. Plain noise leaves the mean of a
    picture visible at every timestep, so a model never learns to change it to very dark or very bright (Guttenberg
    2023, "Diffusion with offset noise").
    """
    noise = draws.normal(shape)
    if offset:
        noise = noise + offset * draws.normal((shape[0], 1, 1))
    return noise


def target(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the target of the prediction: epsilon, v or x0, of the shape of ``x0`` (B, ...)."""
    if schedule.prediction == "epsilon":
        return noise
    return x0 if schedule.prediction == "sample" else schedule.velocity(x0, noise, t)


def snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar) at timesteps ``t`` (B,); 0 for pure noise."""
    alpha_bar = schedule.alphas_cumprod[t]
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(prediction: Prediction, ratio: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR weight of each example by its signal-to-noise ratio ``ratio`` (B,).

    Hang et al. 2023, section 3.4: a squared error of x0 is weighted by min(snr, gamma). As an error of epsilon it is
    snr times as large, as one of v snr + 1 times, which gives min(snr, gamma) / snr and min(snr, gamma) / (snr + 1).
    All three are finite at snr 0 (1 for epsilon, 0 for x0 and v) and at infinity.
    """
    if prediction == "epsilon":
        return (gamma / ratio).clamp(max=1)  # gamma / 0 is infinite, which is clamped to 1
    if prediction == "sample":
        return ratio.clamp(max=gamma)
    return torch.minimum(gamma / (ratio + 1), ratio / (ratio + 1)).nan_to_num(0)  # inf / inf, where gamma / inf is 0


def weighted_mse(out: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean squared error of (B, ...), a float32 scalar; ``weights`` (B,) multiply each example's own."""
    if weights is None:
        return F.mse_loss(out.float(), wanted.float())
    each = F.mse_loss(out.float(), wanted.float(), reduction="none").flatten(1).mean(dim=1)
    return (weights * each).mean()


def drop_prompts(ids: Tensor, empty: Tensor, coins: Tensor, share: float) -> Tensor:
    """Replace the prompts ``ids`` (B, L) whose ``coins`` (B,), in [0, 1), are below ``share`` by ``empty`` (1, L).

    Classifier-free guidance needs predictions without a prompt, so the model must be trained on them as well (Ho &
    Salimans 2022, algorithm 1).
    """
    return torch.where((coins < share)[:, None], empty, ids)


def kl_to_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) of (B, ...) in nats, (B,) (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)
