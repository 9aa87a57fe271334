"""Whole pipelines against diffusers: same folder on disk, same generator, the same latents and pixels to the last bit.

The reference pipeline writes its folder, the production converter reads it, and both run from prompt to pixels.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines import PNDMPipeline

import weights_convert
from minidiff.pipeline import StableDiffusion, Unconditional, load
from minidiff.samplers import DDIM, sampler_from_diffusers
from tests.support.parity.twins import folder_twin
from tests.tolerances import assert_close

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SCHEDULERS: dict[str, Any] = {
    "pndm": PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1),
    "pndm with warm-up": PNDMScheduler(**SD, steps_offset=1),
    "ddim": DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "ddpm": DDPMScheduler(**SD, clip_sample=False, steps_offset=1),
    "euler": EulerDiscreteScheduler(**SD, steps_offset=1),
    "euler karras": EulerDiscreteScheduler(**SD, steps_offset=1, use_karras_sigmas=True),
    "euler_ancestral": EulerAncestralDiscreteScheduler(**SD, steps_offset=1),
    "heun": HeunDiscreteScheduler(**SD, steps_offset=1),
    "lms": LMSDiscreteScheduler(**SD, steps_offset=1),
    "dpm2_ancestral": KDPM2AncestralDiscreteScheduler(**SD, steps_offset=1),
    "dpmpp_2m karras": DPMSolverMultistepScheduler(**SD, steps_offset=1, use_karras_sigmas=True),
    "unipc": UniPCMultistepScheduler(**SD, steps_offset=1),
    "deis": DEISMultistepScheduler(**SD, steps_offset=1),
}
PROMPT = "a red fox, sitting on a chair"
NEGATIVE = "blurry, text"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, StableDiffusion]:
    """The reference pipeline and ours, converted to a file and loaded from it."""
    folder = tmp_path_factory.mktemp("sd1")
    theirs = folder_twin(folder / "folder")
    theirs.set_progress_bar_config(disable=True)
    weights_convert.convert(folder / "folder", folder / "model.safetensors")
    ours = load(folder / "model.safetensors")
    assert isinstance(ours, StableDiffusion)
    return theirs, ours


def both(pair: tuple[Any, StableDiffusion], scheduler: Any, prompt: Any = PROMPT, **options: Any) -> tuple[Any, Any]:
    """Latents and pixels of either side for the same call. ``options`` in minidiff's words."""
    theirs, ours = pair
    theirs.scheduler = type(scheduler).from_config(scheduler.config)
    sampler = sampler_from_diffusers({**scheduler.config, "_class_name": type(scheduler).__name__})
    renamed = {"steps": "num_inference_steps", "num_images": "num_images_per_prompt"}
    results = []
    for output, theirs_output in (("latent", "latent"), ("tensor", "pt"), ("pil", "np")):
        seed = torch.Generator().manual_seed(3)
        reference = theirs(
            prompt, generator=seed, output_type=theirs_output, **{renamed.get(k, k): v for k, v in options.items()}
        ).images
        seed = torch.Generator().manual_seed(3)
        results.append(
            (
                ours.generate(prompt, sampler=sampler, generator=seed, output=output, progress=False, **options),
                reference,
            )
        )
    return tuple(zip(*results, strict=True))  # type: ignore[return-value]


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    """Latents and pixels equal in every bit, and the 8-bit pictures in every level."""
    assert_close(ours[0], theirs[0], where=f"{where}: latents")
    assert_close(ours[1], theirs[1], where=f"{where}: pixels")
    for image, reference in zip(ours[2], theirs[2], strict=True):
        assert np.array_equal(np.asarray(image), (reference * 255).round().astype("uint8")), where


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_from_prompt_to_pixels(pair: tuple[Any, StableDiffusion], name: str) -> None:
    ours, theirs = both(pair, SCHEDULERS[name], negative_prompt=NEGATIVE, steps=5, guidance_scale=7.5)
    assert_equal(ours, theirs, name)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0, "steps": 3},
        {"guidance_scale": 3.0, "steps": 1},
        {"guidance_scale": 7.5, "steps": 2, "height": 40, "width": 24},
        {"guidance_scale": 7.5, "steps": 2, "height": 24, "width": 72, "num_images": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["pndm", "euler_ancestral"])
def test_scales_sizes_and_batches(pair: tuple[Any, StableDiffusion], name: str, options: dict[str, Any]) -> None:
    ours, theirs = both(pair, SCHEDULERS[name], **options)
    assert_equal(ours, theirs, f"{name} {options}")


