"""Low-memory models: equal pictures, with one part in memory at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minidiff
import weights_convert
from minidiff import cli, fast
from minidiff.adapters import lora
from minidiff.adapters import words as embeddings
from minidiff.adapters.lora import Adapter, Update
from minidiff.adapters.words import Word
from minidiff.cli import generate
from minidiff.config import CLIPTextConfig, VAEConfig, text
from minidiff.errors import ConfigError, MinidiffError
from minidiff.pipeline import StableDiffusion, Unconditional, random_model
from tests.support.tiny import SD, tiny_ddpm, tiny_sd, tiny_xl

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tiny_sd().save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def opened(path: Path, **options: Any) -> StableDiffusion:
    found = minidiff.load(path, "cpu", low_memory=True, **options)
    assert isinstance(found, StableDiffusion)
    return found


def drawn(pipe: StableDiffusion | Unconditional, **options: Any) -> Tensor:
    given = {"seed": 1, "steps": 2, "output": "tensor", "progress": False, **options}
    found: Tensor = pipe.generate("a horse", **given) if isinstance(pipe, StableDiffusion) else pipe.generate(**given)
    return found


def weight_bytes(pipe: StableDiffusion, name: str) -> int:
    """The bytes that the weights of a part take in memory."""
    return sum(p.untyped_storage().nbytes() for p in pipe.parts[name].parameters())


def in_memory(pipe: StableDiffusion) -> list[str]:
    return [name for name in pipe.parts if weight_bytes(pipe, name) > 8 * len(list(pipe.parts[name].parameters()))]


@pytest.mark.parametrize("make", [tiny_sd, tiny_xl, tiny_ddpm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits(make: Callable[[], Any], dtype: torch.dtype, tmp_path: Path) -> None:
    make().save(tmp_path / "model.safetensors")
    plain = minidiff.load(tmp_path / "model.safetensors", "cpu", dtype)
    turning = minidiff.load(tmp_path / "model.safetensors", "cpu", dtype, low_memory=True)
    assert (turning.dtype, turning.device, turning.hash) == (plain.dtype, plain.device, plain.hash)
    assert torch.equal(drawn(turning), drawn(plain))
    assert torch.equal(drawn(turning, seed=2), drawn(plain, seed=2)), "a second time"


def test_the_same_bits_from_a_picture(path: Path) -> None:
    """The VAE's turn comes twice."""
    picture = {"image": torch.rand(1, 3, 64, 64), "strength": 0.9}
    assert torch.equal(drawn(opened(path), **picture), drawn(minidiff.load(path, "cpu"), **picture))


def test_another_layout(path: Path, tmp_path: Path) -> None:
    weights_convert.convert(path, tmp_path / "folder", to="diffusers")
    turning = weights_convert.load(tmp_path / "folder", "cpu", low_memory=True)
    assert in_memory(turning) == []  # type: ignore[arg-type]
    assert torch.equal(drawn(turning), drawn(minidiff.load(path, "cpu")))


def test_one_part_is_in_memory(path: Path) -> None:
    sd = opened(path)
    assert in_memory(sd) == []
    run = sd.steps("a horse", steps=2, seed=0)
    assert in_memory(sd) == ["text_encoder"]
    step = next(run)
    assert in_memory(sd) == ["unet"]
    step = run.last()
    assert in_memory(sd) == ["unet"]
    sd.decode(step.x)
    assert in_memory(sd) == ["vae"]


def test_the_text_encoders_of_sdxl_share_a_turn(tmp_path: Path) -> None:
    """Prompt and negative prompt go through both: each is read once."""
    tiny_xl().save(tmp_path / "model.safetensors")
    sd = opened(tmp_path / "model.safetensors")
    sd.steps("a horse", "a cow", steps=2, seed=0)
    assert in_memory(sd) == ["text_encoder", "text_encoder_2"]


def test_saved_whole(path: Path, tmp_path: Path) -> None:
    sd = opened(path)
    drawn(sd)
    sd.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_with_switches_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches are put on parts at rest, and weights packed anew whenever a part's turn comes."""
    monkeypatch.setattr("minidiff.fast.packed.SMALLEST", 1)
    plain, sd = minidiff.load(path, "cpu"), opened(path)
    on = fast.optimize(sd)
    assert on == fast.optimize(plain)
    for _ in range(2):
        assert torch.equal(drawn(sd), drawn(plain))
        assert not any(p.is_mkldnn for p in sd.unet.parameters())
        assert any(p.is_mkldnn for p in sd.vae.parameters())
    fast.restore(sd)
    fast.restore(plain)
    assert torch.equal(drawn(sd), drawn(plain))


def test_what_was_made_of_weights_goes_with_them(path: Path) -> None:
    class Laid:
        def __init__(self, layer: torch.nn.Conv2d) -> None:
            self.layer, self.kept = layer, 0

        def __call__(self, x: Tensor) -> Tensor:
            self.kept += 1
            return torch.nn.Conv2d.forward(self.layer, x)

        def forget(self) -> None:
            self.kept = 0

    sd = opened(path)
    sd.unet.conv_in.forward = laid = Laid(sd.unet.conv_in)  # type: ignore[method-assign,assignment]
    step = sd.steps("a horse", steps=2, seed=0).last()
    assert laid.kept > 0
    sd.decode(step.x)
    assert laid.kept == 0


