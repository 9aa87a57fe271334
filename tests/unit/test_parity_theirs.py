"""diffusers as one side of a comparison, with mocks of its pipelines: their arguments and their recorded values."""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from minidiff.errors import ConfigError, UnsupportedError
from minidiff.parity import command, theirs
from minidiff.parity.difference import difference
from minidiff.parity.engine import Row
from minidiff.parity.ours import Asked, asked
from minidiff.parity.stages import Deep
from minidiff.parity.theirs import Theirs
from minidiff.samplers import sampler_from_diffusers, sampler_to_config

PICTURE, MASK = Image.new("RGB", (8, 8)), Image.new("L", (8, 8))


class Scheduler:
    """Two timesteps; a step adds one to the sample."""

    init_noise_sigma = 2.0
    timesteps = torch.tensor([7, 3])

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.sigmas = torch.tensor([4.0, 1.0, 0.0])

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return original_samples + 10 * noise + timesteps

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        return (sample + model_output,)


class Pipe:
    """A pipeline with whichever networks; it keeps what it was told."""

    def __init__(self, text: bool = True, **parts: Any) -> None:
        self.scheduler, self.told = Scheduler(), dict[str, Any]()
        if text:
            self.text_encoder = None
        for name, part in parts.items():
            setattr(self, name, part)

    def denoise(self) -> Tensor:
        self.scheduler.set_timesteps(2)
        x = self.scheduler.add_noise(torch.zeros(1), torch.ones(1), torch.tensor([7]))
        for t in self.scheduler.timesteps:
            (x,) = self.scheduler.step(torch.ones(1), t, x, return_dict=False)
        return x

    def result(self, images: Any, told: dict[str, Any]) -> Any:
        self.told = told
        return SimpleNamespace(images=images)


class TextToImage(Pipe):
    def __call__(
        self, prompt: Any, height: Any, width: Any, num_inference_steps: int, guidance_scale: float,
        negative_prompt: Any, eta: float, generator: Any, output_type: str,
    ) -> Any:  # fmt: skip
        told = {k: v for k, v in locals().items() if k != "self"}
        return self.result(self.denoise(), told)


class ImageToImage(Pipe):
    def __call__(
        self, prompt: Any, image: Any, strength: float, num_inference_steps: int, guidance_scale: float,
        negative_prompt: Any, generator: Any, output_type: str, mask_image: Any = None,
    ) -> Any:  # fmt: skip
        told = {k: v for k, v in locals().items() if k != "self"}
        return self.result(self.denoise(), told)


class Alone(Pipe):
    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int, output_type: str) -> Any:
        told = {k: v for k, v in locals().items() if k != "self"}
        return self.result(np.arange(6.0).reshape(1, 1, 2, 3), told)


def shown(pipe: Any, request: Asked) -> dict[str, list[float]]:
    """The stages of a run, in order, and their values."""
    seen: dict[str, list[float]] = {}

    def tap(stage: str, value: Tensor) -> Tensor:
        seen[stage] = value.flatten().tolist()
        return value

    Theirs(pipe, request, {}).run(tap)
    return seen


def test_a_text_to_image_pipeline_is_told_the_run() -> None:
    request = asked("a fox", negative_prompt="fog", steps=5, guidance_scale=3.0, seed=11, height=16, width=24, eta=0.5)
    pipe = TextToImage()
    shown(pipe, request)
    generator = pipe.told.pop("generator")
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=torch.Generator().manual_seed(11)))
    assert pipe.told == {
        "prompt": "a fox", "negative_prompt": "fog", "num_inference_steps": 5, "guidance_scale": 3.0, "height": 16,
        "width": 24, "eta": 0.5, "output_type": "pt",
    }  # fmt: skip


def test_a_pipeline_is_told_only_what_it_takes() -> None:
    """No size where the picture has one, no eta where there is none, no mask unless there is one."""
    request = asked(
        "a fox", steps=5, guidance_scale=3.0, seed=1, height=16, width=24, image=PICTURE, strength=0.25, eta=0.5
    )
    pipe = ImageToImage()
    shown(pipe, request)
    assert (pipe.told["image"], pipe.told["strength"], pipe.told["mask_image"]) == (PICTURE, 0.25, None)
    shown(pipe, asked(image=PICTURE, mask=MASK))
    assert (pipe.told["image"], pipe.told["strength"], pipe.told["mask_image"]) == (PICTURE, 1.0, MASK)
    alone = Alone(text=False)
    assert shown(alone, asked(steps=3))["decode/pixels"] == [0, 3, 1, 4, 2, 5], "channels first"
    assert (alone.told["batch_size"], alone.told["num_inference_steps"], alone.told["output_type"]) == (1, 3, "np")


