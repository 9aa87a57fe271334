"""From a batch to a loss: the forward passes of unconditional, text-conditional and autoencoder training.

A task is a module that holds the trained parts, under their names in a checkpoint, and whose ``forward`` is the loss;
it is replicated when several machines train. Frozen parts (a text encoder, an autoencoder) stay in the pipeline.
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
    """Base class of the tasks: trains the parts of ``pipe`` named by ``config.parts`` and freezes all others."""

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
        # Loaded weights are mapped from their file: the trained ones get memory of their own, in full precision.
        for p in self.parameters():
            p.data = p.data.to(torch.float32, copy=True)

    @property
    def device(self) -> torch.device:
        """Device of the trained weights."""
        return next(self.parameters()).device


class Denoising(Task):
    """Training of the UNet to predict the noise in a picture or its latents, given the caption if it reads text."""

    def __init__(self, pipe: StableDiffusion | Unconditional, config: TrainConfig) -> None:
        super().__init__(pipe, config)
        self.schedule = pipe.schedule.to(self.device)

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of one batch, a scalar (Ho et al. 2020, algorithm 1)."""
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
        """Return x0: the pixels, or a sample of their latents, scaled to unit variance."""
        if not isinstance(self.pipe, StableDiffusion):
            return batch.pixels
        vae = self.pipe.vae
        latents = vae.encode(batch.pixels) if batch.latents is None else batch.latents
        return latents.sample(noise=draws.normal(latents.mean.shape[1:])) * vae.config.scaling_factor

    def context(self, batch: Batch, draws: Draws) -> Tensor | None:
        """Encode the captions, some of them dropped, (B, L, context_dim); None for an unconditional model."""
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
    """Training of the VAE to reconstruct a picture from latents that stay near N(0, 1).

    The loss is squared error and KL divergence, both summed over a picture (Kingma & Welling 2014, equation 7), divided
    by its size. The weight of the KL divergence is tiny, as in Rombach et al. 2022: it keeps the latents from drifting
    away at almost no loss of information. There is no discriminator and no perceptual loss, so edges are a little soft.
    """

    def forward(self, batch: Batch, draws: Draws) -> Tensor:
        """Return the loss of one batch, a scalar."""
        assert isinstance(self.pipe, StableDiffusion)
        vae = self.pipe.vae
        latents = vae.encode(batch.pixels)
        repeated = vae.decode(latents.sample(noise=draws.normal(latents.mean.shape[1:])))
        apart = kl_to_normal(latents.mean.float(), latents.logvar.float()).mean() / batch.pixels[0].numel()
        return weighted_mse(repeated, batch.pixels) + self.settings.kl * apart


def make_task(pipe: StableDiffusion | Unconditional, config: TrainConfig) -> Task:
    """Create the task for ``config.parts``.

    Raises :class:`ConfigError` if ``pipe`` does not have these parts, and :class:`UnsupportedError` for a UNet that
    reads more than a prompt (SDXL's sizes, LCM's scale, a mask), and for a model whose pictures are not in RGB.
    """
    unet = pipe.unet.config
    channels = pipe.vae.config.image_channels if isinstance(pipe, StableDiffusion) else unet.in_channels
    if channels != 3:
        raise UnsupportedError(
            f"pictures of this {pipe.config.family} model have {channels} channels, and training reads RGB, which are 3"
        )
    more = isinstance(pipe, StableDiffusion) and (unet.added_dim or unet.guidance_dim or pipe.reads_mask)
    if more and config.parts != ("vae",):
        raise UnsupportedError(f"a {pipe.config.family} UNet reads more than a prompt, which training does not support")
    return (Autoencoding if config.parts == ("vae",) else Denoising)(pipe, config)


@torch.no_grad()
def latent_scale(pipe: StableDiffusion, batch: Batch) -> float:
    """Return the ``scaling_factor`` that gives the latents of ``batch`` unit variance, 1 / their standard deviation."""
    dtype = next(pipe.vae.parameters()).dtype
    mean = pipe.vae.encode(batch.pixels.to(pipe.device, dtype)).mean
    return float(1 / mean.float().std())
