"""Pipeline of models without text, which work on pixels (Ho et al. 2020)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from minidiff import noise
from minidiff.config import ModelConfig
from minidiff.console.progress import check_progress
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.pipeline.base import Output, Pipeline, SamplerChoice, Seed, check_count, check_output, note
from minidiff.pipeline.denoise import Prediction, Progress, Run
from minidiff.pipeline.memory import check_fits
from minidiff.pipeline.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from PIL import Image


class Unconditional(Pipeline):
    """Unconditional pipeline: the models of Ho et al. 2020, which take no prompt and work on pixels."""

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        """Return True for a model without a text encoder."""
        return config.text_encoder is None and config.text_encoder_2 is None

    @classmethod
    def _check_config(cls, config: ModelConfig) -> None:
        """Raise :class:`UnsupportedError` for a model that reads a prompt, or has a VAE."""
        if config.unet.context_dim is not None or config.vae is not None:
            raise UnsupportedError(
                f"{config.family}: a UNet that reads a prompt, or a VAE, but no text encoder with it"
            )

    @overload
    def generate(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        latents: Tensor | None = None,
        output: Literal["pil"] = "pil",
        progress: Progress = None,
        **others: Any,
    ) -> list[Image.Image]: ...

    @overload
    def generate(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        latents: Tensor | None = None,
        *,
        output: Literal["tensor", "latent"],
        progress: Progress = None,
        **others: Any,
    ) -> Tensor: ...

    def generate(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        latents: Tensor | None = None,
        output: Output = "pil",
        progress: Progress = None,
        **others: Any,
    ) -> list[Image.Image] | Tensor:
        """Generate ``batch_size`` pictures. The arguments have the same meaning as in :meth:`StableDiffusion.generate`.

        ``steps``: by default every training timestep for DDPM, 50 for the faster methods. Other arguments of
        :meth:`StableDiffusion.generate` (``image``, ``prompt``, ...) raise :class:`ConfigError`.
        """
        self._refuse(others)
        check_output(output)
        check_progress(progress)
        return self._deliver(self.steps(batch_size, steps, sampler, seed, generator, latents), output, progress)

    def steps(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        latents: Tensor | None = None,
        **others: Any,
    ) -> Run:
        """Return the denoising of :meth:`generate` as an iterator with one :class:`Step` per model call."""
        self._refuse(others)
        check_count("batch_size", batch_size)
        sampler = self.sampler(sampler)
        if steps is None:
            steps = self.config.schedule.steps if note(sampler)["name"] == "ddpm" else 50
        c = self.unet.config
        height, width = c.sides
        check_fits(
            self.config, batch_size, height, width, device=self.device, size=self.dtype.itemsize, at_once=batch_size
        )
        labels = [{"width": width, "height": height}] * batch_size
        shape = (batch_size, c.in_channels, height, width)
        plan = sampler.plan(self.schedule, steps)
        begin, origins = self._begin(sampler, plan, range(len(plan.timesteps)), shape, latents, seed, generator)
        return self._run(lambda x, t: Prediction(self.unet(x, t)), begin, begin.from_noise(), labels, origins, steps)

    def _refuse(self, others: Mapping[str, Any]) -> None:
        """Raise :class:`ConfigError` for arguments that this kind of model does not use, and for unknown ones."""
        for name in others:
            known = name in inspect.signature(StableDiffusion.generate).parameters
            why = "begins from noise alone, and reads no text" if known else "has no such argument"
            raise ConfigError(f"{name}= is given, and a {self.config.family} model {why}; leave it out")
