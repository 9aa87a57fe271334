"""Full-size manifests, with no weights: every key and shape of the public layouts maps one to one, and the totals are
the published ones.

The original layout is written down in ``layouts.py``; the diffusers layout is the reference's own modules on the meta
device, made from the published configs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from minidiff import config as c
from minidiff.cli.description import size_table
from minidiff.storage.files import Lazy
from tests.parity.test_convert_keys import CASES, SD15, SD21, SDXL, VAE
from tests.support.parity import layouts
from weights_convert import configs_diffusers as configs
from weights_convert import keys_diffusers, keys_original
from weights_convert.component import meta_model
from weights_convert.configs_out import config_json
from weights_convert.engine import Module, expand

REFINER = SDXL | {
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
# Name: the published config, the original yaml, tensors, parameters. Those of SD1.5 and SDXL are published (860 M and
# 2.6 B in papers and cards); the others follow from the published definitions, here from two that are independent.
UNETS: dict[str, tuple[dict[str, Any], layouts.UNetYaml, int, int]] = {
    "sd15": (SD15, layouts.SD15, 686, 859_520_964),
    "sd15-inpainting": (SD15 | {"in_channels": 9}, layouts.SD15_INPAINTING, 686, 859_535_364),
    "sd21": (SD21, layouts.SD21, 686, 865_910_724),
    "sd2-inpainting": (SD21 | {"in_channels": 9, "sample_size": 64}, layouts.SD2_INPAINTING, 686, 865_925_124),
    "sdxl": (SDXL, layouts.SDXL, 1680, 2_567_463_684),
    "refiner": (REFINER, layouts.REFINER, 1220, 2_259_526_660),
}
TEXTS = {"clip_l": (196, 123_060_480), "clip_h": (372, 340_387_840), "clip_bigg": (517, 694_659_840)}


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(p.shape) for k, p in model.state_dict().items()}


def one_to_one(modules: Iterable[Module], config: Any, theirs: Mapping[str, tuple[int, ...]]) -> None:
    """Every key over there has exactly one of ours, of the shape that its form says, and none is left over."""
    model = meta_model(config)
    mine, pairs = shapes(model), expand(modules, model)
    assert len({p.theirs for p in pairs}) == len({p.ours for p in pairs}) == len(pairs) == len(theirs)
    assert {p.theirs: p.form.stored(mine[p.ours]) for p in pairs} == theirs


def printed(config: Any, part: str) -> tuple[int, int]:
    """Tensors and parameters as `minidiff info` prints them."""
    lazies = {
        f"{part}.{k}": Lazy(s, torch.float16, lambda: torch.empty(0)) for k, s in shapes(meta_model(config)).items()
    }
    row = next(line for line in size_table(lazies).splitlines() if line.startswith(part)).split()
    return int(row[1].replace(",", "")), int(row[2].replace(",", ""))


def read(options: dict[str, Any]) -> c.UNetConfig:
    return configs.unet(configs.Options({**options, "_class_name": "UNet2DConditionModel"}, "manifest"))


@pytest.mark.parametrize("name", UNETS)
def test_unet_of_the_original_layout(name: str) -> None:
    options, yaml, count, parameters = UNETS[name]
    keys = layouts.unet(yaml)
    assert (len(keys), sum(map(prod, keys.values()))) == (count, parameters)
    config = read(options)
    one_to_one(keys_original.unet(config), config, keys)
    assert printed(config, "unet") == (count, parameters)


@pytest.mark.parametrize("name", UNETS)
def test_unet_of_the_diffusers_layout(name: str) -> None:
    options, _, count, parameters = UNETS[name]
    with torch.device("meta"):
        theirs = shapes(UNet2DConditionModel(**options))
    assert (len(theirs), sum(map(prod, theirs.values()))) == (count, parameters)
    one_to_one(keys_diffusers.unet(read(options)), read(options), theirs)


@pytest.mark.parametrize("name", UNETS)
def test_the_config_is_written_as_it_was_published(name: str) -> None:
    """What the exporter writes has the options that tell the families apart, and makes the same modules over there."""
    options = UNETS[name][0]
    written = config_json(read(options))
    skipped = {"upcast_attention"}  # a precision, not a model
    if name == "refiner":
        skipped.add("transformer_layers_per_block")  # one number for all levels; with a list, those without say 1
    for key in options.keys() - skipped:
        assert written[key] == options[key], key
    with torch.device("meta"):
        known = {k: v for k, v in written.items() if not k.startswith("_")}
        assert shapes(UNet2DConditionModel(**known)) == shapes(UNet2DConditionModel(**options))


def test_vae_of_both_layouts() -> None:
    keys = layouts.vae()
    assert (len(keys), sum(map(prod, keys.values()))) == (248, 83_653_863) == printed(c.VAE_SD, "vae")
    one_to_one(keys_original.vae(c.VAE_SD), c.VAE_SD, keys)
    with torch.device("meta"):
        one_to_one(keys_diffusers.vae(c.VAE_SD), c.VAE_SD, shapes(AutoencoderKL(**VAE)))


def test_text_encoder_of_the_original_layout() -> None:
    keys = layouts.clip_l()
    assert (len(keys), sum(map(prod, keys.values()))) == TEXTS["clip_l"]
    one_to_one(keys_original.clip(c.CLIP_L), c.CLIP_L, keys)


@pytest.mark.parametrize("name", TEXTS)
def test_text_encoder_totals(name: str) -> None:
    """The keys are held against the reference's in test_convert_keys.py; here are the totals."""
    assert printed(CASES[name][2], "text_encoder") == TEXTS[name]


@pytest.mark.parametrize(
    ("width", "layers", "ours", "unused"),
    [
        # SD2 leaves out the last of 24 layers, and reads neither the projection nor the scale.
        (1024, 24, c.OPENCLIP_H, 12 * 1024**2 + 13 * 1024 + 1024**2 + 1),
        (1280, 32, c.OPENCLIP_BIGG, 1),
    ],
    ids=["h", "bigg"],
)
def test_open_clip_totals(width: int, layers: int, ours: c.CLIPTextConfig, unused: int) -> None:
    """What OpenCLIP's text tower has beyond ours is known to the last parameter."""
    theirs = layouts.open_clip("", width, layers)
    assert sum(map(prod, theirs.values())) == printed(ours, "text_encoder")[1] + unused


def test_whole_checkpoints() -> None:
    """Stable Diffusion 1.5 has 1,066,235,307 parameters, in 1,130 tensors."""
    whole = {**layouts.unet(layouts.SD15), **layouts.vae(), **layouts.clip_l()}
    assert (len(whole), sum(map(prod, whole.values()))) == (1130, 1_066_235_307)
