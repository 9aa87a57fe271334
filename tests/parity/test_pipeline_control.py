"""Pipelines with controls against the reference's: equal latents and pixels, with one control and with several."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    MultiAdapter,
    PNDMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)

from minidiff import Control, ControlModel
from tests.parity.test_pipeline_inpaint import mask
from tests.support.parity import pairs, twins
from tests.support.parity.controls import controlnet_twin, loaded, t2i_twin
from tests.support.parity.pairs import NEGATIVE, SD, Pair, picture

# The reference has its own opinions on how many pictures to give and on steps_offset.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PNDM = PNDMScheduler(**SD, skip_prk_steps=True)
DDIM = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)
ANCESTRAL = EulerAncestralDiscreteScheduler(**SD)
PIPELINES: dict[str, tuple[Any, Any, Any]] = {
    "sd1": (
        StableDiffusionControlNetPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
    ),
    "sdxl": (
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
    ),
}
PIPELINES["sd2"] = PIPELINES["inpaint"] = PIPELINES["sd1"]


class Nets(NamedTuple):
    """A pair of pipelines, with two ControlNets of either side."""

    pair: Pair
    theirs: list[Any]
    ours: list[ControlModel]


def make(folder: Path, kind: str) -> Nets:
    base = pairs.make(folder, twins.pipeline_twin(kind))
    four = twins.unet_twin("sd1") if kind == "inpaint" else base.theirs.unet
    theirs = [controlnet_twin(unet=four, seed=seed) for seed in (7, 8)]
    ours = []
    for k, net in enumerate(theirs):
        (folder / f"net{k}").mkdir()
        ours.append(loaded(net, folder / f"net{k}"))
    return Nets(base, theirs, ours)


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    return make(tmp_path_factory.mktemp("sd1"), "sd1")


def steered(nets: Nets, kind: Any, count: int = 1) -> Pair:
    """The reference's pipeline with so many ControlNets."""
    found = nets.theirs[0] if count == 1 else nets.theirs[:count]
    return pairs.as_pipeline(nets.pair, kind, controlnet=found)


