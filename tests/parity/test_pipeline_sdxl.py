"""SDXL against the reference: base, refiner and the hand-over between them, image to image and inpainting."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UniPCMultistepScheduler,
)

from minidiff import Sizes, StableDiffusion
from tests.parity.test_pipeline_inpaint import mask
from tests.support.parity import pairs, twins
from tests.support.parity.pairs import NEGATIVE, SD, Pair, picture
from tests.tolerances import assert_close

EULER = EulerDiscreteScheduler(**SD)
SCHEDULERS: dict[str, Any] = {
    "euler": EULER,
    "euler_ancestral": EulerAncestralDiscreteScheduler(**SD),
    "heun": HeunDiscreteScheduler(**SD),
    "ddim": DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False),
    "dpmpp_2m": DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True),
    "unipc": UniPCMultistepScheduler(**SD),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pairs.make(tmp_path_factory.mktemp("sdxl"), twins.pipeline_twin("sdxl"))


@pytest.fixture(scope="module")
def refiner(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pairs.make(tmp_path_factory.mktemp("refiner"), twins.pipeline_twin("refiner"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A UNet of nine channels."""
    return pairs.make(tmp_path_factory.mktemp("xl_inpaint"), twins.pipeline_twin("sdxl_inpaint"))


def told(sizes: Sizes | None, negative: Sizes | None = None) -> dict[str, Any]:
    """Sizes in the reference's words."""
    found: dict[str, Any] = {}
    for start, s in (("", sizes), ("negative_", negative)):
        if s is not None:
            found |= {f"{start}original_size": s.original, f"{start}target_size": s.target}
            found[f"{start}crops_coords_top_left"] = s.crop
            if s.score is not None:
                found[f"{start}aesthetic_score"] = s.score
    return found


# --- base ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_kind_of_sampler(base: Pair, name: str) -> None:
    pairs.compare(base, SCHEDULERS[name], where=name, negative_prompt=NEGATIVE, steps=3, pixels=name == "euler")


@pytest.mark.parametrize("negative", [None, "", NEGATIVE], ids=repr)
@pytest.mark.parametrize("zeros", [True, False])
def test_negative_prompts(base: Pair, zeros: bool, negative: str | None) -> None:
    """None is zeros where the model was trained so; the empty text is a text."""
    pair = pairs.as_pipeline(base, type(base.theirs), force_zeros_for_empty_prompt=zeros)
    ours = StableDiffusion(replace(base.ours.config, zero_empty=zeros), base.ours.parts)
    pairs.compare(Pair(pair.theirs, ours), EULER, negative_prompt=negative, steps=2, pixels=False)


@pytest.mark.parametrize(
    ("sizes", "negative"),
    [
        (Sizes(original=(64, 48), crop=(3, 5), target=(100, 90)), None),
        (Sizes(target=(512, 512)), None),
        (Sizes(crop=(1, 2)), Sizes(original=(16, 16), crop=(7, 8), target=(40, 40))),
    ],
    ids=str,
)
def test_sizes(base: Pair, sizes: Sizes, negative: Sizes | None) -> None:
    options: dict[str, Any] = {"steps": 2, "height": 40, "width": 24, "pixels": False}
    ours = {"sizes": sizes, "negative_sizes": negative}
    latents = pairs.compare(base, EULER, only_ours=ours, only_theirs=told(sizes, negative), **options)
    plain = pairs.compare(base, EULER, **options)
    assert (latents - plain).abs().max() > 1e-3, "the sizes make no difference"


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (pairs.PROMPT, {"guidance_scale": 1.0}),
        (pairs.PROMPT, {"num_images": 2, "seeds": [3, 8]}),
        (["a cat", "two dogs", "!"], {"negative_prompt": [NEGATIVE, "", "x"]}),
    ],
    ids=["unguided", "two images", "three prompts"],
)
def test_batches(base: Pair, prompt: Any, options: dict[str, Any]) -> None:
    pairs.compare(base, SCHEDULERS["euler_ancestral"], prompt, steps=2, pixels=False, **options)


