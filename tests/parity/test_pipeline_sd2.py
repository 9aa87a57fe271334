"""Stable Diffusion 2 as whole pipelines: OpenCLIP-H, linear projections, epsilon (base) and v-prediction (768-v).

The layer that its UNet reads is the last one of an encoder that was saved without its own last layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from minidiff.pipeline import StableDiffusion
from tests.support.parity import pairs, twins
from tests.support.parity.pairs import NEGATIVE, SD, Pair
from tests.tolerances import assert_close

SCHEDULERS: dict[str, Any] = {
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddim zero snr": (
        DDIMScheduler,
        {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The twin with the scheduler of the 768-v checkpoint in its folder."""
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    return pairs.make(tmp_path_factory.mktemp("sd2"), twins.pipeline_twin("sd2", scheduler=scheduler))


def retrained(pair: Pair, prediction: str, *, zero_snr: bool = False) -> Pair:
    """The pair with another meaning of the model's output: what the folder says is a fact of one checkpoint."""
    config = replace(pair.ours.config.schedule, prediction=prediction, zero_snr=zero_snr)
    return Pair(pair.theirs, StableDiffusion(replace(pair.ours.config, schedule=config), pair.ours.parts))


@pytest.mark.parametrize(
    ("prediction", "name"),
    [(p, n) for p in ("epsilon", "v_prediction") for n in SCHEDULERS if (p, n) != ("epsilon", "ddim zero snr")],
)
def test_every_sampler(base: Pair, prediction: str, name: str) -> None:
    kind, options = SCHEDULERS[name]
    pair = retrained(base, prediction, zero_snr="zero" in name)
    scheduler = kind(**SD, **options, prediction_type=prediction)
    pairs.compare(pair, scheduler, negative_prompt=NEGATIVE, steps=4, where=f"{name} {prediction}")


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0, "steps": 3},
        {"steps": 2, "height": 40, "width": 24, "num_images": 3},
        {"steps": 2, "height": 24, "width": 72, "num_images": 2, "seeds": [4, 9]},
        {"steps": 2, "guidance_rescale": 0.7, "num_images": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sizes_and_batches(base: Pair, prediction: str, options: dict[str, Any]) -> None:
    scheduler = EulerAncestralDiscreteScheduler(**SD, prediction_type=prediction)
    pairs.compare(retrained(base, prediction), scheduler, **options)


def test_what_the_folder_says(base: Pair) -> None:
    config = base.ours.config
    assert config.family == "sd2"
    assert config.schedule.prediction == "v_prediction"
    assert config.unet.linear_proj
    assert config.text_encoder is not None
    assert config.text_encoder.activation == "gelu"
    assert base.ours.tokenizer("a")[0, -1] == 0
    own = base.ours.generate("a!", steps=3, seed=1, output="latent", progress=False)
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    pairs.use(base, scheduler)
    reference = base.theirs("a!", num_inference_steps=3, generator=[pairs.streams(1)], output_type="latent").images
    assert_close(own, reference, where="the checkpoint's own sampler")


def test_prompts_share_a_negative_prompt(base: Pair) -> None:
    """The reference encodes the one that is left out once for each prompt, in one batch."""
    scheduler = DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction")
    pairs.compare(base, scheduler, ["a cat", "two dogs", "!"], steps=2, pixels=False)


def test_encode_prompt(base: Pair) -> None:
    texts = ["a cat", "", "fog! " * 9]
    reference = base.theirs.encode_prompt(texts, "cpu", 1, False)[0]
    context, pooled = base.ours.encode_prompt(texts)
    assert pooled is None
    assert_close(context, reference)
