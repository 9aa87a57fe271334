"""Distilled models of few steps: LCM, which is told the guidance scale, against LatentConsistencyModelPipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from minidiff.pipeline.guidance import guidance_code
from tests.support.parity import pairs, twins
from tests.support.parity.pairs import Pair, picture
from tests.tolerances import assert_close

# The reference has its own opinions on how many pictures to give and on steps_offset.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LCM = LCMScheduler(**twins.SCALED_LINEAR)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pairs.make(tmp_path_factory.mktemp("lcm"), twins.pipeline_twin("lcm"))


@pytest.mark.parametrize("scale", [1.0, 3.5, 8.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_latent_consistency(pair: Pair, steps: int, scale: float) -> None:
    """No negative prompt: the unguided prediction was distilled into it."""
    pairs.compare(pair, LCM, steps=steps, guidance_scale=scale, pixels=steps == 1)


def test_batches(pair: Pair) -> None:
    pairs.compare(pair, LCM, ["a cat", "a dog"], steps=3, num_images=2, seeds=[1, 2, 3, 4], pixels=False)


def test_the_scale_makes_a_difference(pair: Pair) -> None:
    given: dict[str, Any] = {"steps": 2, "seed": 0, "output": "latent", "progress": False}
    found = [pair.ours.generate("a", guidance_scale=scale, **given) for scale in (1.0, 8.5)]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_in_the_ordinary_pipelines(pair: Pair) -> None:
    pairs.compare(pairs.as_pipeline(pair, StableDiffusionPipeline), LCM, steps=3, pixels=False)
    image_to_image = pairs.as_pipeline(pair, StableDiffusionImg2ImgPipeline)
    pairs.compare(image_to_image, LCM, steps=4, image=picture(), strength=0.5, pixels=False)


def test_what_the_folder_says(pair: Pair) -> None:
    config = pair.ours.config
    assert config.family == "sd1-lcm"
    assert config.unet.guidance_dim == 16
    assert config.sampler["name"] == "lcm"


@pytest.mark.parametrize("dim", [16, 17, 256])
def test_guidance_code(pair: Pair, dim: int) -> None:
    for scale in (0.0, 1.0, 7.5, 8.5, 100.0):
        want = pair.theirs.get_guidance_scale_embedding(torch.tensor(scale - 1).repeat(1), embedding_dim=dim)
        assert_close(guidance_code(scale, dim), want, where=f"{scale} {dim}")