def test_the_stages_of_a_scheduler() -> None:
    """Its plan, the noising, the first sample, and each step; afterwards its own methods are back."""
    pipe = TextToImage()
    assert shown(pipe, asked(steps=2)) == {
        "plan/timesteps": [7, 3],
        "plan/init_noise_sigma": [2],
        "plan/sigmas": [4, 1, 0],
        "latents": [0],
        "added": [1],
        "noisy": [17],
        "start/x": [17],
        "out": [1],
        "x": [18],
        "out#2": [1],
        "x#2": [19],
        "decode/pixels": [19],
    }
    assert "step" not in vars(pipe.scheduler)

    pixels: list[float] = []

    def another(stage: str, value: Tensor) -> Tensor:
        if stage == "decode/pixels":
            pixels.extend(value.tolist())
        return value + 100 if stage in ("start/x", "x") else value

    Theirs(pipe, asked(steps=2), {}).run(another)
    assert pixels == [17 + 100 + 1 + 100 + 1], "the run goes on with what the tap gives back"


def test_an_error_of_the_reference_is_one_line() -> None:
    class Broken(Pipe):
        def __call__(self, prompt: Any) -> Any:
            raise AssertionError

    class Refuses(Pipe):
        def __call__(self, **options: Any) -> Any:
            raise ConfigError("no such thing")

    with pytest.raises(UnsupportedError, match=r"diffusers cannot run this \(TypeError: .*unexpected keyword"):
        shown(Broken(), asked())
    with pytest.raises(ConfigError, match="no such thing"):
        shown(Refuses(), asked())
    broken = Broken()
    with pytest.raises(UnsupportedError):
        shown(broken, asked())
    assert vars(broken.scheduler) == {}


class Autoencoder(nn.Linear):
    """A part with a config."""

    def __init__(self, upcast: bool) -> None:
        super().__init__(1, 1)
        self.config = {"force_upcast": upcast}

    def register_to_config(self, **settings: Any) -> None:
        self.config |= settings


@pytest.mark.parametrize("upcast", [True, False])
def test_wide_is_float64_for_the_time_being(upcast: bool) -> None:
    vae, unet = Autoencoder(upcast), nn.Linear(1, 1)
    side = Theirs(Pipe(vae=vae, unet=unet, text_encoder_2=None), asked(), {})
    assert theirs.parts_of(side.pipe) == {"unet": unet, "vae": vae}
    with suppress(KeyError), side.wide():
        assert unet.weight.dtype == vae.weight.dtype == torch.float64
        assert vae.config == {"force_upcast": False}
        raise KeyError
    assert unet.weight.dtype == vae.weight.dtype == torch.float32
    assert vae.config == {"force_upcast": upcast}
    with Theirs(Pipe(text=False, unet=unet), asked(), {}).wide():
        assert unet.weight.dtype == torch.float64


# --- where the two part ----------------------------------------------------------------------------------------------


def differ(stage: str) -> Row:
    return Row(stage, difference(torch.ones(1), torch.zeros(1)))


@pytest.mark.parametrize(
    ("stage", "again"),
    [
        ("step.2/prediction", "step.2"),
        ("step.10/prediction", "step.10"),
        ("step.0/prediction", None),
        ("step.2/out", None),
        ("step.2/prediction#2", None),
        (None, None),
    ],
)
def test_a_later_step_is_run_again_with_its_layers(
    stage: str | None, again: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Deep] = []

    def find(a: Any, b: Any, tolerance: float, **options: Any) -> Any:
        assert a.deep is b.deep
        assert (tolerance, options["judge"]) == (0.5, True)
        runs.append(a.deep)
        return [differ(stage)] if stage is not None else [], ["a"], ["b"]

    told: list[str] = []
    monkeypatch.setattr(command, "find", find)
    monkeypatch.setattr(theirs, "import_diffusers", lambda: SimpleNamespace(__version__="9.9"))
    args = Namespace(tolerance=0.5, judge=True)
    names = {"unet": {"conv_in": "first"}}
    report = command.hold(SimpleNamespace(), SimpleNamespace(), asked(), names, args, told.append)  # type: ignore[arg-type]
    assert (report.b, report.only_a, report.only_b, report.tolerance) == ("diffusers 9.9", ["a"], ["b"], 0.5)
    assert [runs[0](scope) for scope in ("prompt", "step.0", "step.1")] == [True, True, False]
    if again is None:
        assert (len(runs), told) == (1, [])
    else:
        assert told == [f"first difference in the UNet of {again}; running again with its layers"]
        assert [runs[1](scope) for scope in (again, "prompt", "step.0", "step.1", f"{again}1")] == [True] + [False] * 4


