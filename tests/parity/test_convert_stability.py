"""Single files of SD2, SDXL and the inpainting models: the same model as from the folder of the same twin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import weights_convert
from minidiff import CheckpointError, ConfigError
from tests.support.parity import twins
from tests.support.parity.ldm import original_sd1
from tests.support.parity.stability import bare, open_clip, original
from tests.tolerances import assert_close

UNMAPPED = re.compile(r"position_ids|logit_scale|betas|alphas_cumprod|denoiser")  # what follows from the config
HEADS = [{"heads": h} for h in (2, 4, 8)]
COMMON: dict[str, Any] = {"unet": {"groups": 8, "sample_size": 8}, "vae": {"groups": 8, "sample_size": 32}}


def single(kind: str, pipe: Any) -> dict[str, torch.Tensor]:
    """The twin's weights as its family's single file."""
    unet, vae = pipe.unet.state_dict(), pipe.vae.state_dict()
    if kind in ("sd1", "inpaint", "lcm"):
        plain = {k: t for k, t in unet.items() if k != "time_embedding.cond_proj.weight"}
        found = original_sd1(plain, vae, pipe.text_encoder.state_dict(), levels=3)
        if kind == "lcm":  # the one tensor more of a UNet that is told the guidance scale
            found["model.diffusion_model.time_embed.cond_proj.weight"] = unet["time_embedding.cond_proj.weight"]
        return found
    if kind.startswith("sd2"):
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
    """The settings of a twin that shapes can't tell."""
    if kind in ("sd1", "inpaint", "lcm"):
        levels: dict[str, Any] = {"levels": [{"heads": 4}, {"heads": 4}, {}], "mid": {"heads": 4}}
        return {"unet": {**COMMON["unet"], **levels}, "vae": COMMON["vae"], "text_encoder": {"heads": 4}}
    level = (
        {"levels": [*HEADS[:2], {}], "mid": HEADS[2]}
        if kind.startswith("sd2")
        else {"levels": [{}, *HEADS[1:]], "mid": HEADS[2]}
    )
    if kind == "refiner":
        level["levels"] = [{}, HEADS[1], {}]
    found: dict[str, Any] = {"unet": {**COMMON["unet"], **level}, "vae": COMMON["vae"]}
    if kind.startswith("sd2"):
        return found | {"text_encoder": {"heads": 5}}
    found["unet"]["added_sinusoid"] = 8
    found["text_encoder_2"] = {"heads": 6}
    return found if kind == "refiner" else found | {"text_encoder": {"heads": 4}}


@pytest.mark.parametrize("kind", ["inpaint", "sd2", "sd2_inpaint", "sdxl", "sdxl_inpaint", "refiner"])
def test_single_file(tmp_path: Path, kind: str) -> None:
    pipe = twins.folder_twin(tmp_path / "folder", kind)
    save_file(single(kind, pipe), tmp_path / "one.safetensors")
    plain = weights_convert.open_source(tmp_path / "folder")
    config = told(kind)
    if kind.startswith("sd2"):
        config["schedule"] = {"prediction": "epsilon"}
    found = weights_convert.open_source(tmp_path / "one.safetensors", config=config)
    assert found.config == plain.config
    assert found.tensors.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert_close(found.tensors[name].load(), tensor.load(), where=name)
    dropped = {name: count for name, count, _ in found.report.dropped}
    if kind.startswith("sd2"):
        assert dropped["unused last layer"] == 12
        assert dropped["attention mask"] == dropped["contrastive scale"] == dropped["unused projection"] == 1
    assert found.report.evidence


