"""Image to image against StableDiffusionImg2ImgPipeline: the same picture, strength and noise, equal latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    StableDiffusionImg2ImgPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from minidiff.errors import ConfigError
from tests.support.parity import pairs, twins
from tests.support.parity.pairs import NEGATIVE, SD, Pair, picture
from tests.tolerances import assert_close

# The reference has its own opinions on how many pictures to give and on steps_offset.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SCHEDULERS: dict[str, Any] = {
    "pndm": PNDMScheduler(**SD, skip_prk_steps=True),
    "pndm with warm-up": PNDMScheduler(**SD),
    "ddim": DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False),
    "ddpm": DDPMScheduler(**SD, clip_sample=False),
    "euler": EulerDiscreteScheduler(**SD),
    "euler karras": EulerDiscreteScheduler(**SD, use_karras_sigmas=True),
    "euler trailing": EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
    "euler_ancestral": EulerAncestralDiscreteScheduler(**SD),
    "heun": HeunDiscreteScheduler(**SD),
    "lms": LMSDiscreteScheduler(**SD),
    "dpm2": KDPM2DiscreteScheduler(**SD),
    "dpm2_ancestral": KDPM2AncestralDiscreteScheduler(**SD),
    "dpmpp_2m": DPMSolverMultistepScheduler(**SD),
    "dpmpp_2m karras sde": DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"),
    "dpmpp_2s": DPMSolverSinglestepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "deis": DEISMultistepScheduler(**SD),
    "unipc": UniPCMultistepScheduler(**SD),
    "sa_solver": SASolverScheduler(**SD),
    "lcm": LCMScheduler(**SD),
    "tcd": TCDScheduler(**SD),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    made = pairs.make(tmp_path_factory.mktemp("sd1"), twins.pipeline_twin())
    return pairs.as_pipeline(made, StableDiffusionImg2ImgPipeline)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler(pair: Pair, name: str) -> None:
    options = {"image": picture(), "strength": 0.6, "steps": 5, "guidance_scale": 1.0}
    pairs.compare(pair, SCHEDULERS[name], where=name, pixels=False, **options)


def test_the_whole_plan_at_strength_1(pair: Pair) -> None:
    """Even then it begins from the picture with noise on it, not from noise alone."""
    for name in ("pndm", "euler"):
        options = {"image": picture(), "strength": 1.0, "steps": 3, "negative_prompt": NEGATIVE}
        pairs.compare(pair, SCHEDULERS[name], where=name, **options)


@pytest.mark.parametrize("strength", [0.21, 0.3, 0.999])
def test_how_many_steps_a_strength_takes(pair: Pair, strength: float) -> None:
    pairs.compare(
        pair, SCHEDULERS["euler"], image=picture(), strength=strength, steps=10, guidance_scale=1.0, pixels=False
    )
    run = pair.ours.steps("a", image=picture(), strength=strength, steps=10, sampler="euler", seed=0)
    assert len(run) == len(list(run)) == int(10 * strength)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (picture(37, 50), {}),  # cut to a multiple of the factor, by resizing
        (picture(24, 40), {"num_images": 3}),
        ([picture(seed=1), picture(seed=2)], {"prompt": ["a cat", "a dog"]}),
        (torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)), {"num_images": 2}),
        (torch.rand(2, 3, 33, 26, generator=torch.Generator().manual_seed(0)), {"prompt": ["a", "b"]}),
        (torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(0)), {"num_images": 2}),  # latents
    ],
    ids=["odd size", "one for three", "one a prompt", "tensor", "odd tensors", "latents"],
)
@pytest.mark.parametrize("seeds", [3, [5, 6, 7]], ids=["one generator", "one an image"])
def test_pictures_of_every_kind(pair: Pair, image: Any, options: dict[str, Any], seeds: Any) -> None:
    options = dict(options)
    prompt = options.pop("prompt", pairs.PROMPT)
    count = options.get("num_images", 1) * (len(prompt) if isinstance(prompt, list) else 1)
    if isinstance(seeds, list):
        seeds = seeds[:count]
    pairs.compare(
        pair, SCHEDULERS["euler_ancestral"], prompt, seeds, image=image, strength=0.5, steps=2, pixels=False, **options
    )


def test_a_path_is_the_picture_in_it(pair: Pair, tmp_path: Path) -> None:
    picture(40, 32).save(tmp_path / "a.png")
    given: dict[str, Any] = {"steps": 3, "seed": 1, "sampler": "euler", "output": "latent", "progress": False}
    want = pair.ours.generate("a", image=picture(40, 32), **given)
    assert_close(pair.ours.generate("a", image=tmp_path / "a.png", **given), want)
    assert_close(pair.ours.generate("a", image=str(tmp_path / "a.png"), **given), want)


def test_resized_to_what_is_asked_for(pair: Pair) -> None:
    """As the reference's image processor resizes it."""
    resized = pair.theirs.image_processor.preprocess(picture(50, 70), height=40, width=24)
    given: dict[str, Any] = {"strength": 0.5, "steps": 3, "sampler": "ddim", "output": "latent", "progress": False}
    theirs = (resized + 1) / 2
    ours = pair.ours.generate("a", image=picture(50, 70), height=40, width=24, seed=0, **given)
    want = pair.ours.generate("a", image=theirs, seed=0, **given)
    assert (ours - want).abs().max() < 1e-4  # (x + 1) / 2 * 2 - 1 rounds
    assert ours.shape == (1, 4, 10, 6)


def test_seeds_give_an_image_its_noise_in_any_batch(pair: Pair) -> None:
    given: dict[str, Any] = {"image": picture(), "steps": 3, "sampler": "ddim", "output": "latent", "progress": False}
    reference = pairs.use(pair, SCHEDULERS["ddim"])
    theirs = pair.theirs(
        "a", image=picture(), num_images_per_prompt=2, num_inference_steps=3, generator=pairs.streams([8, 9]),
        strength=0.8, output_type="latent",
    ).images  # fmt: skip
    ours = pair.ours.generate("a", num_images=2, seed=8, **given | {"sampler": reference})
    assert_close(ours, theirs)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(pair: Pair, skip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's layers only: the reference reads the negative prompt as ever.

    It asks for ``text_encoder.text_model``, which transformers took away in 5.6: the encoder is its own.
    """
    monkeypatch.setattr(type(pair.theirs.text_encoder), "text_model", property(lambda self: self), raising=False)
    options = {"image": picture(), "strength": 0.5, "steps": 2, "negative_prompt": NEGATIVE, "clip_skip": skip}
    pairs.compare(pair, SCHEDULERS["ddim"], pixels=False, **options)


def test_no_step_left(pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"strength=0\.05 of steps=10 leaves no step"):
        pair.ours.steps("a", image=picture(), strength=0.05, steps=10)
