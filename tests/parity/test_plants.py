"""Is the parity suite able to fail? Eight slips that real reimplementations have made, planted one by one.

Each runs in a process of its own: the code under test is patched, then the parity test that should notice is run, and
must fail in its own assertion on numbers. Failing for another reason (a crash, nothing collected) is no proof.
"""

from __future__ import annotations

import os
import subprocess
import sys
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
        "from minidiff.pipeline.guidance import Conditions as C; inner = C.after\n"
        "C.after = lambda self, first: inner(first, self)",
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


def run(patch: str, test: str) -> subprocess.CompletedProcess[str]:
    """One parity test in a fresh process in which ``patch`` was executed first."""
    code = f"{patch}\nimport sys, pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, f"tests/parity/{test}", "-x", "-p", "no:cacheprovider", "-n", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_slip_is_seen(name: str) -> None:
    done = run(*PLANTS[name])
    assert done.returncode == 1, f"{name} was not noticed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert SEEN in done.stdout, f"{name} failed, but not in the parity assertion:\n{done.stdout[-3000:]}"


def test_without_a_slip_the_same_tests_pass() -> None:
    done = run(NOTHING, "test_pipeline.py::test_the_checkpoints_own_sampler")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
