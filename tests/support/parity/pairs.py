"""Pairs of pipelines: the reference's, and minidiff's read from the folder that it wrote, called alike.

Noise comes from ``seeds``: one generator for the whole batch, or a list with one for each image, anew for every run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import TCDScheduler
from PIL import Image
from torch import Tensor

import weights_convert
from minidiff.pipeline import StableDiffusion, load
from minidiff.samplers import sampler_from_diffusers
from minidiff.samplers.method import Sampler
from tests.tolerances import assert_close

PROMPT = "a red fox, sitting on a chair"
NEGATIVE = "blurry, text"
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)

# An argument of ours under the name that it has over there.
RENAMED = {"steps": "num_inference_steps", "num_images": "num_images_per_prompt", "mask": "mask_image"}


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    """A smooth RGB picture with some noise in it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 5 + seed), np.cos(y / 7), np.sin((x + y) / 9)], axis=-1)
    return Image.fromarray(np.uint8(np.clip(127 + 90 * waves + rng.normal(0, 20, waves.shape), 0, 255)))


class Pair(NamedTuple):
    """A reference pipeline and our own one with the same weights."""

    theirs: Any
    ours: StableDiffusion


def make(folder: Path, theirs: Any) -> Pair:
    """Write ``theirs`` as a folder, convert it to a file, and load that."""
    theirs.save_pretrained(str(folder / "folder"))
    weights_convert.convert(folder / "folder", folder / "model.safetensors")
    ours = load(folder / "model.safetensors", device="cpu")
    assert isinstance(ours, StableDiffusion)
    return as_pipeline(Pair(theirs, ours), type(theirs))


def as_pipeline(pair: Pair, kind: type[Any], **more: Any) -> Pair:
    """The same parts as another pipeline of the reference, such as image to image."""
    theirs = kind.from_pipe(pair.theirs, **more)
    theirs.set_progress_bar_config(disable=True)
    return Pair(theirs, pair.ours)


def use(pair: Pair, scheduler: Any) -> Sampler[Any, Any]:
    """Give the reference a fresh scheduler like ``scheduler``; returns our sampler of the same config."""
    pair.theirs.scheduler = type(scheduler).from_config(scheduler.config)
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    if isinstance(scheduler, TCDScheduler):  # whose step has another default than the 0 that pipelines give it
        config["eta"] = 0.0
    return sampler_from_diffusers(config)


def streams(seeds: int | list[int]) -> Any:
    """A generator for the batch, or one for each image."""
    if isinstance(seeds, int):
        return torch.Generator().manual_seed(seeds)
    return [torch.Generator().manual_seed(s) for s in seeds]


def compare(
    pair: Pair,
    scheduler: Any,
    prompt: Any = PROMPT,
    seeds: int | list[int] = 3,
    where: str = "",
    only_theirs: dict[str, Any] | None = None,
    only_ours: dict[str, Any] | None = None,
    pixels: bool = True,
    **options: Any,
) -> Tensor:
    """Demand equal latents, and pixels, of the same call; ``options`` in our words, but for those of one side only.

    Returns the latents.
    """
    sampler = use(pair, scheduler)
    options = {"guidance_scale": 7.5} | options  # over there the default is another in every pipeline
    theirs = {RENAMED.get(k, k): v for k, v in options.items()} | (only_theirs or {})
    ours = {"sampler": sampler, "progress": False} | options | (only_ours or {})

    def run(kind: str, their_kind: str) -> tuple[Tensor, Tensor]:
        return (
            pair.ours.generate(prompt, generator=streams(seeds), output=kind, **ours),
            pair.theirs(prompt, generator=streams(seeds), output_type=their_kind, **theirs).images,
        )

    latents, reference = run("latent", "latent")
    assert_close(latents, reference, where=f"{where}: latents")
    assert latents.std() > 0.05, "a dead twin would prove nothing"
    if pixels:
        assert_close(*run("tensor", "pt"), where=f"{where}: pixels")
    return latents