class Encoder(nn.Module):
    """A text encoder of the reference, its layers at the top or, in older versions, one below."""

    def __init__(self, below: bool) -> None:
        super().__init__()
        self.text_projection = nn.Linear(1, 1)
        inner = nn.Module()
        inner.norm, inner.position = nn.Linear(1, 1), nn.Linear(1, 1)
        if below:
            self.text_model = inner
        else:
            self.norm, self.position = inner.norm, inner.position


@pytest.mark.parametrize("below", [True, False])
def test_modules_of_both_by_their_names(below: bool) -> None:
    ours = nn.Module()
    ours.norm, ours.position, ours.projection = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    ours.alone = nn.Linear(1, 1)
    table = {"norm": "norm", "position": "position", "projection": "text_projection", "alone": "nowhere"}
    found = command.pair(
        {"text_encoder": ours},
        Pipe(text_encoder=Encoder(below)),
        {"text_encoder": table},
    )
    prefix = "text_model." if below else ""
    assert found == {"text_encoder": {"norm": f"{prefix}norm", "projection": "text_projection"}}


@pytest.mark.parametrize(
    ("masked", "kind"), [(False, "AutoPipelineForImage2Image"), (True, "AutoPipelineForInpainting")]
)
def test_only_a_pipeline_that_takes_no_picture_is_exchanged(
    masked: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Pipe):
        def __call__(self, prompt: str) -> None: ...

    class Drawing(Pipe):
        def __call__(self, prompt: str, image: Any) -> None: ...

    class Painting(Pipe):
        def __call__(self, prompt: str, image: Any, mask_image: Any) -> None: ...

    other = SimpleNamespace(set_progress_bar_config=lambda disable: None)
    reference = SimpleNamespace(**{kind: SimpleNamespace(from_pipe=lambda pipe: other)})
    monkeypatch.setattr(theirs, "import_diffusers", lambda: reference)
    assert theirs.taking_a_picture(Plain(), masked=masked) is other
    drawing, painting = Drawing(), Painting()
    assert theirs.taking_a_picture(drawing, masked=masked) is (other if masked else drawing)
    assert theirs.taking_a_picture(painting, masked=masked) is painting


@pytest.mark.parametrize("scheduler", [True, False])
def test_a_bare_folder_has_its_own_scheduler_or_the_default(
    scheduler: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the published ddpm-* folders, which have no model_index.json."""

    class Made(SimpleNamespace):
        @classmethod
        def from_pretrained(cls, folder: Path, **options: Any) -> Made:
            return cls(read=folder)

        def set_progress_bar_config(self, disable: bool) -> None:
            self.silent = disable

        def to(self, device: str) -> None:
            self.device = device

    if scheduler:
        (tmp_path / "scheduler_config.json").touch()
    reference = SimpleNamespace(UNet2DModel=Made, DDPMScheduler=Made, DDPMPipeline=Made)
    monkeypatch.setattr(theirs, "import_diffusers", lambda: reference)
    monkeypatch.setattr(theirs, "parts_of", lambda pipe: {})
    pipe = theirs.open_pipeline(tmp_path, torch.float32, "cpu")
    assert pipe == Made(
        unet=Made(read=tmp_path),
        scheduler=Made(read=tmp_path) if scheduler else Made(),
        silent=True,
        device="cpu",
    )


@pytest.mark.parametrize(("name", "order"), [("dpmpp_2m_sde", 2), ("dpmpp_3m_sde", 3)])
def test_options_of_a_class_of_diffusers_make_the_sampler_they_stand_for(name: str, order: int) -> None:
    cls, options = theirs.VARIANTS[name]
    read = sampler_to_config(sampler_from_diffusers({"_class_name": cls, **options}))
    assert (read["algorithm"], read["solver_order"]) == ("sde-dpmsolver++", order)
