"""Settings of a run besides its prompt: a picture to start from, a mask, a part of the denoising, SDXL's sizes.

All of them are checked here, before any model call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from minidiff.config import ModelConfig, check, quote
from minidiff.pipeline.base import finite
from minidiff.pipeline.denoise import choose_rows, rows_outside
from minidiff.pipeline.images import Pictures, read
from minidiff.pipeline.prompts import Sizes
from minidiff.programs import Convention, starts
from minidiff.programs.starts import Start

if TYPE_CHECKING:
    from minidiff.pipeline.images import Picture


def usual_strength(masked: bool) -> float:
    """Return the default strength: 0.8, or 1 with a mask, as in the reference's inpainting pipelines (1 for Stable
    Diffusion, 0.9999 for SDXL)."""
    return 1.0 if masked else 0.8


MOST_PIXELS = 10**9  # per side


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arguments of :meth:`minidiff.StableDiffusion.generate`, under the same names."""

    image: Picture | None = None
    strength: float = 0.8
    mask: Picture | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    sizes: Sizes | None = None
    negative_sizes: Sizes | None = None
    clip_skip: int = 0
    guidance_rescale: float = 0.0
    guidance_interval: Sequence[float] | None = None

    def begun(self, convention: Convention | None, sampler: Any, steps: int, total: int) -> Start | None:
        """Return the point at which another program would start from the picture; None if there is no picture, or if
        it was handed over by another model."""
        if convention is None or self.image is None or self.denoising_start is not None:
            return None
        check(0 <= finite("strength", self.strength) <= 1, f"strength={self.strength} must lie in 0..1")
        return convention.start(sampler.name, steps, self.strength, total)

    def rows(
        self, plan: Any, steps: int, sampler: Any, config: ModelConfig, *, reads_mask: bool, begun: Start | None = None
    ) -> range:
        """Return the rows of the plan to run, given by ``begun`` if a program has its own rule.

        Raises :class:`ConfigError` for settings that do not go together.
        """
        start, end, family = self.denoising_start, self.denoising_end, config.family
        check(0 <= finite("strength", self.strength) <= 1, f"strength={self.strength} must lie in 0..1")
        within = 0 <= finite("guidance_rescale", self.guidance_rescale) <= 1
        check(within, f"guidance_rescale={self.guidance_rescale} must lie in 0..1")
        for name, value in (("denoising_start", start), ("denoising_end", end)):
            check(value is None or 0 < finite(name, value) < 1, f"{name}={value} must lie between 0 and 1")
        check(start is None or end is None or start < end, f"denoising_start={start} is not before denoising_end={end}")
        given = self.image is not None
        check(start is None or given, "denoising_start needs an image: the latents to go on from")
        check(self.mask is None or given, "a mask needs an image whose part it covers, and image is None")
        check(given or not config.reads_score, f"this {family} refines pictures: it needs an image, and image is None")
        check(
            self.mask is not None or not reads_mask,
            f"this {family} model paints into pictures: it needs an image and a mask",
        )
        if begun is not None:
            rows, _ = starts.rows(begun, plan, getattr(sampler, "order", 1))
            check(len(rows) > 0, f"strength={self.strength} of steps={steps} leaves no step to do; take more of either")
            return rows
        strength = self.strength if given else None
        return choose_rows(plan, steps, sampler, config.schedule.steps, strength=strength, start=start, end=end)

    def unguided(self, plan: Any, rows: range, sampler: Any, config: ModelConfig) -> list[int]:
        """Return the ``rows`` outside the guidance interval, which use the conditional prediction alone.

        Raises :class:`ConfigError` for an invalid interval, and for a sampler that does not use the model's timesteps.
        """
        given = self.guidance_interval
        if given is None:
            return []
        fits = isinstance(given, (tuple, list)) and len(given) == 2
        check(fits, f"guidance_interval={given!r} must be two numbers, such as (0.2, 0.9)")
        low, high = (finite("guidance_interval", value) for value in given)
        check(0 <= low < high <= 1, f"guidance_interval={given!r} must be (low, high) with 0 <= low < high <= 1")
        name, foreign = type(sampler).__name__, getattr(sampler, "own_levels", False)
        check(not foreign, f"guidance_interval is told by timesteps, and {name} has levels of its own; leave it out")
        return rows_outside(plan, rows, low, high, config.schedule.steps)

    def pictures(self, config: ModelConfig, height: int | None, width: int | None) -> Pictures | None:
        """Return the image and the mask, read and resized; None without an image."""
        c = config.vae
        assert c is not None
        if self.image is None:
            return None
        return read(self.image, self.mask, height, width, c.factor, c.latent_channels, c.image_channels)

    def noted(self) -> dict[str, Any]:
        """Return the recipe entries of the settings that were given."""
        noted: dict[str, Any] = {}
        if self.image is not None:
            noted |= {"image": _name(self.image), "strength": self.strength}
        if self.mask is not None:
            noted["mask"] = _name(self.mask)
        for name in ("denoising_start", "denoising_end"):
            if getattr(self, name) is not None:
                noted[name] = getattr(self, name)
        for name in ("sizes", "negative_sizes"):
            if getattr(self, name) is not None:
                noted[name] = asdict(getattr(self, name))
        for name in ("clip_skip", "guidance_rescale"):
            if getattr(self, name):
                noted[name] = getattr(self, name)
        if self.guidance_interval is not None:
            noted["guidance_interval"] = [float(value) for value in self.guidance_interval]
        return noted


def check_sides(factor: int, height: int | None, width: int | None) -> None:
    """Raise :class:`ConfigError` unless the sides are None, or whole numbers of pixels that ``factor`` divides."""
    for name, value in (("height", height), ("width", width)):
        whole = value is None or (isinstance(value, int) and not isinstance(value, bool))
        check(whole, f"{name}={quote(value)} must be a whole number of pixels")
        check(value is None or value < MOST_PIXELS, f"{name} must be below {MOST_PIXELS:,} pixels")
    wrong = {name: v for name, v in (("height", height), ("width", width)) if v is not None and (v <= 0 or v % factor)}
    around = [max(1, v // factor + up) * factor for v in wrong.values() for up in (0, 1)]
    named, nearest = (
        " and ".join(map(str, x)) for x in ((f"{k}={quote(v)}" for k, v in wrong.items()), sorted({*around}))
    )
    check(not wrong, f"{named} {'are' if len(wrong) > 1 else 'is'} not divisible by {factor}; the nearest: {nearest}")


def _name(picture: Any) -> str | None:
    """Return the file name without its folder; None for a picture that is not given as a path."""
    return os.path.basename(picture) if isinstance(picture, (str, os.PathLike)) else None
