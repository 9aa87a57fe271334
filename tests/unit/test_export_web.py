"""Tests of what scripts/web computes by itself, in JavaScript: token ids, torch's noise, and a plan's steps."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff.config import ScheduleConfig, TokenizerConfig
from minidiff.models.tokenizer import Tokenizer
from minidiff.models.tokenizer_out import tokenizer_files
from minidiff.samplers import SAMPLERS
from minidiff.samplers.linear import table
from minidiff.schedule import NoiseSchedule
from tests.tolerances import ELSEWHERE

WEB = Path(__file__).resolve().parents[2] / "scripts/web"
pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")
PROMPTS = ["a large red star on a blue background", "Photograph of Zürich's café, 2024!! naïve ☕", "", "x1 " * 60]


def node(folder: Path, code: str) -> Any:
    """Return what ``code`` prints as JSON, in a module beside draw.js."""
    shutil.copy(WEB / "draw.js", folder / "draw.mjs")
    (folder / "test.mjs").write_text(
        'import fs from "fs";\nimport { Model, Random, Tokenizer } from "./draw.mjs";\n' + code
    )
    done = subprocess.run(["node", "test.mjs"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.filterwarnings("ignore:a prompt of")
def test_tokens(tmp_path: Path) -> None:
    files = dict(tokenizer_files(TokenizerConfig()))
    (tmp_path / "vocab.json").write_text(json.dumps(files["vocab.json"]))
    (tmp_path / "merges.txt").write_text(files["merges.txt"])
    found = node(
        tmp_path,
        f"""
const vocab = JSON.parse(fs.readFileSync("vocab.json"));
const merges = fs.readFileSync("merges.txt", "utf8").split("\\n").slice(1).filter(Boolean);
const tokenizer = new Tokenizer(vocab, merges, {{ length: 77, pad: 49407 }});
console.log(JSON.stringify({json.dumps(PROMPTS)}.map((prompt) => tokenizer.encode(prompt))));
""",
    )
    assert found == Tokenizer(TokenizerConfig())(PROMPTS).tolist()


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_noise(tmp_path: Path, seed: int) -> None:
    code = f"const r = new Random({seed}); console.log(JSON.stringify([...r.normal(1024), ...r.normal(64)]));"
    generator = torch.Generator().manual_seed(seed)
    want = torch.cat([torch.randn(1024, generator=generator), torch.randn(64, generator=generator)])
    gap = (torch.tensor(node(tmp_path, code)) - want).abs().max()
    assert gap <= ELSEWHERE.relative * want.abs().max()


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral"])
def test_a_run(tmp_path: Path, name: str) -> None:
    """With a model that anybody can write down: u = sin x, c = cos x."""
    sampler = SAMPLERS[name]()
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 4)
    (tmp_path / "plan.json").write_text(json.dumps(table(sampler, plan).to_json()))
    code = """
const names = { text_encoder: "context", unet: "out", vae_decoder: "pixels" };
const programs = Object.fromEntries(Object.entries(names).map(([k, name]) => [k, { outputs: [name] }]));
programs.vae_decoder.inputs = { latents: { axes: ["batch", 4, "height", "width"] } };
const pass = (run) => ({ run: async (given) => run(given) });
const model = Object.assign(new Model(), {
  ort: { Tensor: class { constructor(type, data) { this.data = data; } } },
  plan: JSON.parse(fs.readFileSync("plan.json")),
  manifest: { factor: 2, scaling_factor: 0.5, programs },
  tokenizer: { encode: () => [1, 2] },
  text_encoder: pass(() => ({ context: 0 })),
  unet: pass(({ x }) => ({
    out: { data: x.data.map((v, k) => (k < x.data.length / 2 ? Math.sin(v) : Math.cos(v))) },
  })),
  vae_decoder: pass(({ latents }) => ({ pixels: latents })),
});
const found = await model.draw("a star", { seed: 5, guidance: 3, width: 16, height: 8 });
console.log(JSON.stringify([[...found.latents], [...found.pixels]]));
"""
    latents, pixels = map(torch.tensor, node(tmp_path, code))
    generator = torch.Generator().manual_seed(5)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(128, generator=generator).reshape(1, 4, 4, 8)

    x, state = draw(torch.empty(0)) * plan.init_noise_sigma, sampler.start()
    for i in range(len(plan)):
        seen = sampler.scale_input(plan, i, x)
        out = seen.sin() + 3 * (seen.cos() - seen.sin())
        x, state = sampler.step(plan, i, x, out, state, draw)
    assert (latents - x.flatten()).abs().max() <= ELSEWHERE.relative * x.abs().max()
    assert torch.equal(pixels, latents / 0.5)
