# Written by `python -m tests.unit.test_request` from the fields of Request: not to be edited.
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from PIL import Image
from torch import Tensor

from minidiff.adapters.control import Control
from minidiff.noise import Generators
from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.denoise import Progress, Run
from minidiff.pipeline.images import Picture
from minidiff.pipeline.request import Request, Seed, Sizes, Text
from minidiff.programs import Program
from minidiff.samplers.method import Sampler

class Entrance(Pipeline, metaclass=ABCMeta):
    @overload
    def generate(
        self,
        prompt: Text | None,
        negative_prompt: Text | None = None,
        steps: int = 50,
        guidance_scale: float | None = None,
        sampler: str | Mapping[str, Any] | Sampler[Any, Any] | None = None,
        num_images: int = 1,
        seed: Seed | None = None,
        generator: Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output: Literal["pil"] = "pil",
        progress: Progress = None,
        *,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        controls: Sequence[Control] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        sizes: Sizes | None = None,
        negative_sizes: Sizes | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int = 0,
        like: str | Program | None = None,
        prompt_style: str | None = None,
        prompt_2: Text | None = None,
        negative_prompt_2: Text | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> list[Image.Image]: ...
    @overload
    def generate(
        self,
        prompt: Text | None,
        negative_prompt: Text | None = None,
        steps: int = 50,
        guidance_scale: float | None = None,
        sampler: str | Mapping[str, Any] | Sampler[Any, Any] | None = None,
        num_images: int = 1,
        seed: Seed | None = None,
        generator: Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        output: Literal["tensor", "latent"],
        progress: Progress = None,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        controls: Sequence[Control] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        sizes: Sizes | None = None,
        negative_sizes: Sizes | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int = 0,
        like: str | Program | None = None,
        prompt_style: str | None = None,
        prompt_2: Text | None = None,
        negative_prompt_2: Text | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> Tensor: ...
    @overload
    def generate(self, request: Request, /, **changes: Any) -> list[Image.Image] | Tensor: ...
    @overload
    def steps(
        self,
        prompt: Text | None,
        negative_prompt: Text | None = None,
        steps: int = 50,
        guidance_scale: float | None = None,
        sampler: str | Mapping[str, Any] | Sampler[Any, Any] | None = None,
        num_images: int = 1,
        seed: Seed | None = None,
        generator: Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        controls: Sequence[Control] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        sizes: Sizes | None = None,
        negative_sizes: Sizes | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int = 0,
        like: str | Program | None = None,
        prompt_style: str | None = None,
        prompt_2: Text | None = None,
        negative_prompt_2: Text | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> Run: ...
    @overload
    def steps(self, request: Request, /, **changes: Any) -> Run: ...
