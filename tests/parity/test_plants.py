"""Planted errors that the parity tests must find: eight that real reimplementations have made, one at a time.

Each runs in a process of its own: the code under test is patched, then the parity test that should notice is run, and
must fail in its own assertion on numbers. Failing for another reason (a crash, nothing collected) is no proof. The
processes are forks of one that has imported the reference and nothing of minidiff.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# name: (the patch, the parity test that must see it)
PLANTS = {
    "norm eps": (
        "import minidiff.models.attention as m; m.TRANSFORMER_NORM_EPS = 1e-5",
        "test_convert_models.py::test_unet[sd1]",
    ),
    "quick_gelu": (
        "import torch, minidiff.models.clip as m; m.quick_gelu = torch.nn.functional.gelu",
        "test_convert_models.py::test_text_encoder[l-49407]",
    ),
    "pad token": (
        "import dataclasses; from minidiff.models.tokenizer import Tokenizer as T; init = T.__init__\n"
        "T.__init__ = lambda self, config: init(self, dataclasses.replace(config, pad=0))",
        "test_pipeline.py::test_the_checkpoints_own_sampler",
    ),
    "guidance order": (
        "from minidiff.pipeline.guidance import Conditions as C; inner = C.joined\n"
        "C.joined = staticmethod(lambda each: inner(each[::-1]))",
        "test_pipeline.py::test_the_checkpoints_own_sampler",
    ),
    "steps_offset": (
        "import minidiff.samplers.grid as m; inner = m.spaced\n"
        "m.spaced = lambda spacing, total, n, offset, **k: inner(spacing, total, n, 0, **k)",
        "test_pipeline.py::test_the_checkpoints_own_sampler",
    ),
    "sigma dtype": (
        "import numpy as np, minidiff.samplers.grid as m; inner = m.karras\n"
        "m.CURVES['karras'] = lambda low, high, n: inner(np.float32(low), np.float32(high), n).astype(np.float32)"
        " if n == 1 else ((np.float32(high) ** np.float32(1 / 7) + np.linspace(0, 1, n, dtype=np.float32)"
        " * (np.float32(low) ** np.float32(1 / 7) - np.float32(high) ** np.float32(1 / 7))) ** np.float32(7))",
        "test_pipeline.py::test_every_sampler_from_prompt_to_pixels[euler karras]",
    ),
    "sinusoid order": (
        "import minidiff.models.unet as m; inner = m.sinusoid\n"
        "m.sinusoid = lambda t, dim, sin_first=False, freq_shift=0: inner(t, dim, sin_first=not sin_first,"
        " freq_shift=freq_shift)",
        "test_convert_models.py::test_unet[sd1]",
    ),
    "asymmetric padding": (
        "from minidiff.models.blocks import Downsample as D; import torch.nn.functional as F\n"
        "D.forward = lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0)) if self.asymmetric else x)",
        "test_convert_models.py::test_unet[ddpm]",
    ),
}
NOTHING = "pass"
SEEN = "entries differ, by up to"  # what assert_close says


# Reads a line of JSON for each test to run, (patch, arguments of pytest), and answers with its status and output.
FORKS = """
import json, os, sys, tempfile
import diffusers.loaders, torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from transformers import CLIPTextModel, CLIPTokenizer

for line in sys.stdin:
    patch, arguments = json.loads(line)
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            exec(patch, {})
            import pytest
            status = pytest.main(arguments)
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        print(json.dumps((status, output.read())), flush=True)
"""
Run = Callable[[str, str], tuple[int, str]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Run one parity test in a fresh process in which a patch was executed first: its status and output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-c", FORKS]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        ask, answers = forks.stdin, forks.stdout

        def call(patch: str, test: str) -> tuple[int, str]:
            arguments = [f"tests/parity/{test}", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
            print(json.dumps((patch, arguments)), file=ask, flush=True)
            status, output = json.loads(answers.readline())
            return status, output

        yield call
        ask.close()


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_slip_is_seen(name: str, run: Run) -> None:
    status, output = run(*PLANTS[name])
    assert status == 1, f"{name} was not noticed:\n{output[-3000:]}"
    assert SEEN in output, f"{name} failed, but not in the parity assertion:\n{output[-3000:]}"


def test_without_a_slip_the_same_tests_pass(run: Run) -> None:
    status, output = run(NOTHING, "test_pipeline.py::test_the_checkpoints_own_sampler")
    assert status == 0, output[-3000:]