def test_several_prompts(pair: tuple[Any, StableDiffusion]) -> None:
    prompts = ["a cat", "", "una casa \N{HOUSE BUILDING} in collina " * 30]
    with pytest.warns(UserWarning, match="una casa"):
        ours, theirs = both(pair, SCHEDULERS["ddim"], prompts, negative_prompt=["x", "y", "z"], num_images=2, steps=2)
    assert_equal(ours, theirs, "three prompts, two images each")


def test_one_generator_an_image(pair: tuple[Any, StableDiffusion]) -> None:
    theirs, ours = pair
    scheduler = SCHEDULERS["euler_ancestral"]
    theirs.scheduler = type(scheduler).from_config(scheduler.config)
    streams = [torch.Generator().manual_seed(s) for s in (5, 6)]
    reference = theirs(
        PROMPT, num_images_per_prompt=2, num_inference_steps=3, generator=streams, output_type="latent"
    ).images
    sampler = sampler_from_diffusers({**scheduler.config, "_class_name": type(scheduler).__name__})
    latents = ours.generate(PROMPT, sampler=sampler, num_images=2, steps=3, seed=5, output="latent", progress=False)
    assert_close(latents, reference, where="seed 5 is the generators seeded with 5 and 6")


def test_the_checkpoints_own_sampler(pair: tuple[Any, StableDiffusion], tmp_path: Path) -> None:
    theirs, ours = pair
    theirs.scheduler = PNDMScheduler.from_config(SCHEDULERS["pndm"].config)
    seed = torch.Generator().manual_seed(0)
    reference = theirs(PROMPT, num_inference_steps=4, generator=seed, output_type="latent").images
    seed = torch.Generator().manual_seed(0)
    assert_close(ours.generate(PROMPT, steps=4, generator=seed, output="latent", progress=False), reference)


def test_given_embeddings_and_latents(pair: tuple[Any, StableDiffusion]) -> None:
    theirs, ours = pair
    theirs.scheduler = EulerDiscreteScheduler.from_config(SCHEDULERS["euler"].config)
    context, _ = ours.encode_prompt([PROMPT])
    negative, _ = ours.encode_prompt([NEGATIVE])
    embeds = theirs.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    assert_close(context, embeds[0], where="prompt")
    assert_close(negative, embeds[1], where="negative prompt")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    given = {"prompt_embeds": context, "negative_prompt_embeds": negative, "latents": latents}
    reference = theirs(num_inference_steps=3, output_type="latent", **given).images
    sampler = sampler_from_diffusers({**theirs.scheduler.config, "_class_name": "EulerDiscreteScheduler"})
    out = ours.generate(None, steps=3, sampler=sampler, output="latent", progress=False, **given)
    assert_close(out, reference)


def test_tokens_beyond_77_are_cut_alike(pair: tuple[Any, StableDiffusion]) -> None:
    theirs, ours = pair
    long = "a very long prompt about nothing at all " * 20
    with pytest.warns(UserWarning, match="about nothing"):
        context, _ = ours.encode_prompt([long])
    assert_close(context, theirs.encode_prompt(long, "cpu", 1, False)[0])


@cache
def unconditional(tmp: Path, kind: str) -> tuple[Any, Unconditional]:
    theirs = folder_twin(tmp / kind, kind)
    ours = weights_convert.load(tmp / kind)
    assert isinstance(ours, Unconditional)
    return theirs, ours


@pytest.mark.parametrize("kind", ["ddpm", "ddpm_heads"])
@pytest.mark.parametrize(
    ("pipeline", "scheduler", "more"),
    [
        (DDPMPipeline, DDPMScheduler(), {}),
        (PNDMPipeline, PNDMScheduler(), {}),
        (DDIMPipeline, DDIMScheduler(), {}),
        (DDIMPipeline, DDIMScheduler(), {"eta": 0.5}),
    ],
    ids=["ddpm", "pndm", "ddim", "ddim eta"],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_unconditional(
    tmp_path_factory: pytest.TempPathFactory, kind: str, pipeline: Any, scheduler: Any, more: Any, batch: int
) -> None:
    theirs, ours = unconditional(tmp_path_factory.getbasetemp(), kind)
    reference = pipeline(theirs.unet, type(scheduler).from_config(scheduler.config))
    reference.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(1)
    pixels = reference(batch, num_inference_steps=5, generator=seed, output_type="np", **more).images
    sampler: Any = sampler_from_diffusers(
        {**reference.scheduler.config, "_class_name": type(scheduler).__name__, **more}
    )
    seed = torch.Generator().manual_seed(1)
    out = ours.generate(batch, steps=5, sampler=sampler, generator=seed, output="tensor", progress=False)
    assert_close(out.permute(0, 2, 3, 1), torch.from_numpy(pixels), where=f"{kind} {type(scheduler).__name__}")
    if more:
        assert isinstance(sampler, DDIM)
        assert sampler.eta == more["eta"]
