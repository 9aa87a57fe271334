"""Settings of a training run: what is trained, how long, at which rate, and what is written when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from minidiff.config import check, one_of, within

Curve = Literal["constant", "cosine", "linear"]
Precision = Literal["float32", "bfloat16", "float16"]

MOST_STEPS = 10**9
TRAINABLE = (("unet",), ("unet", "text_encoder"), ("vae",))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. Two runs with equal settings, model and data give equal weights.

    ``batch``: pictures per optimiser step. ``accumulate``: number of parts into which a batch is split to save memory,
    with the same gradient. ``parts``: what is trained, the UNet, the UNet with the text encoder, or the autoencoder
    alone. The last group of fields changes what is written, not what is learned.
    """

    parts: tuple[str, ...] = ("unet",)
    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    seed: int = 0

    rate: float = 1e-4  # highest learning rate
    curve: Curve = "cosine"  # shape of its decrease after the warm-up
    warmup: int = 0  # steps during which it rises from 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 1e-2  # weight decay (Loshchilov & Hutter 2019), multiplied by the rate at every step
    clip: float | None = 1.0  # largest norm of the gradient; None: no limit
    precision: Precision = "float32"
    # Both are faster on a CPU, and give weights that differ from the plain ones by rounding:
    fused: bool = False  # AdamW in one pass over memory
    channels_last: bool = False  # convolutions keep pictures, weights and gradients pixel by pixel
    ema: float | None = 0.9999  # decay of the weights' moving average; None: no average

    min_snr: float | None = None  # gamma of Hang et al. 2023; 5 is usual; None: all timesteps have the same weight
    noisy: float = 1.0  # density of timestep t is t ** (noisy - 1): above 1, more high noise levels
    offset_noise: float = 0.0  # 0.1 is usual; lets the model change the brightness of a whole picture
    drop_prompt: float = 0.1  # share of prompts replaced by the empty one
    kl: float = 1e-6  # VAE: weight of the latents' KL divergence from N(0, 1) relative to the reconstruction

    save_every: int = 500
    sample_every: int = 0  # 0: never
    samples: int = 16

    def __post_init__(self) -> None:
        choices = ", ".join("+".join(p) for p in TRAINABLE)
        check(tuple(self.parts) in TRAINABLE, f"parts={self.parts!r}: what can be trained is one of {choices}")
        within(
            1, MOST_STEPS, steps=self.steps, batch=self.batch, accumulate=self.accumulate, save_every=self.save_every
        )
        within(0, MOST_STEPS, warmup=self.warmup, sample_every=self.sample_every)
        within(1, 1024, samples=self.samples)
        within(0, 2**63 - 1, seed=self.seed)
        check(self.warmup <= self.steps, f"warmup={self.warmup} is longer than the whole run of steps={self.steps}")
        fits = self.batch % self.accumulate == 0
        check(fits, f"batch={self.batch} does not divide into accumulate={self.accumulate} equal parts")
        for name, value, choice in (
            ("curve", self.curve, ("constant", "cosine", "linear")),
            ("precision", self.precision, ("float32", "bfloat16", "float16")),
        ):
            one_of(choice, **{name: value})
        above = (
            ("rate", self.rate),
            ("eps", self.eps),
            ("clip", self.clip),
            ("min_snr", self.min_snr),
            ("noisy", self.noisy),
        )
        for name, number in above:
            check(number is None or 0 < number < math.inf, f"{name}={number} must be above 0")
        within(0, 1, drop_prompt=self.drop_prompt, decay=self.decay)
        within(0, 1e6, offset_noise=self.offset_noise, kl=self.kl)
        for name, share in (("ema", self.ema), ("betas", self.betas[0]), ("betas", self.betas[1])):
            check(share is None or 0 <= share < 1, f"{name}={share} must lie in 0..1, below 1")