def test_bare_text_encoders(tmp_path: Path) -> None:
    """SDXL's two encoders from bare files, in transformers' names and OpenCLIP's, under the prefixes that go about."""
    twins.folder_twin(tmp_path / "folder", "sdxl")
    weights_convert.convert(tmp_path / "folder", tmp_path / "model.safetensors")
    first, second = (twins.clip_twin(kind, seed=9) for kind in ("l", "bigg"))
    small, large = bare(first.state_dict()), bare(second.state_dict())
    bare_clip = open_clip(large, "x", extra_layer=False)
    pictures = {"visual.transformer.resblocks.0.ln_1.weight": torch.ones(8), "visual.proj": torch.ones(8, 8)}
    files: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
        "transformers": ("text_encoder", {f"text_model.{k}": t for k, t in small.items()}),
        "inside SDXL": (
            "text_encoder",
            {f"conditioner.embedders.0.transformer.text_model.{k}": t for k, t in small.items()},
        ),
        "transformers, no prefix": ("text_encoder_2", large),
        "clip_g": (
            "text_encoder_2",
            {k if k.startswith("text_projection") else f"text_model.{k}": t for k, t in large.items()},
        ),
        "whole OpenCLIP": ("text_encoder_2", {k[2:]: t for k, t in bare_clip.items()} | pictures),
        **{
            f"OpenCLIP {prefix}": ("text_encoder_2", {f"{prefix}{k[2:]}": t for k, t in bare_clip.items()})
            for prefix in ("", "model.", "cond_stage_model.model.", "text_model.", "conditioner.embedders.1.model.")
        },
        "another SDXL": (
            "text_encoder_2",
            {f"conditioner.embedders.0.transformer.text_model.{k}": t for k, t in small.items()}
            | {f"conditioner.embedders.1.model.{k[2:]}": t for k, t in bare_clip.items()},
        ),
    }
    plain = weights_convert.open_source(tmp_path / "model.safetensors")
    for name, (part, tensors) in files.items():
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "part.safetensors")
        found = weights_convert.open_source(tmp_path / "model.safetensors", swap={part: tmp_path / "part.safetensors"})
        assert found.config == plain.config, name
        wanted = twins.ours(first if part == "text_encoder" else second).state_dict()
        for key, tensor in found.tensors.items():
            own = key.removeprefix(f"{part}.")
            want = plain.tensors[key].load() if own == key else wanted[own]
            assert_close(tensor.load(), want, where=f"{name}: {key}")
        assert ("OpenCLIP layout" in str(found.report)) == ("OpenCLIP" in name or name == "another SDXL"), name


def test_an_openclip_encoder_for_sd2(tmp_path: Path) -> None:
    """The file has the layer that SD2 does not read, and a projection."""
    pipe = twins.folder_twin(tmp_path / "folder", "sd2")
    other = twins.clip_twin("h", seed=9)
    tensors = open_clip(other.state_dict(), "x", extra_layer=True)
    save_file({k[2:]: t.contiguous() for k, t in tensors.items()}, tmp_path / "h.safetensors")
    found = weights_convert.open_source(tmp_path / "folder", swap={"text_encoder": tmp_path / "h.safetensors"})
    wanted = twins.ours(other).state_dict()
    for key, tensor in wanted.items():
        assert_close(found.tensors[f"text_encoder.{key}"].load(), tensor, where=key)
    dropped = {name: count for name, count, _ in found.report.dropped}
    assert dropped["unused last layer"] == 12
    save_file({k: t.contiguous() for k, t in pipe.unet.state_dict().items()}, tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="holds no text_encoder in a known form"):
        weights_convert.open_source(tmp_path / "folder", swap={"text_encoder": tmp_path / "unet.safetensors"})


