"""Memory of a run, told before it starts (``pipeline/estimate.py``, ``peaks.py``)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minidiff
from minidiff import Control, ControlModel, Request, StableDiffusion, fast
from minidiff.config import (
    DDPM_CAT256,
    SD15,
    SDXL,
    CLIPTextConfig,
    ControlConfig,
    ControlNetConfig,
    Level,
    T2IAdapterConfig,
    TAESDConfig,
    UNetConfig,
    VAEConfig,
    text,
)
from minidiff.errors import CheckpointError, ConfigError
from minidiff.models.clip import CLIPText
from minidiff.models.control import ControlNet
from minidiff.models.t2i_adapter import T2IAdapter
from minidiff.models.taesd import TAESD
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE
from minidiff.pipeline.peaks import Peaks
from minidiff.pipeline.unconditional import Unconditional
from tests.support.live import held

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "minidiff" / "assets" / "shapes.safetensors"

SMALL = replace(
    SD15, levels=(text(16, 2), text(32, 2, 2), Level(channels=32)), mid=text(32, 2), groups=4, context_dim=8
)
LINEAR = replace(SMALL, linear_proj=True, mid_layers=1, mid=Level(channels=32))
PIXELS = replace(
    DDPM_CAT256,
    levels=(Level(channels=16), Level(channels=32, attention="self", heads=1)),
    mid=Level(channels=32, attention="self", heads=1),
    groups=4,
)
VAE_SMALL = VAEConfig(channels=(8, 16, 16), groups=4)
TINY = TAESDConfig(width=8, blocks=(1, 2, 0))
CONTROL = ControlNetConfig(**{**vars(SMALL), "hint_widths": (4, 8, 12)})


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def cases(b: int, h: int, w: int) -> dict[str, tuple[Callable[[Peaks], int], Any, Any]]:
    """Each network: what is counted, how it is built, how it is called."""
    x, t, context, three = empty(b, 4, h, w), empty(b), empty(b, 9, 8), empty(b, 3, h, w)
    large, hint, ids = (
        empty(b, 3, 8 * h, 8 * w),
        empty(b, 16, h, w),
        torch.zeros(b, 77, dtype=torch.int64, device="meta"),
    )
    adapter = T2IAdapterConfig(channels=(8, 16, 16))
    clip = CLIPTextConfig(width=32, layers=3, heads=2, mlp=128, vocab=100, end_token=99)
    return {
        "unet": (lambda p: p.unet(SMALL, h, w, 9), lambda: UNet(SMALL), lambda m: m(x, t, context)),
        "linear": (lambda p: p.unet(LINEAR, h, w, 9), lambda: UNet(LINEAR), lambda m: m(x, t, context)),
        "pixels": (lambda p: p.unet(PIXELS, h, w, 0), lambda: UNet(PIXELS), lambda m: m(three, t)),
        "control": (
            lambda p: p.control_net(CONTROL, h, w, 9),
            lambda: ControlNet(CONTROL),
            lambda m: m(x, t, context, hint),
        ),
        "hint": (lambda p: p.hint(CONTROL, h, w), lambda: ControlNet(CONTROL), lambda m: m.hint(three)),
        "adapter": (
            lambda p: p.features(adapter, 8 * h, 8 * w),
            lambda: T2IAdapter(adapter),
            lambda m: m(large),
        ),
        "decoder": (lambda p: p.decoder(VAE_SMALL, h, w), lambda: VAE(VAE_SMALL), lambda m: m.decode(x)),
        "encoder": (lambda p: p.encoder(VAE_SMALL, h, w), lambda: VAE(VAE_SMALL), lambda m: m.encode(three)),
        "tiny decoder": (lambda p: p.decoder(TINY, h, w), lambda: TAESD(TINY), lambda m: m.decode(x)),
        "tiny encoder": (lambda p: p.encoder(TINY, h, w), lambda: TAESD(TINY), lambda m: m.encode(three)),
        "text": (lambda p: p.text_encoder(clip), lambda: CLIPText(clip), lambda m: m(ids)),
    }


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("size", [(1, 64, 48), (3, 44, 60)])
@pytest.mark.parametrize("name", list(cases(1, 8, 8)))
def test_what_is_counted_is_what_is_alive(name: str, size: tuple[int, int, int], copies: bool) -> None:
    """The modules themselves, on the meta device; left out are small things, such as embeddings of the timestep."""
    count, make, call = cases(*size)[name]
    counted, alive = count(Peaks(size[0], copies)), held(make, call, copies)
    assert counted == pytest.approx(alive, rel=0.002)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("mode", ["memory", "low_memory"])
def test_the_estimate_is_what_a_run_takes(mode: str) -> None:
    """In a process of its own; ``scripts/check_estimate.py`` does it at full size."""
    sys.path.insert(0, str(ROOT))
    from scripts.check_estimate import BOUND, compare

    peak, taken, words = compare(BUNDLED, {"height": 256, "width": 256, "num_images": 2}, mode)
    assert peak == pytest.approx(taken, rel=BOUND), words


def test_the_model_that_the_script_makes_can_run(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from scripts.check_estimate import write

    write(8, tmp_path / "model.safetensors")
    made = minidiff.load(tmp_path / "model.safetensors", "cpu").generate(
        "a", steps=1, height=64, width=64, output="latent"
    )
    assert made.shape == (1, 4, 8, 8)


def test_in_words(sd: StableDiffusion) -> None:
    told = sd.estimate(Request("a", num_images=2, height=128, width=128))
    assert str(told).startswith("2 pictures of 128 x 128: ")
    assert f"at the peak ({told.at}); weights" in str(told)
    assert told.peak == told.weights + max(told.activations.values())
    assert set(told.activations) == {"text", "image", "denoising", "decoding"}


def test_what_makes_a_run_larger(sd: StableDiffusion) -> None:
    """Every option that does is counted, and no other."""

    def most(stage: str = "denoising", **asked: Any) -> int:
        return sd.estimate(Request(**{"prompt": "a", **asked})).activations[stage]

    plain = most()
    assert most(steps=3) == most(seed=1) == most(guidance_scale=9) == plain
    assert 1.6 * most(guidance_scale=1) < plain
    assert most(num_images=3) > 2.5 * plain
    assert most(prompt=["a", "b", "c"]) == most(num_images=3)
    assert most(height=128) > 1.8 * plain
    assert most(prompt="a AND b AND c", prompt_style="a1111") > 1.8 * plain
    assert most(prompt="a AND b AND c") == plain
    assert most("image") == 0 < most("image", image=Image.new("RGB", (64, 64)))
    assert most("decoding", num_images=4) > 3 * most("decoding")
    fast.optimize(sd, ("vae_slices", "halves"))
    assert most("decoding", num_images=4) < 2 * most("decoding", num_images=1)
    assert most() < 0.7 * plain
    fast.restore(sd)
    large = {"height": 512, "width": 512, "num_images": 64}
    denoised, decoded = most(**large), most("decoding", **large)
    fast.optimize(sd, ("groups",))
    assert most(**large) < 0.9 * denoised
    assert most("decoding", **large) < 0.5 * decoded
    assert most() == plain
    fast.restore(sd)
    whole = most("decoding", height=512, width=512)
    fast.tiled(sd, 16)
    assert most("decoding", height=512, width=512) < 0.5 * whole
    fast.restore(sd)


def test_controls_count(sd: StableDiffusion) -> None:
    widths = (4,) * sd.vae.config.factor.bit_length()
    config = ControlNetConfig(**{**vars(sd.unet.config), "hint_widths": widths})
    net = ControlModel(ControlConfig(family="control", control=config), {"control": ControlNet(config)})
    control = Control(net, Image.new("RGB", (64, 64)))
    plain, one, two = (sd.estimate(Request("a", controls=[control] * n)) for n in range(3))
    assert plain.activations["denoising"] < one.activations["denoising"] < two.activations["denoising"]
    weights = sum(p.numel() * 4 for p in net.net.parameters())
    assert (one.weights, two.weights) == (plain.weights + weights, plain.weights + weights)


def test_from_a_path(sd: StableDiffusion, tmp_path: Path) -> None:
    """The weights are not read: a file that ends after its header would do, if opening did not look at its length."""
    request = Request("a", num_images=2)
    path = tmp_path / "wide.safetensors"
    sd.save(path)
    told = minidiff.estimate(path, request, "cpu")
    assert told.mapped
    assert told == StableDiffusion.load(path, "cpu").estimate(request)
    assert told.peak < minidiff.estimate(path, request, "cpu", copy=True).peak == sd.estimate(request).peak
    turns = minidiff.estimate(path, request, "cpu", low_memory=True)
    assert turns.peak < told.peak
    assert turns == StableDiffusion.load(path, "cpu", low_memory=True).estimate(request)
    half = minidiff.estimate(path, request, "cpu", torch.bfloat16)
    assert not half.mapped
    assert half.weights == pytest.approx(told.weights / 2, rel=0.01)


def test_switches_keep_the_weights(sd: StableDiffusion) -> None:
    before = sd.estimate(Request("a"))
    fast.optimize(sd, ("packed",))
    assert sd.estimate(Request("a")).weights == before.weights
    fast.restore(sd)


def test_models_without_text(ddpm: Unconditional) -> None:
    told = ddpm.estimate(Request(None, num_images=2))
    assert told.activations["text"] == told.activations["image"] == 0 < told.activations["denoising"]


def test_what_has_no_estimate(sd: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="height"):
        sd.estimate(Request("a", height=9))
    with pytest.raises(CheckpointError):
        minidiff.estimate(tmp_path / "none.safetensors", Request("a"))


def test_published_sizes() -> None:
    """Stable Diffusion 1.5 and SDXL, by hand: the feed-forward of the finest transformer is the peak."""
    area = 64 * 64
    skips = 3 * 320 * area + 320 * area // 4 + 640 * area // 4 * 2
    one = Peaks(1, copies=False).unet(SD15, 64, 64, 77)
    assert one >= 18 * 320 * area
    assert one <= (19 + 3) * 320 * area + skips + 3 * 640 * area
    assert Peaks(2, copies=False).unet(SD15, 64, 64, 77) == 2 * one
    assert isinstance(SDXL, UNetConfig)
    assert Peaks(1).unet(SDXL, 128, 128, 77) > one