def compare(
    nets: Nets,
    kind: Any,
    pictures: list[Any],
    scheduler: Any = PNDM,
    prompt: Any = pairs.PROMPT,
    weights: list[float] | None = None,
    lows: list[float] | None = None,
    highs: list[float] | None = None,
    guess: bool = False,
    pixels: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Demand the same of both, with one ControlNet for each of ``pictures``."""
    n = len(pictures)
    weights, lows, highs = weights or [1.0] * n, lows or [0.0] * n, highs or [1.0] * n
    name = "image" if kind in (p[0] for p in PIPELINES.values()) else "control_image"
    theirs = {
        name: pictures if n > 1 else pictures[0],
        "controlnet_conditioning_scale": weights if n > 1 else weights[0],
        "control_guidance_start": lows if n > 1 else lows[0],
        "control_guidance_end": highs if n > 1 else highs[0],
        "guess_mode": guess,
    }
    found = zip(nets.ours, pictures, weights, lows, highs, strict=False)
    ours = {"controls": [Control(net, p, w, low, high, guess=guess) for net, p, w, low, high in found]}
    pair = steered(nets, kind, n)
    return pairs.compare(
        pair, scheduler, prompt, only_theirs=theirs, only_ours=ours, pixels=pixels, **{"steps": 3} | options
    )


EDGES, DEPTH = picture(seed=5), picture(seed=6)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_text_to_image(kind: str, nets: Nets, tmp_path: Path) -> None:
    found = nets if kind == "sd1" else make(tmp_path, kind)
    one = compare(found, PIPELINES[kind][0], [EDGES], negative_prompt=NEGATIVE, pixels=True)
    two = compare(found, PIPELINES[kind][0], [EDGES, DEPTH], weights=[0.8, -0.3], scheduler=ANCESTRAL)
    assert not torch.equal(one, two)
    if kind != "sd1":
        size: dict[str, Any] = {"image": picture(), "strength": 0.7, "height": 32, "width": 32}
        compare(found, PIPELINES[kind][1], [EDGES], scheduler=DDIM, **size)
        compare(found, PIPELINES[kind][2], [EDGES, DEPTH], scheduler=DDIM, mask=mask(), **size)


@pytest.mark.parametrize("count", [1, 2])
def test_from_a_picture(nets: Nets, count: int) -> None:
    pictures = [EDGES, DEPTH][:count]
    size: dict[str, Any] = {"image": picture(), "strength": 0.7, "height": 32, "width": 32}
    compare(nets, PIPELINES["sd1"][1], pictures, scheduler=ANCESTRAL, **size)
    compare(nets, PIPELINES["sd1"][2], pictures, scheduler=ANCESTRAL, mask=mask(), **size)


def test_a_model_that_reads_the_mask(tmp_path: Path) -> None:
    """Its ControlNet sees the latents alone."""
    found = make(tmp_path, "inpaint")
    options: dict[str, Any] = {"image": picture(), "mask": mask(), "strength": 1.0, "height": 32, "width": 32}
    hole = torch.rand(1, 3, 32, 32)
    hole[..., :16] = -1  # as the ControlNets for inpainting mark what is to be painted
    compare(found, PIPELINES["sd1"][2], [hole], scheduler=DDIM, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0, "weights": [0.6]},
        {"guess": True, "weights": [0.9]},
        {"guess": True, "guidance_scale": 1.0},
        {"lows": [0.3], "highs": [0.7], "steps": 4},
        {"lows": [0.0, 0.5], "highs": [0.6, 1.0], "guess": True, "steps": 4},
        {"steps": 2, "num_images": 2},
        {"steps": 2, "prompt": ["a cat", "a dog"], "pictures": [[EDGES, DEPTH]]},
        {"steps": 2, "pictures": [picture(50, 37, 3)], "height": 40, "width": 24},
        {"steps": 2, "pictures": [picture(50, 37, 3).convert("L")]},
        {"steps": 2, "pictures": [torch.rand(1, 3, 28, 36, generator=torch.Generator().manual_seed(0))]},
        {"scheduler": HeunDiscreteScheduler(**SD), "lows": [0.2], "highs": [0.9]},
    ],
    ids=lambda o: " ".join(o),
)
def test_options(nets: Nets, options: dict[str, Any]) -> None:
    options = dict(options)
    count = len(options.get("lows", [0]))
    compare(nets, PIPELINES["sd1"][0], options.pop("pictures", [EDGES, DEPTH][:count]), **options)


def test_guess_mode_of_sdxl_and_a_part_of_the_way(tmp_path: Path) -> None:
    found = make(tmp_path, "sdxl")
    compare(found, PIPELINES["sdxl"][0], [EDGES], guess=True, highs=[0.6], steps=4, denoising_end=0.7)


def test_outputs_averaged_over_the_picture(tmp_path: Path) -> None:
    """As those of the ControlNet "shuffle", which guides the prediction with the prompt alone."""
    base = pairs.make(tmp_path, twins.pipeline_twin())
    theirs = controlnet_twin(global_pool_conditions=True)
    (tmp_path / "net").mkdir()
    found = Nets(base, [theirs], [loaded(theirs, tmp_path / "net")])
    compare(found, PIPELINES["sd1"][0], [EDGES], weights=[0.7])
    compare(found, PIPELINES["sd1"][0], [EDGES], guess=True)


def test_t2i_adapters(nets: Nets, tmp_path: Path) -> None:
    theirs = [t2i_twin(seed=8), t2i_twin(seed=9)]
    ours = []
    for k, adapter in enumerate(theirs):
        (tmp_path / f"{k}").mkdir()
        ours.append(loaded(adapter, tmp_path / f"{k}"))
    pair = pairs.as_pipeline(nets.pair, StableDiffusionAdapterPipeline, adapter=theirs[0])
    pairs.compare(
        pair,
        DDIM,
        only_theirs={"image": EDGES, "adapter_conditioning_scale": 0.8},
        only_ours={"controls": [Control(ours[0], EDGES, 0.8)]},
        steps=2,
        num_images=2,
        pixels=False,
    )
    pair = pairs.as_pipeline(nets.pair, StableDiffusionAdapterPipeline, adapter=MultiAdapter(theirs))
    pairs.compare(
        pair,
        DDIM,
        only_theirs={"image": [EDGES, DEPTH], "adapter_conditioning_scale": [0.8, 0.5], "height": 40, "width": 24},
        only_ours={
            "controls": [Control(ours[0], EDGES, 0.8), Control(ours[1], DEPTH, 0.5)],
            "height": 40,
            "width": 24,
        },
        steps=2,
        pixels=False,
    )


def test_a_t2i_adapter_for_sdxl_on_a_part_of_the_way(tmp_path: Path) -> None:
    base = pairs.make(tmp_path, twins.pipeline_twin("sdxl"))
    theirs = t2i_twin("xl")
    (tmp_path / "adapter").mkdir()
    ours = loaded(theirs, tmp_path / "adapter")
    pair = pairs.as_pipeline(base, StableDiffusionXLAdapterPipeline, adapter=theirs)
    pairs.compare(
        pair,
        ANCESTRAL,
        only_theirs={"image": EDGES, "adapter_conditioning_scale": 0.7, "adapter_conditioning_factor": 0.5},
        only_ours={"controls": [Control(ours, EDGES, 0.7, high=0.5)]},
        steps=4,
        pixels=False,
    )
