"""From a batch to a loss: the forward pass of the three trainings, unconditional, text-conditional and autoencoder.

A task is a module that holds the parts that learn, under their names in a checkpoint, and whose ``forward`` is the
loss: so it is also what a second machine is given a replica of. Parts that only help (a frozen text encoder or
autoencoder) stay outside, in the pipeline.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minidiff.config import check
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.training.batch import Batch
from minidiff.training.draws import Draws
from minidiff.training.objective import (
    draw_noise,
    draw_timesteps,
    drop_prompts,
    kl_to_normal,
    min_snr_weights,
    snr,
    target,
    weighted_mse,
)
from minidiff.training.settings import TrainConfig


class Task(nn.Module):
    """``pipe``'s parts named by ``config.parts``, ready to learn; all its other parts are frozen."""

    def __init__(self, pipe: StableDiffusion | Unconditional, config: TrainConfig) -> None:
        super().__init__()
        for name in config.parts:
            has = ", ".join(pipe.parts)
            check(name in pipe.parts, f"{name} cannot be trained: this {pipe.config.family} model has only {has}")
        self.pipe = pipe
        self.settings = config
        for name, part in pipe.parts.items():
            part.requires_grad_(name in config.parts)
            if name in config.parts:
                self.add_module(name, part)
        # Weights of a file are mapped from it: what is going to change gets memory of its own, in full precision.
        for p in self.parameters():
            p.data = p.data.to(torch.float32, copy=True)

    @property
    def device(self) -> torch.device:
        """Device of the trained weights."""
        return next(self.parameters()).device


class Denoising(Task):
    """The UNet learns to tell noise from picture; with a text encoder at hand, given the caption."""

    def __init__(self, pipe: StableDiffusion | Unconditional, config: TrainConfig) -> None:
        super().__init__(pipe, config)
        self.schedule = pipe.schedule.to(self.device)

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """The loss of one batch, a scalar (Ho et al. 2020, algorithm 1)."""
        c = self.settings
        t = draw_timesteps(draws, len(self.schedule), c.noisy)
        x0, context = self.clean(batch, draws), self.context(batch, draws)
        noise = draw_noise(draws, x0.shape[1:], c.offset_noise)
        # Forward diffusion goes from x0 to x_t in one go: sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise.
        x = self.schedule.add_noise(x0, noise, t)
        out = self.pipe.unet(x, t, context)  # which noise was it? (or v, or x0, where the model predicts that)
        weights = None
        if c.min_snr is not None:
            weights = min_snr_weights(self.schedule.prediction, snr(self.schedule, t), c.min_snr)
        return weighted_mse(out, target(self.schedule, x0, noise, t), weights)

    @torch.no_grad()
    def clean(self, batch: Batch, draws: Draws) -> Tensor:
        """x0: the pixels, or a sample of their latents, scaled to unit variance as the UNet knows them."""
        if not isinstance(self.pipe, StableDiffusion):
            return batch.pixels
        vae = self.pipe.vae
        latents = vae.encode(batch.pixels) if batch.latents is None else batch.latents
        return latents.sample(noise=draws.normal(latents.mean.shape[1:])) * vae.config.scaling_factor

    def context(self, batch: Batch, draws: Draws) -> Tensor | None:
        """The captions encoded, (B, L, context_dim), some of them dropped; None for a model that knows no text."""
        pipe = self.pipe
        if not isinstance(pipe, StableDiffusion):
            return None
        if batch.captions is None:
            raise ConfigError(f"the pictures have no captions, and a {pipe.config.family} model is trained on both")
        ids, empty = pipe.tokenizer(list(batch.captions)), pipe.tokenizer([""])
        ids = drop_prompts(ids.to(self.device), empty.to(self.device), draws.uniform(), self.settings.drop_prompt)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text_encoder" in self.settings.parts):
            context: Tensor = getattr(pipe.text_encoder(ids), pipe.config.text_layer)
        return context


class Autoencoding(Task):
    """The VAE learns to repeat a picture through its narrow middle, whose values are asked to stay near N(0, 1).

    Squared error and KL divergence, both summed over a picture (Kingma & Welling 2014, equation 7), then divided by its
    size. The weight of the latter is tiny, as in Rombach et al. 2022: it keeps the latents from drifting away, and
    leaves them nearly all they know. No discriminator and no perceptual loss: edges come out a little soft.
    """

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """The loss of one batch, a scalar."""
        assert isinstance(self.pipe, StableDiffusion)
        vae = self.pipe.vae
        latents = vae.encode(batch.pixels)
        repeated = vae.decode(latents.sample(noise=draws.normal(latents.mean.shape[1:])))
        apart = kl_to_normal(latents.mean.float(), latents.logvar.float()).mean() / batch.pixels[0].numel()
        return weighted_mse(repeated, batch.pixels) + self.settings.kl * apart


def make_task(pipe: StableDiffusion | Unconditional, config: TrainConfig) -> Task:
    """The task that ``config.parts`` asks for.

    Raises :class:`ConfigError` if ``pipe`` does not have them, and :class:`UnsupportedError` for a UNet that reads more
    than a prompt: SDXL's sizes, LCM's scale, a mask.
    """
    unet = pipe.unet.config
    more = isinstance(pipe, StableDiffusion) and (unet.added_dim or unet.guidance_dim or pipe.reads_mask)
    if more and config.parts != ("vae",):
        raise UnsupportedError(f"a {pipe.config.family} UNet reads more than a prompt, which training does not give it")
    return (Autoencoding if config.parts == ("vae",) else Denoising)(pipe, config)


@torch.no_grad()
def latent_scale(pipe: StableDiffusion, batch: Batch) -> float:
    """The ``scaling_factor`` that brings the latents of ``batch`` to unit variance, 1 / their standard deviation."""
    mean = pipe.vae.encode(batch.pixels.to(pipe.device)).mean
    return float(1 / mean.float().std())
