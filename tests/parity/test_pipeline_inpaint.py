"""Inpainting against StableDiffusionInpaintPipeline, with ordinary models and with those that read the mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors.torch import save_file

import weights_convert
from minidiff.pipeline import StableDiffusion, load
from tests.parity.test_convert_stability import single, told
from tests.support.parity import pairs, twins
from tests.support.parity.pairs import SD, Pair, picture
from tests.tolerances import assert_close

SCHEDULERS: dict[str, Any] = {
    "pndm": PNDMScheduler(**SD, skip_prk_steps=True),
    "ddim": DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False),
    "euler": EulerDiscreteScheduler(**SD),
    "euler_ancestral": EulerAncestralDiscreteScheduler(**SD),
    "heun": HeunDiscreteScheduler(**SD),
    "dpmpp_2m": DPMSolverMultistepScheduler(**SD),
    "unipc": UniPCMultistepScheduler(**SD),
}
SIZE: dict[str, Any] = {"height": 32, "width": 32}


def mask(width: int = 32, height: int = 32, mode: str = "L") -> Image.Image:
    """Blocks of black, white, and the two greys on either side of one half."""
    shades = np.random.default_rng(0).choice(np.uint8([0, 127, 128, 255]), (height // 4 + 1, width // 4 + 1))
    return Image.fromarray(np.kron(shades, np.ones((4, 4), np.uint8))[:height, :width]).convert(mode)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    made = pairs.make(tmp_path_factory.mktemp("sd1"), twins.pipeline_twin())
    return pairs.as_pipeline(made, StableDiffusionInpaintPipeline)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pairs.make(tmp_path_factory.mktemp("inpaint"), twins.pipeline_twin("inpaint"))


@pytest.fixture(params=["ordinary", "trained"])
def pair(request: pytest.FixtureRequest) -> Pair:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Pair)
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_kind_of_sampler(pair: Pair, name: str) -> None:
    options: dict[str, Any] = {"image": picture(), "mask": mask(), "steps": 4, "strength": 0.8, **SIZE}
    pairs.compare(pair, SCHEDULERS[name], where=name, pixels=False, guidance_scale=1.0, **options)


def test_at_strength_1_it_begins_from_noise(pair: Pair) -> None:
    for name in ("pndm", "euler_ancestral"):
        options: dict[str, Any] = {"image": picture(), "mask": mask(), "strength": 1.0, "steps": 2, **SIZE}
        pairs.compare(pair, SCHEDULERS[name], where=name, **options)


def test_the_default_strength_is_the_references(pair: Pair) -> None:
    options: dict[str, Any] = {"image": picture(), "mask": mask(), "steps": 3, **SIZE}
    latents = pairs.compare(pair, SCHEDULERS["ddim"], pixels=False, **options)
    less = pairs.compare(pair, SCHEDULERS["ddim"], pixels=False, strength=0.8, **options)
    assert not torch.equal(latents, less)


@pytest.mark.parametrize(
    ("image", "covered", "options"),
    [
        (picture(50, 37), mask(50, 37), {"height": 40, "width": 24}),
        (picture(), mask(mode="RGB"), {"num_images": 2, **SIZE}),
        ([picture(seed=1), picture(seed=2)], [mask(), mask().rotate(90)], {"prompt": ["a cat", "a dog"], **SIZE}),
        (
            torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(0)),
            mask(24, 40),
            {"height": 40, "width": 24},
        ),
        (
            torch.rand(2, 3, 36, 26, generator=torch.Generator().manual_seed(0)),
            torch.rand(2, 1, 36, 26, generator=torch.Generator().manual_seed(1)),
            {"prompt": ["a", "b"], "height": 32, "width": 24},
        ),
    ],
    ids=["resized", "two of one", "two of two", "tensor and mask", "tensors"],
)
def test_pictures_and_masks_of_every_kind(pair: Pair, image: Any, covered: Any, options: dict[str, Any]) -> None:
    options = dict(options)
    prompt = options.pop("prompt", pairs.PROMPT)
    for strength in (0.6, 1.0):
        given = {"image": image, "mask": covered, "strength": strength, "steps": 2, **options}
        pairs.compare(pair, SCHEDULERS["euler_ancestral"], prompt, where=str(strength), pixels=False, **given)


def test_a_generator_for_each_image(pair: Pair) -> None:
    """Each draws all that its image needs, where the picture is given for every one of them."""
    for strength in (0.6, 1.0):
        options = {"image": [picture()] * 2, "mask": [mask()] * 2, "strength": strength, "steps": 2, **SIZE}
        prompts = ["a cat", "a dog"]
        pairs.compare(pair, SCHEDULERS["euler_ancestral"], prompts, seeds=[4, 9], pixels=False, **options)


def test_a_seed_gives_the_same_image_in_any_batch(pair: Pair) -> None:
    """The reference lets the first generator draw for all images of one picture; here each draws its own."""
    given: dict[str, Any] = {"image": picture(), "mask": mask(), "steps": 2, "sampler": "euler_ancestral"}
    first: list[torch.Tensor] = []
    handle = pair.ours.unet.register_forward_pre_hook(lambda _, args: first.append(args[0]))
    next(pair.ours.steps("a", num_images=2, seed=7, guidance_scale=1.0, **given))
    next(pair.ours.steps("a", seed=8, guidance_scale=1.0, **given))
    handle.remove()
    assert_close(first[0][1:], first[1], where="what the UNet sees of the image with seed 8")


def test_what_the_mask_leaves_is_kept(ordinary: Pair, tmp_path: Path) -> None:
    """At a known place the latents end as those of the picture; the mask may be a file."""
    half = Image.fromarray(np.uint8(np.tile([0] * 16 + [255] * 16, (32, 1))))
    half.save(tmp_path / "mask.png")
    given: dict[str, Any] = {"steps": 3, "seed": 2, "output": "latent", "progress": False, "image": picture()}
    found = ordinary.ours.generate("a", mask=tmp_path / "mask.png", **given)
    other = ordinary.ours.generate("another", mask=half, **given)
    assert_close(found[..., :4], other[..., :4], where="the kept half")
    assert (found[..., 4:] - other[..., 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_stable_diffusion_2(tmp_path: Path, layout: str) -> None:
    """Nine channels, OpenCLIP's text encoder, epsilon; by way of both layouts."""
    made = pairs.make(tmp_path, twins.pipeline_twin("sd2_inpaint"))
    if layout == "single file":
        save_file(single("sd2_inpaint", made.theirs), tmp_path / "one.safetensors")
        options: dict[str, Any] = {"config": told("sd2_inpaint"), "prediction": "epsilon"}
        weights_convert.convert(tmp_path / "one.safetensors", tmp_path / "one.out.safetensors", **options)
        ours = load(tmp_path / "one.out.safetensors", device="cpu")
        assert isinstance(ours, StableDiffusion)
        made = Pair(made.theirs, ours)
    assert made.ours.config.family == "sd2-inpainting"
    for name, strength in (("pndm", 0.8), ("ddim", 1.0)):
        options = {"image": picture(), "mask": mask(), "steps": 3, "strength": strength, **SIZE}
        pairs.compare(made, SCHEDULERS[name], where=name, negative_prompt=pairs.NEGATIVE, **options)
