"""The public types: classes and overloads as type checkers see them, gradients after loading, and repr."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import minidiff
import weights_convert
from minidiff import StableDiffusion, Unconditional, fast
from minidiff import programs as conventions
from minidiff.config import ScheduleConfig
from minidiff.errors import CheckpointError
from minidiff.samplers import SAMPLERS, Method, sampler_from_config
from minidiff.schedule import NoiseSchedule
from minidiff.training.loop import Trainer
from minidiff.training.settings import TrainConfig
from tests.unit.test_training_loop import Pictures


def test_each_class_opens_its_own_kind(models: Path) -> None:
    for kind, own, other in ((StableDiffusion, "text", "plain"), (Unconditional, "plain", "text")):
        path = models / f"{own}.safetensors"
        opened = kind.load(path, "cpu", torch.bfloat16, low_memory=True)
        assert type(opened) is type(minidiff.load(path)) is kind
        assert opened.dtype == torch.bfloat16
        assert opened.low_memory is not None
        wrong = models / f"{other}.safetensors"
        with pytest.raises(CheckpointError) as e:
            kind.load(wrong)
        assert str(e.value).startswith(f"{wrong}: a ")
        assert str(e.value).endswith(f"; open it by {type(minidiff.load(wrong)).__name__}.load")


def parameters(pipe: StableDiffusion | Unconditional) -> Iterator[tuple[str, nn.Parameter]]:
    for name, part in pipe.parts.items():
        for key, p in part.named_parameters():
            yield f"{name}.{key}", p


def test_no_gradients_after_loading(models: Path) -> None:
    for pipe in (
        minidiff.load(models / "text.safetensors"),
        minidiff.load(models / "plain.safetensors", low_memory=True),
        minidiff.bundled(),
        minidiff.bundled(low_memory=True),
        weights_convert.load(models / "text.safetensors"),
    ):
        assert [name for name, p in parameters(pipe) if p.requires_grad] == []
    sd = StableDiffusion.load(models / "text.safetensors")
    context, _ = sd.encode_prompt("a")
    assert not sd.unet(torch.zeros(1, 4, 4, 4), torch.tensor([5]), context).requires_grad


@pytest.mark.parametrize("parts", [("unet",), ("unet", "text_encoder"), ("vae",)])
def test_training_turns_on_what_learns_and_nothing_else(models: Path, parts: tuple[str, ...]) -> None:
    sd = StableDiffusion.load(models / "text.safetensors")
    trainer = Trainer(sd, Pictures(32, captions=True), TrainConfig(steps=1, batch=2, warmup=0, parts=parts))
    learns = {name for name, p in parameters(sd) if p.requires_grad}
    assert learns == {name for name, _ in parameters(sd) if name.partition(".")[0] in parts}
    before = {name: p.detach().clone() for name, p in parameters(sd)}
    trainer.step()
    changed = {name.partition(".")[0] for name, p in parameters(sd) if not torch.equal(p, before[name])}
    assert changed == set(parts)


def test_what_things_say_of_themselves(models: Path) -> None:
    sd = StableDiffusion.load(models / "text.safetensors")
    lines = repr(sd).splitlines()
    assert lines[0] == "StableDiffusion: sd1, 32 x 32 pixels, predicts epsilon"
    count = sum(p.numel() for p in sd.unet.parameters()) / 1e6
    assert lines[1].startswith(f"  parts (parameters): unet {count:.4g} M, vae ")
    assert lines[1].endswith("; float32 on cpu")
    assert lines[2:] == ["  sampler: pndm"]
    fast.optimize(sd)
    assert f"  fast: {', '.join(sd.fast)}" in repr(sd).splitlines()
    fast.restore(sd)
    fast.approximate(sd, deep=3)
    assert "  approximate: deep=3" in repr(sd).splitlines()
    low = Unconditional.load(models / "plain.safetensors", low_memory=True)
    assert repr(low).startswith("Unconditional: ddpm, 8 x 8 pixels")
    assert repr(low).endswith("  low memory: the parts take turns")
    schedule = NoiseSchedule.from_config(ScheduleConfig())
    assert repr(schedule) == (
        "NoiseSchedule: 1000 timesteps, alpha_bar 0.99915 to 0.0046601, sigma 0.0291675 to 14.6146, "
        "prediction epsilon, on cpu"
    )
    like = conventions.read("a1111:karras").sampler(ScheduleConfig(), {"name": "euler", "s_churn": 1.0})
    assert repr(like).startswith("ProgramSampler: euler, s_churn=1.0 as a1111:karras has it, by Euler(")
    run = sd.steps("a", steps=3, seed=1, num_images=2, sampler="ddim")
    assert repr(run).startswith("Run: 0 of 3 model calls done, 2 pictures; DDIM: 3 model calls")
    next(run)
    assert repr(run).startswith("Run: 1 of 3 model calls done")
    report = weights_convert.convert(models / "text.safetensors", models / "out.safetensors")
    mapped = sum(report.mapped.values())
    source = models / "text.safetensors"
    assert repr(report) == f"Report: {source}, minidiff layout, sd1, {mapped} tensors mapped, 0 dropped"


def test_every_sampler_is_a_sampler() -> None:
    """What type checkers are told of SAMPLERS is so, and costs nothing: equal, hashable, pickled as before."""
    import pickle

    for name, kind in SAMPLERS.items():
        sampler = kind()
        assert isinstance(sampler, Method)
        for method in ("plan", "start", "scale_input", "denoised", "step"):
            assert getattr(kind, method).__qualname__.split(".")[0] != "Sampler", (name, method)
        assert sampler == sampler_from_config({"name": name})
        assert hash(sampler) == hash(pickle.loads(pickle.dumps(sampler)))