def test_turbo(base: Pair) -> None:
    """Few steps, trailing, without guidance: what the reference calls 0 is 1 here."""
    scheduler = EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing")
    for steps in (1, 4):
        only = {"only_ours": {"guidance_scale": 1.0}, "only_theirs": {"guidance_scale": 0.0}}
        pairs.compare(base, scheduler, steps=steps, pixels=steps == 1, **only)


def test_encode_prompt(base: Pair) -> None:
    texts = ["a cat", "", "fog! " * 9]
    context, _, pooled, _ = base.theirs.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False)
    ours = base.ours.encode_prompt(texts)
    assert_close(ours[0], context, where="context")
    assert ours[1] is not None
    assert_close(ours[1], pooled, where="pooled")
    assert base.ours.tokenizer("a")[0, -1] == 49407
    assert base.ours.tokenizer_2("a")[0, -1] == 0


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(base: Pair, skip: int) -> None:
    pairs.compare(base, EULER, negative_prompt=NEGATIVE, clip_skip=skip, steps=2, pixels=False)


@pytest.mark.parametrize(
    ("prompt", "second"),
    [
        (pairs.PROMPT, {"prompt_2": "an owl", "negative_prompt": NEGATIVE}),
        (pairs.PROMPT, {"negative_prompt": NEGATIVE, "negative_prompt_2": "fog"}),
        (
            ["a cat", "two dogs"],
            {"prompt_2": ["x", "y"], "negative_prompt": ["", "b"], "negative_prompt_2": ["c", "d"]},
        ),
    ],
    ids=["prompt", "negative", "of each"],
)
def test_second_prompts(base: Pair, prompt: Any, second: dict[str, Any]) -> None:
    latents = pairs.compare(base, EULER, prompt, steps=2, pixels=False, **second)
    first = {k: v for k, v in second.items() if not k.endswith("_2")}
    plain = pairs.compare(base, EULER, prompt, steps=2, pixels=False, **first)
    assert (latents - plain).abs().max() > 1e-3, "the second prompt makes no difference"


def test_guidance_rescale(base: Pair) -> None:
    """In all three pipelines; without guidance it does nothing."""
    options: dict[str, Any] = {"negative_prompt": NEGATIVE, "steps": 2, "pixels": False, "num_images": 2}
    latents = pairs.compare(base, EULER, guidance_rescale=0.7, **options)
    plain = pairs.compare(base, EULER, **options)
    assert (latents - plain).abs().max() > 1e-3, "it makes no difference"
    pairs.compare(base, EULER, guidance_rescale=0.7, guidance_scale=1.0, **options)
    image = pairs.as_pipeline(base, StableDiffusionXLImg2ImgPipeline)
    second = {"prompt_2": "an owl", "negative_prompt_2": "fog"}
    options |= {"image": picture(), "strength": 0.8, "num_images": 1}
    pairs.compare(image, EULER, guidance_rescale=1.0, **options, **second)
    hole = pairs.as_pipeline(base, StableDiffusionXLInpaintPipeline)
    options |= {"mask": mask(), "height": 32, "width": 32}
    pairs.compare(hole, EULER, guidance_rescale=0.3, **options, **second)


def test_embeddings_given(base: Pair) -> None:
    embeds = base.theirs.encode_prompt(pairs.PROMPT, device="cpu", negative_prompt=NEGATIVE)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeds, strict=True))
    pairs.compare(base, EULER, None, steps=2, pixels=False, **given)


# --- image to image, and the refiner ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image(base: Pair, name: str) -> None:
    pair = pairs.as_pipeline(base, StableDiffusionXLImg2ImgPipeline)
    pairs.compare(pair, SCHEDULERS[name], image=picture(40, 24), strength=0.5, steps=4, pixels=False)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_refiner(refiner: Pair, negative: str | None) -> None:
    options = {"image": picture(), "strength": 0.5, "steps": 4, "negative_prompt": negative}
    pairs.compare(refiner, EULER, **options)


