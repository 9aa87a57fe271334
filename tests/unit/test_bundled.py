"""The bundled model: its file, its pictures, and every sampler on it.

The judge is scripts/_judge.py, which sees the finished picture and the caption. How often one is right is measured
by scripts/eval_shapes.py; here a few prompts with fixed seeds must be.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minidiff
from minidiff import cli
from minidiff.models.clip import SharedEmbedding
from minidiff.pipeline import BUNDLED_SCALE, StableDiffusion
from minidiff.pipeline.denoise import denoise
from minidiff.pipeline.guidance import guide
from minidiff.pipeline.job import Job, Prediction
from minidiff.pipeline.png import to_pil
from minidiff.samplers import SAMPLERS, sampler_from_config
from minidiff.training import shapes
from minidiff.training.captions import loose_vocabulary

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import _judge

ASSET = files("minidiff") / "assets/shapes.safetensors"

LARGEST = 16e6  # bytes
PROMPTS = ("a large red star on a blue background", "a large pink square on a blue background")
QUIET: dict[str, Any] = {"progress": False, "steps": 25, "guidance_scale": BUNDLED_SCALE}


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return minidiff.bundled()


def right(pixels: Tensor, prompt: str) -> bool:
    """True if a picture (1, 3, 64, 64) in [0, 1] shows what ``prompt`` says."""
    seen = _judge.see(np.asarray(to_pil(pixels)[0], dtype=np.float64))
    return _judge.judge(seen, _judge.parse(prompt)).right


# --- the file --------------------------------------------------------------------------------------------------------


def test_it_is_small_and_knows_the_language_of_the_captions(sd: StableDiffusion) -> None:
    assert isinstance(ASSET, Path)
    assert ASSET.stat().st_size <= LARGEST
    assert isinstance(sd.text_encoder.token, SharedEmbedding)
    kept = sd.text_encoder.config.kept
    assert kept is not None
    said = {i for word in (*loose_vocabulary(), ",") for i in sd.tokenizer.encode(word)}
    assert set(kept) == said | {sd.tokenizer.start, sd.tokenizer.end}
    assert sd.vae.config.latent_channels == 4
    assert sd.tokenizer(["a star"]).shape == (1, 32)
    assert sd.hash


# --- what it draws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "two"])
def test_it_draws_what_it_is_told(sd: StableDiffusion, kind: shapes.Kind) -> None:
    """Prompts that no one chose. minidiff/training/README.md says how many are right in all; chance gives none."""
    prompts = [item.caption for item in shapes.items(1, 0, 12, kind)]
    pictures = sd.generate(prompts, seed=0, output="tensor", **QUIET)
    assert sum(right(p[None], c) for p, c in zip(pictures, prompts, strict=True)) >= 7


def test_it_draws_what_people_type_first(sd: StableDiffusion) -> None:
    """All that is said must be right, and the thing visible; a plural is two things."""
    prompts = ["a blue square", "a small green circle", "two circles", "star on a blue background", "a red star"]
    prompts += [item.caption for item in shapes.items(1, 0, 10, "loose")]
    pictures = sd.generate(prompts, seed=0, output="tensor", **QUIET)
    assert sum(right(p[None], c) for p, c in zip(pictures, prompts, strict=True)) >= 13


def test_held_out_triples_and_other_captions(sd: StableDiffusion) -> None:
    """It composes what it never saw together; and the judge is not merely kind."""
    prompts = [caption for caption, _ in shapes.held_out_prompts(8, seed=1)]
    pictures = sd.generate(prompts, seed=0, output="tensor", **QUIET)
    assert sum(right(p[None], c) for p, c in zip(pictures, prompts, strict=True)) >= 4
    others = [*prompts[1:], prompts[0]]
    assert sum(right(p[None], c) for p, c in zip(pictures, others, strict=True)) <= 1


# --- through every sampler -------------------------------------------------------------------------------------------


def in_sigma(sd: StableDiffusion, both: Tensor, level: Callable[[Tensor], tuple[Any, Any]]) -> Any:
    """The bundled model dressed as one trained in sigma, x = x0 + sigma * noise (Karras et al. 2022, table 1).

    ``level`` reads sigma and the scale c_in of what is seen from the timestep that the sampler passes. The answer is
    F = (x0 - c_skip * x) / c_out, with the c_skip and c_out that the sampler will apply: given by ``level`` as well.
    """
    table = ((1 - sd.schedule.alphas_cumprod) / sd.schedule.alphas_cumprod).sqrt().double()
    places = torch.arange(len(table)).double()

    def predict(seen: Tensor, t: Tensor) -> Prediction:
        sigma, (c_in, c_skip, c_out) = level(t.double())
        x = seen.double() / c_in
        at = np.interp(float(sigma.log()), table.log().numpy(), places.numpy())
        x0 = denoised(sd, both, (x / (1 + sigma**2).sqrt()).float(), torch.tensor(at, dtype=torch.float32)).double()
        return Prediction(((x0 - c_skip * x) / c_out).float())

    return predict


def denoised(sd: StableDiffusion, both: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """x0 from a variance-preserving x at timestep ``t``, which may lie between two of the table."""
    unconditional, conditional = sd.unet(torch.cat([x, x]), t, both).chunk(2)
    v = guide(unconditional, conditional, QUIET["guidance_scale"])
    alpha_bar = np.interp(float(t), np.arange(len(sd.schedule)), sd.schedule.alphas_cumprod.numpy())
    return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * v


def edm(t: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    sigma, s = (4 * t).exp(), 0.5
    root = (sigma**2 + s**2).sqrt()
    return sigma, (1 / root, s**2 / root**2, sigma * s / root)


def cm(t: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    sigma, s, least = (t / 250).exp() - 1e-44, 0.5, 0.002
    root = (sigma**2 + s**2).sqrt()
    return sigma, (1 / root, s**2 / ((sigma - least) ** 2 + s**2), (sigma - least) * s / root)


@torch.no_grad()
def run_by_hand(sd: StableDiffusion, sampler: Any, prompt: str, predict: Callable[[Tensor], Any]) -> Tensor:
    both = sd.encode_prompt(["", prompt])[0]
    plan = sampler.plan(None, QUIET["steps"])
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 16, 16, generator=g) * plan.init_noise_sigma
    trail = denoise(
        Job(
            predict=predict(both),
            sampler=sampler,
            plan=plan,
            x=x,
            draw=lambda like: torch.randn(like.shape, generator=g),
        )
    )
    return sd.decode([step.x for step in trail][-1])


OWN_LEVELS = {"edm_euler", "edm_dpmpp_2m", "cm", "ipndm"}
BACKWARDS = {"ddim_inverse", "dpmpp_2m_inverse"}


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - OWN_LEVELS - BACKWARDS))
def test_every_sampler_gives_a_right_picture(sd: StableDiffusion, name: str) -> None:
    for prompt in PROMPTS:
        assert right(sd.generate(prompt, sampler=name, seed=0, output="tensor", **QUIET), prompt), prompt


@pytest.mark.parametrize(
    ("name", "options", "level"),
    [("edm_euler", {}, edm), ("edm_dpmpp_2m", {}, edm), ("cm", {"clip": None}, cm)],
)
def test_samplers_of_models_that_live_in_sigma(sd: StableDiffusion, name: str, options: Any, level: Any) -> None:
    sampler = sampler_from_config({"name": name, "sigma_max": 14.6, "sigma_min": 0.03, **options})
    for prompt in PROMPTS:
        assert right(run_by_hand(sd, sampler, prompt, lambda both: in_sigma(sd, both, level)), prompt), prompt


def test_ipndm_on_its_circle(sd: StableDiffusion) -> None:
    """Its timesteps are angles, x = cos(a) * x0 + sin(a) * noise, and the model answers the noise."""
    table = sd.schedule.alphas_cumprod.sqrt().acos().double().numpy()

    def circle(both: Tensor) -> Any:
        def predict(x: Tensor, t: Tensor) -> Prediction:
            angle = float(t) * np.pi / 2
            at = torch.tensor(np.interp(angle, table, np.arange(len(table))), dtype=torch.float32)
            x0 = denoised(sd, both, x, at)
            return Prediction((x - np.cos(angle) * x0) / np.sin(angle))

        return predict

    for prompt in PROMPTS:
        assert right(run_by_hand(sd, SAMPLERS["ipndm"](), prompt, circle), prompt), prompt


@torch.no_grad()
@pytest.mark.parametrize(("back", "forth"), [("ddim_inverse", "ddim"), ("dpmpp_2m_inverse", "dpmpp_2m")])
def test_a_picture_goes_back_to_its_noise_and_comes_again(sd: StableDiffusion, back: str, forth: str) -> None:
    """Inversion: without guidance, noise found by the inverse sampler leads to the picture that it was found from."""
    prompt, plain = PROMPTS[0], {"progress": False, "guidance_scale": 1.0, "steps": 100}
    latents = sd.generate(prompt, seed=0, output="latent", **QUIET)
    context = sd.encode_prompt([prompt])[0]
    sampler: Any = SAMPLERS[back]()
    plan = sampler.plan(sd.schedule, 100)
    trail = denoise(
        Job(
            predict=lambda x, t: Prediction(sd.unet(x, t, context)),
            sampler=sampler,
            plan=plan,
            x=latents,
            draw=torch.randn_like,
        )
    )
    noise = [step.x for step in trail][-1]
    again = sd.generate(prompt, sampler=forth, latents=noise, output="latent", **plain)
    other = sd.generate(prompt, sampler=forth, seed=1, output="latent", **plain)
    assert (again - latents).square().mean() < 0.1 * (other - latents).square().mean()
    assert right(sd.decode(again), prompt)


# --- words, and the command line -------------------------------------------------------------------------------------


def test_a_word_that_it_does_not_know_is_said_in_one_line(sd: StableDiffusion) -> None:
    with pytest.warns(
        UserWarning, match=r"does not know 'astronaut', 'horse'; its words are: a above .*\bstar\b"
    ) as caught:
        sd.encode_prompt(["an astronaut on a red horse"])
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    named = str(caught[0].message).split()
    assert {"tri", "angles", "<|endoftext|>"}.isdisjoint(named), "parts of words"
    assert {"triangle", "triangles", "star", "stars"} <= {*named}, "a word of two tokens is one as well"
    animals = "ant bat cat cow dog emu fox gnu hen owl pig rat"
    with pytest.warns(UserWarning, match="does not know 'ant', .* 'owl' and 2 words more; its words are: ") as many:
        sd.encode_prompt([animals])
    assert str(many[0].message).count("'") == 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.encode_prompt(["a small green cross on the left, gray background", ""])


def test_the_command_line_uses_it_when_no_model_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", PROMPTS[0], "--seed", "0", "--quiet"]) == 0
    ended = capsys.readouterr()
    (path,) = ended.out.splitlines()
    assert ended.err == ""
    assert _judge.judge(_judge.read(path), _judge.parse(PROMPTS[0])).right
    assert minidiff.read_recipe(path)["guidance_scale"] == BUNDLED_SCALE
    assert cli.main(["generate", "--help"]) == 0
    assert f"the bundled model's {BUNDLED_SCALE:g})" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["generate", "a unicorn", "--steps", "1", "--seed", "0", "--quiet"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minidiff: warning: ")
    assert "'unicorn'" in line
