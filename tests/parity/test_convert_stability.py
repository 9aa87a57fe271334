"""Single files of SD2, SDXL and the inpainting models: the same model as from the folder of the same twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

import weights_convert
from minidiff import ConfigError
from tests.parity import twins
from tests.parity.ldm import original_sd1
from tests.parity.stability import bare, open_clip, original
from tests.tolerances import assert_close

HEADS = [{"heads": h} for h in (2, 4, 8)]
COMMON: dict[str, Any] = {"unet": {"groups": 8, "sample_size": 8}, "vae": {"groups": 8, "sample_size": 32}}


def single(kind: str, pipe: Any) -> dict[str, torch.Tensor]:
    """The twin's weights as its family's single file."""
    unet, vae = pipe.unet.state_dict(), pipe.vae.state_dict()
    if kind in ("sd1", "inpaint"):
        return original_sd1(unet, vae, pipe.text_encoder.state_dict(), levels=3)
    if kind == "sd2":
        texts = open_clip(pipe.text_encoder.state_dict(), "cond_stage_model.model", extra_layer=True)
        texts["cond_stage_model.model.attn_mask"] = torch.zeros(77, 77)
        return original(unet, vae, texts)
    second = pipe.text_encoder_2.state_dict()
    if kind == "refiner":
        return original(unet, vae, open_clip(second, "conditioner.embedders.0.model", extra_layer=False))
    root = "conditioner.embedders.0.transformer.text_model"
    texts = {f"{root}.{k}": t for k, t in bare(pipe.text_encoder.state_dict()).items()}
    texts[f"{root}.embeddings.position_ids"] = torch.arange(77)[None]
    texts |= open_clip(second, "conditioner.embedders.1.model", extra_layer=False)
    return original(unet, vae, texts) | {"denoiser.sigmas": torch.linspace(0, 14.6, 1000)}


def told(kind: str) -> dict[str, Any]:
    """What shapes can't tell of a twin."""
    if kind in ("sd1", "inpaint"):
        levels: dict[str, Any] = {"levels": [{"heads": 4}, {"heads": 4}, {}], "mid": {"heads": 4}}
        return {"unet": {**COMMON["unet"], **levels}, "vae": COMMON["vae"], "text_encoder": {"heads": 4}}
    level = (
        {"levels": [*HEADS[:2], {}], "mid": HEADS[2]}
        if kind == "sd2"
        else {"levels": [{}, *HEADS[1:]], "mid": HEADS[2]}
    )
    if kind == "refiner":
        level["levels"] = [{}, HEADS[1], {}]
    found: dict[str, Any] = {"unet": {**COMMON["unet"], **level}, "vae": COMMON["vae"]}
    if kind == "sd2":
        return found | {"text_encoder": {"heads": 5}}
    found["unet"]["added_sinusoid"] = 8
    found["text_encoder_2"] = {"heads": 6}
    return found if kind == "refiner" else found | {"text_encoder": {"heads": 4}}


@pytest.mark.parametrize("kind", ["inpaint", "sd2", "sdxl", "sdxl_inpaint", "refiner"])
def test_single_file(tmp_path: Path, kind: str) -> None:
    pipe = twins.folder_twin(tmp_path / "folder", kind)
    save_file(single(kind, pipe), tmp_path / "one.safetensors")
    plain = weights_convert.open_source(tmp_path / "folder")
    config = told(kind)
    if kind == "sd2":
        config["schedule"] = {"prediction": "epsilon"}
    found = weights_convert.open_source(tmp_path / "one.safetensors", config=config)
    assert found.config == plain.config
    assert found.tensors.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert_close(found.tensors[name].load(), tensor.load(), where=name)
    dropped = {name: count for name, count, _ in found.report.dropped}
    if kind == "sd2":
        assert dropped["unused last layer"] == 12
        assert dropped["attention mask"] == dropped["contrastive scale"] == dropped["unused projection"] == 1
    assert found.report.evidence


def test_v_prediction_must_be_said(tmp_path: Path) -> None:
    scheduler = DDIMScheduler(
        **twins.SCALED_LINEAR, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    pipe = twins.folder_twin(tmp_path / "folder", "sd2", scheduler=scheduler)
    save_file(single("sd2", pipe), tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match="does not say what its model predicts; give --config"):
        weights_convert.open_source(tmp_path / "one.safetensors", config=told("sd2"))
    config = told("sd2") | {"schedule": {"prediction": "v_prediction"}}
    found = weights_convert.open_source(tmp_path / "one.safetensors", config=config).config
    plain = weights_convert.open_source(tmp_path / "folder").config
    assert (found.schedule, found.sampler) == (plain.schedule, plain.sampler)
    assert found.unet.upcast_attention  # 768-v overflows in float16
