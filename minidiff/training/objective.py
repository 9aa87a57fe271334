"""Training objective of a diffusion model (Ho et al. 2020, algorithm 1).

Take a picture x0, a timestep t and noise; mix them to x_t; ask the network which noise it was. The squared error of its
answer is the loss, and there is nothing else to it. The rest of this file is what has proved to help: other questions
than the noise (x0, v), weights that let no timestep drown the others (Hang et al. 2023), noise whose mean varies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.config import Prediction
from minidiff.schedule import NoiseSchedule
from minidiff.training.draws import Draws


def draw_timesteps(draws: Draws, count: int, noisy: float = 1.0) -> Tensor:
    """int64 (B,) of 0 .. ``count`` - 1: timestep t is as likely as t ** (``noisy`` - 1); all are alike at 1.

    What the prompt decides is decided under much noise, and learned there; fine edges are learned under little.
    """
    if noisy == 1:
        return draws.integers(count)
    return (draws.uniform() ** (1 / noisy) * count).long().clamp(max=count - 1)


def draw_noise(draws: Draws, shape: tuple[int, ...], offset: float = 0.0) -> Tensor:
    """Noise (B, \\*shape) for samples of ``shape`` (C, H, W).

    ``offset`` adds a constant to each channel, normal with that standard deviation: with plain noise the mean of a
    picture is all but visible at every timestep, and a model never learns to make a very dark or very bright one
    (Guttenberg 2023, "Diffusion with offset noise").
    """
    noise = draws.normal(shape)
    if offset:
        noise = noise + offset * draws.normal((shape[0], 1, 1))
    return noise


def target(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The right answer to the question that the model is asked: epsilon, v or x0, of the shape of ``x0`` (B, ...)."""
    if schedule.prediction == "epsilon":
        return noise
    return x0 if schedule.prediction == "sample" else schedule.velocity(x0, noise, t)


def snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """(B,): the signal-to-noise ratio alpha_bar / (1 - alpha_bar) at timesteps ``t`` (B,); 0 where all is noise."""
    alpha_bar = schedule.alphas_cumprod[t]
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(prediction: Prediction, ratio: Tensor, gamma: float) -> Tensor:
    """The weight of each example whose signal-to-noise ratio is ``ratio`` (B,) (Hang et al. 2023, section 3.4).

    An error of x0 counts min(snr, gamma) times. The same error, told as an error of epsilon, is snr times larger, and
    as one of v snr + 1 times: hence min(snr, gamma) / snr and min(snr, gamma) / (snr + 1). Written so that all three
    are finite at snr 0, where they are 1, 0 and 0, and at infinity.
    """
    if prediction == "epsilon":
        return (gamma / ratio).clamp(max=1)  # gamma / 0 is infinite, and the smaller of the two is 1
    if prediction == "sample":
        return ratio.clamp(max=gamma)
    return torch.minimum(gamma / (ratio + 1), ratio / (ratio + 1)).nan_to_num(0)  # inf / inf, where gamma / inf is 0


def weighted_mse(out: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean squared error of (B, ...) as one number, in float32; ``weights`` (B,) multiply each example's own."""
    if weights is None:
        return F.mse_loss(out.float(), wanted.float())
    each = F.mse_loss(out.float(), wanted.float(), reduction="none").flatten(1).mean(dim=1)
    return (weights * each).mean()


def drop_prompts(ids: Tensor, empty: Tensor, coins: Tensor, share: float) -> Tensor:
    """Prompts ``ids`` (B, L) with those whose coin (B,), in [0, 1), lies below ``share`` replaced by ``empty`` (1, L).

    Guidance needs to know what the model paints without a prompt, and so it must have been trained on that, too
    (Ho & Salimans 2022, algorithm 1).
    """
    return torch.where((coins < share)[:, None], empty, ids)


def kl_to_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """(B,): how far, in nats, N(mean, exp(logvar)) of shape (B, ...) is from N(0, 1) (Kingma & Welling 2014, B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)