def test_v_prediction_must_be_said(tmp_path: Path) -> None:
    scheduler = DDIMScheduler(
        **twins.SCALED_LINEAR, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    pipe = twins.folder_twin(tmp_path / "folder", "sd2", scheduler=scheduler)
    save_file(single("sd2", pipe), tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match="does not say what its model predicts; give --prediction"):
        weights_convert.open_source(tmp_path / "one.safetensors", config=told("sd2"))
    plain = weights_convert.open_source(tmp_path / "folder").config
    config = told("sd2") | {"schedule": {"prediction": "v_prediction"}}
    for given in ({"config": config}, {"config": told("sd2"), "prediction": "v_prediction"}):
        found = weights_convert.open_source(tmp_path / "one.safetensors", **given).config
        assert (found.schedule, found.sampler) == (plain.schedule, plain.sampler)
        assert found.unet.upcast_attention  # 768-v overflows in float16


def test_a_single_file_of_lcm(tmp_path: Path) -> None:
    """Known by the projection of the guidance scale; its sampler must be said. There and back it is the same file."""
    pipe = twins.folder_twin(tmp_path / "folder", "lcm")
    tensors, one = single("lcm", pipe), tmp_path / "one.safetensors"
    save_file(tensors, one)
    found = weights_convert.detect(one)
    assert found.family == "sd1-lcm"
    assert any("time_embed.cond_proj.weight" in line for line in found.evidence)
    with pytest.raises(ConfigError, match=r"distilled for few steps.*give --sampler"):
        weights_convert.open_source(one, config=told("lcm"))
    source = weights_convert.open_source(one, config=told("lcm"), sampler="lcm")
    plain = weights_convert.open_source(tmp_path / "folder")
    assert source.config.unet == plain.config.unet
    assert source.config.schedule == plain.config.schedule
    assert source.config.sampler == {"name": "lcm"}
    for name, tensor in plain.tensors.items():
        assert_close(source.tensors[name].load(), tensor.load(), where=name)
    weights_convert.convert(one, tmp_path / "ours.safetensors", config=told("lcm"), sampler="lcm")
    weights_convert.convert(tmp_path / "ours.safetensors", tmp_path / "two.safetensors", to="original")
    back = load_file(tmp_path / "two.safetensors")
    assert tensors.keys() - back.keys() == {k for k in tensors if UNMAPPED.search(k)}
    for name, tensor in back.items():
        assert_close(tensor, tensors[name], where=name)
    weights_convert.convert(tmp_path / "two.safetensors", tmp_path / "again.safetensors")  # its header says the sampler
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()


def test_markers_of_v_prediction_and_zero_snr(tmp_path: Path) -> None:
    """Two keys say what a folder's scheduler config would: nobody has to be asked, and the trip keeps them."""
    scheduler = EulerDiscreteScheduler(
        **twins.SCALED_LINEAR,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    pipe = twins.folder_twin(tmp_path / "folder", "sdxl", scheduler=scheduler)
    tensors = single("sdxl", pipe) | {"v_pred": torch.zeros(0), "ztsnr": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "one.safetensors")
    found = weights_convert.open_source(tmp_path / "one.safetensors", config=told("sdxl"))
    plain = weights_convert.open_source(tmp_path / "folder")
    assert found.config == plain.config
    assert (found.config.schedule.prediction, found.config.schedule.zero_snr) == ("v_prediction", True)
    said = str(found.report)
    assert "has the marker 'v_pred': its model predicts v" in said
    assert "has the marker 'ztsnr'" in said
    weights_convert.convert(tmp_path / "one.safetensors", tmp_path / "ours.safetensors", config=told("sdxl"))
    report = weights_convert.convert(tmp_path / "ours.safetensors", tmp_path / "two.safetensors", to="original")
    assert "markers 'v_pred' and 'ztsnr'" in str(report)
    back = load_file(tmp_path / "two.safetensors")
    assert tensors.keys() - back.keys() == {k for k in tensors if UNMAPPED.search(k)}
    assert back["v_pred"].shape == back["ztsnr"].shape == (0,)
    with pytest.raises(ConfigError, match=r"has the marker 'v_pred'.*prediction='epsilon' was given"):
        weights_convert.open_source(tmp_path / "one.safetensors", config=told("sdxl"), prediction="epsilon")


def of(root: str, *names: str) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(root)}\.({'|'.join(names)})")


@pytest.mark.parametrize("lacking", [("transformer.resblocks.3.*",), ("text_projection", "logit_scale", "attn_mask")])
@pytest.mark.parametrize("both", [False, True])
def test_sd2_without_what_it_does_not_read(tmp_path: Path, lacking: tuple[str, ...], both: bool) -> None:
    """As diffusers' converter and minidiff write it: without the layer that SD2 doesn't read. The same model."""
    pipe = twins.pipeline_twin("sd2")
    whole, root = single("sd2", pipe), "cond_stage_model.model"
    unread = of(root, *(("transformer.resblocks.3.*", "text_projection", "logit_scale") if both else lacking))
    less = {k: t.contiguous() for k, t in whole.items() if not unread.fullmatch(k)}
    assert len(less) < len(whole)
    save_file({k: t.contiguous() for k, t in whole.items()}, tmp_path / "whole.safetensors")
    save_file(less, tmp_path / "less.safetensors")
    config = told("sd2")
    want, found = (
        weights_convert.open_source(tmp_path / f"{name}.safetensors", config=config, prediction="epsilon")
        for name in ("whole", "less")
    )
    assert want.config.text_encoder is not None
    assert want.config.text_encoder.layers == 3
    assert found.config == want.config
    for name, tensor in want.tensors.items():
        assert_close(found.tensors[name].load(), tensor.load(), where=name)
    assert ("all 3 layers are read" in str(found.report)) == (both or len(lacking) == 1)
    pictures = [
        weights_convert.load(tmp_path / f"{name}.safetensors", config=config, prediction="epsilon").generate(
            "a fox", steps=2, seed=0, output="latent", progress=False
        )
        for name in ("whole", "less")
    ]
    assert_close(pictures[1], pictures[0])


def test_sd2_there_and_back_without_its_header(tmp_path: Path) -> None:
    """What minidiff exports is read by other programs' rules as well: the header may be lost on the way."""
    pipe = twins.folder_twin(tmp_path / "folder", "sd2")
    weights_convert.convert(tmp_path / "folder", tmp_path / "ours.safetensors")
    weights_convert.convert(tmp_path / "ours.safetensors", tmp_path / "export.safetensors", to="original")
    save_file(load_file(tmp_path / "export.safetensors"), tmp_path / "bare.safetensors")
    assert pipe.text_encoder.config.num_hidden_layers == 3
    for name, options in (("export", {}), ("bare", {"config": told("sd2"), "prediction": "epsilon"})):
        weights_convert.convert(tmp_path / f"{name}.safetensors", tmp_path / "again.safetensors", **options)
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes(), name


@pytest.mark.parametrize("layer", [True, False])
def test_sd_turbo(tmp_path: Path, layer: bool) -> None:
    """SD2's parts in the layout of SDXL: no refiner, and read as its folder is, with the timesteps it needs."""
    scheduler = EulerDiscreteScheduler(**twins.SCALED_LINEAR, timestep_spacing="trailing", steps_offset=1)
    pipe = twins.folder_twin(tmp_path / "folder", "sd2", scheduler=scheduler)
    texts = open_clip(pipe.text_encoder.state_dict(), "conditioner.embedders.0.model", extra_layer=layer)
    tensors = original(pipe.unet.state_dict(), pipe.vae.state_dict(), texts) | {"denoiser.sigmas": torch.ones(1000)}
    one = tmp_path / "one.safetensors"
    save_file({k: t.contiguous() for k, t in tensors.items()}, one)
    found = weights_convert.detect(one)
    assert found.family == "sd2"
    assert "relative of SD-Turbo" in str(found)
    with pytest.raises(ConfigError, match=r"does not say what its model predicts; give --prediction.*SD-Turbo"):
        weights_convert.open_source(one, config=told("sd2"))
    source = weights_convert.open_source(one, config=told("sd2"), prediction="epsilon")
    plain = weights_convert.open_source(tmp_path / "folder")
    assert source.config == plain.config
    assert "SD-Turbo" in str(source.report)
    for name, tensor in plain.tensors.items():
        assert_close(source.tensors[name].load(), tensor.load(), where=name)
    other = weights_convert.open_source(one, config=told("sd2"), prediction="epsilon", sampler="ddim")
    assert other.config.sampler["name"] == "ddim"


@pytest.mark.parametrize("kind", ["sd1", "inpaint", "sd2", "sd2_inpaint", "sdxl", "sdxl_inpaint", "refiner", "lcm"])
def test_a_unet_alone_with_the_rest_from_elsewhere(tmp_path: Path, kind: str) -> None:
    """Its family is told by its shapes; parts from the folder, in whose names they differ from a single file's."""
    pipe = twins.folder_twin(tmp_path / "folder", kind)
    tensors = single(kind, pipe)
    save_file({k: t.contiguous() for k, t in tensors.items() if k.startswith("model.")}, tmp_path / "unet.safetensors")
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "one.safetensors")
    config: dict[str, Any] = told(kind) | {"schedule": {"prediction": "epsilon"}}
    options: dict[str, Any] = {"sampler": "lcm"} if kind == "lcm" else {}
    want = weights_convert.open_source(tmp_path / "one.safetensors", config=config, **options)
    parts = [name for name in ("vae", "text_encoder", "text_encoder_2") if getattr(want.config, name) is not None]
    for given in ("folder", "files"):
        swap = dict.fromkeys(parts, tmp_path / "folder")
        if given == "files":
            weights = {"vae": "diffusion_pytorch_model"}
            swap = {n: tmp_path / "folder" / n / f"{weights.get(n, 'model')}.safetensors" for n in parts}
        for options["swap"] in (swap, {**swap, "vae": tmp_path / "one.safetensors"}):
            found = weights_convert.open_source(tmp_path / "unet.safetensors", config=config, **options)
            assert found.config == want.config, given
            assert found.tensors.keys() == want.tensors.keys()
            for name, tensor in want.tensors.items():
                assert_close(found.tensors[name].load(), tensor.load(), where=f"{given}: {name}")
    with pytest.raises(CheckpointError, match=f"the VAE and .*--{parts[-1].replace('_', '-')} PATH"):
        weights_convert.open_source(tmp_path / "unet.safetensors", config=config)
