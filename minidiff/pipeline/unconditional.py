"""Pipeline of models without text, which work on pixels (Ho et al. 2020)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from minidiff import programs
from minidiff.config import ModelConfig
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.noise import Generators
from minidiff.pipeline.base import Pipeline, SamplerChoice
from minidiff.pipeline.denoise import Progress, Run
from minidiff.pipeline.guidance import Conditioned
from minidiff.pipeline.job import Prediction
from minidiff.pipeline.request import Output, Request, Seed, count, options
from minidiff.programs import Program

if TYPE_CHECKING:
    from PIL import Image


class Unconditional(Pipeline):
    """Unconditional pipeline: the models of Ho et al. 2020, which take no prompt and work on pixels."""

    _others = "which reads a prompt; open it by StableDiffusion.load"

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        """Return True for a model without a text encoder."""
        return config.text_encoder is None and config.text_encoder_2 is None

    @classmethod
    def _check_config(cls, config: ModelConfig) -> None:
        """Raise :class:`UnsupportedError` for a model that reads a prompt, has a VAE, or predicts more or less than a
        picture, or that and its variance."""
        if config.unet.context_dim is not None or config.vae is not None:
            raise UnsupportedError(
                f"{config.family}: a UNet that reads a prompt, or a VAE, but no text encoder with it"
            )
        reads, makes = config.unet.in_channels, config.unet.out_channels
        if makes not in (reads, 2 * reads):
            channels = f"in_channels={reads}, out_channels={makes}"
            raise UnsupportedError(f"{config.family}: {channels}; only a variance can be predicted beside the picture")

    @overload
    def generate(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed | None = None,
        generator: Generators | None = None,
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
        seed: Seed | None = None,
        generator: Generators | None = None,
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
        seed: Seed | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output: Output = "pil",
        progress: Progress = None,
        **others: Any,
    ) -> list[Image.Image] | Tensor:
        """Generate ``batch_size`` pictures. The arguments have the same meaning as in :meth:`StableDiffusion.generate`.

        ``steps``: by default every training timestep for DDPM, 50 for the faster methods. Other arguments of
        :meth:`StableDiffusion.generate` (``image``, ``prompt``, ...) raise :class:`ConfigError`.
        """
        request = self._request(batch_size, steps, sampler, seed, generator, latents, output, progress, **others)
        return self._deliver(self.run(request), request.output, request.progress)

    def steps(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        **others: Any,
    ) -> Run:
        """Return the denoising of :meth:`generate` as an iterator with one :class:`Step` per model call."""
        return self.run(self._request(batch_size, steps, sampler, seed, generator, latents, **others))

    def _request(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        output: Output = "pil",
        progress: Progress = None,
        **others: Any,
    ) -> Request:
        """Return the request that the arguments stand for. A Request that is ready is accepted in their place."""
        for name in others:
            if name not in {f.name for f, _ in options(Request)}:
                raise ConfigError(
                    f"{name}= is given, and a {self.config.family} model has no such argument; leave it out"
                )
        if isinstance(batch_size, Request):
            return replace(batch_size, **others)
        count("batch_size", batch_size)
        return Request(
            others.pop("prompt", None),
            steps=self.own_steps(sampler) if steps is None else steps,
            sampler=sampler,
            num_images=batch_size,
            seed=seed,
            generator=generator,
            latents=latents,
            output=output,
            progress=progress,
            **others,
        )

    def own_steps(self, sampler: SamplerChoice = None) -> int:
        """Return the default number of steps: every training timestep for DDPM, 50 for the faster methods."""
        chosen = programs.read(None).sampler(self.config.schedule, sampler, self.config.sampler)
        return self.config.schedule.steps if chosen.note["name"] == "ddpm" else super().own_steps()

    def _check(self, request: Request) -> None:
        """Raise :class:`ConfigError` for options of models that read a prompt."""
        for name in request.of_text():
            why = f"a {self.config.family} model begins from noise alone, and reads no text"
            raise ConfigError(f"{name}= is given, and {why}; leave it out")

    def _shape(self, request: Request, own: tuple[int, int] | None) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of a sample, which is pixels."""
        return self.unet.config.in_channels, *self.unet.config.sides

    def _conditioned(
        self, request: Request, program: Program, shape: tuple[int, ...], calls: int, made: int
    ) -> Conditioned:
        """Return the UNet, which nothing conditions."""

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return Prediction(self.unet(x, t))

        return Conditioned(
            lambda unet, beside: predict, lambda unet, beside: predict, [{"prompt": None}] * shape[0], text=False
        )