# --- what cannot be done ----------------------------------------------------------------------------------------------


def test_adapters_words_and_moves_need_the_whole_model(path: Path) -> None:
    sd = opened(path)
    bend = Adapter("ink", {"unet.conv_in": Update(torch.ones(1, 4, 3, 3), torch.ones(16, 1, 1, 1))})
    with pytest.raises(ConfigError, match=r"^ink needs the whole model in memory"):
        lora.apply(sd.parts, [(bend, 1.0)])
    with pytest.raises(ConfigError, match=r"^<cat> needs the whole model in memory"):
        embeddings.add(sd, Word("<cat>", {"text_encoder": torch.ones(1, 16)}))
    with pytest.raises(ConfigError, match="take turns on cpu"):
        sd.to(dtype=torch.float16)


def test_the_module_that_overflows_is_named(tmp_path: Path) -> None:
    """The run that looks for it comes after the UNet was put away."""
    sd = tiny_sd()
    with torch.no_grad():
        sd.vae.decoder.conv_in.weight.fill_(float("inf"))
    sd.save(tmp_path / "model.safetensors")
    with pytest.raises(MinidiffError, match=r"first from vae\.decoder\.conv_in"):
        drawn(opened(tmp_path / "model.safetensors"))
    with torch.no_grad():
        sd.unet.conv_in.weight.fill_(float("inf"))
    sd.save(tmp_path / "model.safetensors")
    with pytest.raises(MinidiffError, match=r"first from unet\.conv_in"):
        drawn(opened(tmp_path / "model.safetensors"))


# --- the command line, and the peak -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_command_takes_turns(
    with_adapter: bool, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless an adapter bends the model; the picture is the same either way."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    asked: list[bool] = []
    load = minidiff.load

    def watched(*args: Any, low_memory: bool) -> Any:
        asked.append(low_memory)
        return load(*args, low_memory=low_memory)

    monkeypatch.setattr(minidiff, "load", watched)
    monkeypatch.setattr(generate, "_teach", lambda *_: None)
    options = ["--model", str(path), "--steps", "2", "--seed", "1", "--device", "cpu", "--quiet"]
    options += ["--lora", "ink.safetensors"] if with_adapter else []
    assert cli.main(["generate", "a horse", *options, "--out", str(tmp_path / "a.png")]) == 0
    assert asked == [not with_adapter]
    whole = load(path, "cpu")
    fast.optimize(whole)  # as the command does; what rounds elsewhere depends on the processor
    wanted = whole.generate("a horse", steps=2, seed=1, progress=False)[0]
    assert torch.equal(pil_to_tensor(Image.open(tmp_path / "a.png")), pil_to_tensor(wanted))


PEAK = """
import json, sys
import minidiff
from minidiff.storage import files

files.FRESH_MAP = 1 << 22  # the file is small, and so are its tensors

def most():  # ru_maxrss would begin with what the process took that started this one
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

path, low_memory = sys.argv[1], sys.argv[2] == "True"
tiny = minidiff.load(sys.argv[3], "cpu")
tiny.generate("a horse", steps=1, seed=0, output="tensor", progress=False)
before = most()
sd = minidiff.load(path, "cpu", low_memory=low_memory)
pixels = sd.generate("a horse", steps=1, seed=0, output="tensor", progress=False)
print(json.dumps({"added": most() - before, "pixels": pixels.double().sum().item()}))
"""
BESIDE = 40e6  # activations of one picture (under 10 MB), the mapped part of the file (4 MB), what malloc keeps


def middling() -> StableDiffusion:
    """337 MB in float32: a text encoder of 127 MB, a UNet of 156, a VAE of 54."""
    config = replace(
        SD,
        unet=replace(SD.unet, levels=(text(192, 4), text(384, 4)), mid=text(384, 4), context_dim=512, groups=32),
        vae=VAEConfig(channels=(64, 128, 192, 256), layers=1, groups=32, sample_size=64),
        text_encoder=CLIPTextConfig(width=512, layers=3, heads=8, mlp=1024),
    )
    sd = random_model(config)
    assert isinstance(sd, StableDiffusion)
    return sd


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the peak of a process")
def test_the_peak_is_the_largest_part(path: Path, tmp_path: Path) -> None:
    """Of a process that opens a float16 file in float32 and makes a picture, above what a tiny model takes."""
    sd = middling()
    sizes = {name: weight_bytes(sd, name) for name in PARTS}
    sd.to(dtype=torch.float16)
    sd.save(tmp_path / "middling.safetensors")

    def measured(low_memory: bool) -> dict[str, float]:
        arguments = [str(tmp_path / "middling.safetensors"), str(low_memory), str(path)]
        done = subprocess.run([sys.executable, "-c", PEAK, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, float] = json.loads(done.stdout)
        return found

    plain, turning = measured(False), measured(True)
    assert turning["pixels"] == plain["pixels"]
    assert plain["added"] > sum(sizes.values()) - BESIDE
    assert turning["added"] < max(sizes.values()) + BESIDE
    assert max(sizes.values()) + BESIDE < sum(sizes.values()) - BESIDE, "the two bounds tell the ways apart"