def test_refiner_sizes_and_scores(refiner: Pair) -> None:
    sizes = Sizes(original=(64, 48), crop=(3, 5), score=7.5)
    negative = Sizes(original=(16, 20), crop=(1, 0), score=1.0)
    options = {"image": picture(), "strength": 0.5, "steps": 4, "pixels": False}
    pairs.compare(refiner, EULER, only_ours={"sizes": sizes}, only_theirs=told(sizes, Sizes(crop=(3, 5))), **options)
    ours = {"sizes": sizes, "negative_sizes": negative}
    pairs.compare(refiner, EULER, only_ours=ours, only_theirs=told(sizes, negative), num_images=2, **options)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_hand_over(base: Pair, refiner: Pair, name: str) -> None:
    """The base stops with its noise in the latents, the refiner goes on from there."""
    at = 0.6
    options: dict[str, Any] = {"steps": 5, "pixels": False, "where": name}
    latents = pairs.compare(base, SCHEDULERS[name], denoising_end=at, **options)
    refined = pairs.compare(refiner, SCHEDULERS[name], image=latents, denoising_start=at, **options)
    assert (refined - latents).abs().max() > 0.1
    if name == "euler":
        pairs.compare(refiner, SCHEDULERS[name], image=latents, denoising_start=at, denoising_end=0.8, **options)


# --- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["base", "trained"])
def test_inpainting(request: pytest.FixtureRequest, kind: str, strength: float) -> None:
    pair = pairs.as_pipeline(request.getfixturevalue(kind), StableDiffusionXLInpaintPipeline)
    options = {"image": picture(), "mask": mask(), "strength": strength, "height": 32, "width": 32}
    pairs.compare(pair, SCHEDULERS["euler_ancestral"], steps=2, pixels=False, **options)


def test_inpainting_by_the_refiner(base: Pair, refiner: Pair) -> None:
    """Handed over with its noise, and the known part put back after every step."""
    pair = pairs.as_pipeline(refiner, StableDiffusionXLInpaintPipeline, requires_aesthetics_score=True)
    latents = base.ours.generate("a", denoising_end=0.5, steps=4, seed=0, output="latent", progress=False)
    options: dict[str, Any] = {"mask": mask(), "steps": 4, "height": 32, "width": 32, "pixels": False}
    pairs.compare(pair, EULER, image=latents, denoising_start=0.5, **options)
    pairs.compare(pair, EULER, image=picture(), denoising_start=0.5, strength=1.0, **options)


# --- what the folders say --------------------------------------------------------------------------------------------


def test_what_the_folders_say(base: Pair, refiner: Pair, trained: Pair) -> None:
    assert [p.ours.config.family for p in (base, refiner, trained)] == ["sdxl", "sdxl-refiner", "sdxl-inpainting"]
    assert [p.ours.config.zero_empty for p in (base, refiner, trained)] == [True, False, True]
    assert [p.ours.config.reads_score for p in (base, refiner, trained)] == [False, True, False]
    assert all(p.ours.vae.config.upcast for p in (base, refiner, trained))
    own = base.ours.generate("a", steps=3, seed=1, output="latent", progress=False)
    pairs.use(base, EulerDiscreteScheduler(**SD, timestep_spacing="leading"))
    reference = base.theirs(
        "a", num_inference_steps=3, guidance_scale=7.5, generator=[pairs.streams(1)], output_type="latent"
    )
    assert_close(own, reference.images, where="the checkpoint's own sampler")


@torch.no_grad()
def test_float16(base: Pair) -> None:
    """The autoencoder stays in float32, where the reference puts it for the time of a call."""
    ours = StableDiffusion(base.ours.config, {k: copy.deepcopy(p) for k, p in base.ours.parts.items()})
    ours.to(dtype=torch.float16)
    assert ours.dtype == ours.text_encoder_2.token.weight.dtype == torch.float16
    assert ours.vae.decoder.conv_in.weight.dtype == torch.float32
    found = ours.generate("a", image=picture(), steps=2, seed=0, output="latent", progress=False)
    assert found.dtype == torch.float16
    vae = copy.deepcopy(base.theirs.vae).half().float()
    pixels = vae.decode(found.float() / vae.config.scaling_factor).sample
    assert_close(ours.decode(found), (pixels * 0.5 + 0.5).clamp(0, 1))
