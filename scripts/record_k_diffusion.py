"""Record what k-diffusion's samplers do on a denoiser that is a formula: the fixture of tests/unit/test_k_diffusion.py.

    python scripts/record_k_diffusion.py [--out tests/fixtures/k_diffusion.safetensors]

It runs in an environment of its own, since k-diffusion asks for a dozen packages that its samplers have no use for:

    pip install torch torchvision scipy torchsde tqdm safetensors && pip install --no-deps k-diffusion==0.1.1.post1

Only ``k_diffusion/sampling.py`` is loaded; torchdiffeq, which no sampler here calls, is left out. All is float64 on
the CPU: the first sample, every noise in the order in which it is asked for, and the sample before every step and at
the end. The denoiser is that of data which is a mixture of two Gaussians, so that x0 is no linear function of x. The
header of the file says version, sigmas, sampler and options of every run.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (2, 4, 2, 3)
MEANS, SPREAD = (-0.9, 0.6), 0.25  # of the two Gaussians
LOW, HIGH = 0.0291675, 14.614642  # the smallest and largest sigma of Stable Diffusion

# name: k-diffusion's function, its options, how its sigmas are spaced, and the number of steps
RUNS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "euler": ("sample_euler", {}, "karras", 20),
    "euler_exponential": ("sample_euler", {}, "exponential", 7),
    "euler_ancestral": ("sample_euler_ancestral", {}, "karras", 20),
    "heun": ("sample_heun", {}, "karras", 12),
    "dpm2": ("sample_dpm_2", {}, "karras", 12),
    "dpm2_ancestral": ("sample_dpm_2_ancestral", {}, "karras", 12),
    "lms": ("sample_lms", {}, "karras", 20),
    "lms_order_3": ("sample_lms", {"order": 3}, "exponential", 12),
    "dpmpp_2m": ("sample_dpmpp_2m", {}, "karras", 20),
    "dpmpp_2m_exponential": ("sample_dpmpp_2m", {}, "exponential", 7),
    "dpmpp_2s": ("sample_dpmpp_2s_ancestral", {"eta": 0.0}, "karras", 10),
    "dpmpp_sde": ("sample_dpmpp_sde", {}, "karras", 10),
    "dpmpp_2m_sde": ("sample_dpmpp_2m_sde", {"solver_type": "midpoint"}, "karras", 20),
    "dpmpp_2m_sde_heun": ("sample_dpmpp_2m_sde", {"solver_type": "heun"}, "karras", 20),
    "dpmpp_3m_sde": ("sample_dpmpp_3m_sde", {}, "exponential", 20),
}


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean of x0 for a mixture of two equally likely Gaussians under noise of deviation ``sigma`` (B,)."""
    sigma = sigma.reshape(-1, *(1 for _ in x.shape[1:]))
    variance = SPREAD**2 + sigma**2
    low, high = MEANS
    share = torch.sigmoid((high - low) * (x - (high + low) / 2) / variance)  # of the second one
    mean = low + (high - low) * share
    return mean + SPREAD**2 / variance * (x - mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "fixtures" / "k_diffusion.safetensors")
    args = parser.parse_args()
    sampling = load_sampling()
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {
        "what": "trajectories of k-diffusion's samplers in float64, written by scripts/record_k_diffusion.py",
        "k-diffusion": importlib.metadata.version("k-diffusion"),
        "torch": torch.__version__,
        "denoiser": {"means": MEANS, "spread": SPREAD},
        "runs": {},
    }
    for seed, (name, (function, options, spacing, steps)) in enumerate(RUNS.items()):
        sigmas = spaced(sampling, spacing, steps)
        samples, noises = record(getattr(sampling, function), sigmas, options, seed)
        tensors[f"{name}.sigmas"], tensors[f"{name}.samples"] = sigmas, samples
        if len(noises):
            tensors[f"{name}.noises"] = noises
        facts["runs"][name] = {"function": function, "options": options, "spacing": spacing, "steps": steps}
        print(f"{name}: {len(samples) - 1} steps, {len(noises)} noises, ends at {samples[-1].std():.4f} std")
    save_file(tensors, args.out, {"facts": json.dumps(facts)})
    print(f"{args.out}: {args.out.stat().st_size} bytes")


def record(run: Callable[..., Tensor], sigmas: Tensor, options: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """Return the samples (steps + 1, ...) before every step and at the end, and the noises (k, ...) that were drawn."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    first, samples = normal() * sigmas[0], []
    path = Brownian(sigmas[0], normal)
    if options.get("eta") != 0 and ("ancestral" in run.__name__ or "sde" in run.__name__):
        options = options | {"noise_sampler": path}
    last = run(denoise, first, sigmas, callback=lambda seen: samples.append(seen["x"]), disable=True, **options)
    return torch.stack([*samples, last]), torch.stack(path.drawn) if path.drawn else torch.empty(0)


class Brownian:
    """Noise for a step from one sigma to a lower one: the increment of a Brownian path in sigma, by the root of its
    length. A step that begins where the one before began goes on with the part that is known. ``drawn``: the standard
    normal numbers it is made of, one for each call."""

    def __init__(self, start: Tensor, normal: Callable[[], Tensor]) -> None:
        self.begin, self.reached, self.normal = start, start, normal
        self.walked: Tensor | None = None
        self.drawn: list[Tensor] = []

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        goes_on = self.walked is not None and math.isclose(float(sigma), float(self.begin), rel_tol=1e-12)
        if not goes_on:
            self.begin, self.reached, self.walked = sigma, sigma, torch.zeros(SHAPE, dtype=torch.float64)
        assert self.walked is not None
        self.drawn.append(self.normal())
        self.walked = self.walked + self.drawn[-1] * (self.reached - sigma_next).sqrt()
        self.reached = sigma_next
        return self.walked / (self.begin - sigma_next).sqrt()


def spaced(sampling: ModuleType, spacing: str, steps: int) -> Tensor:
    """Return k-diffusion's own sigmas, which it makes in float32, as float64: both sides start from the same."""
    space = {"karras": sampling.get_sigmas_karras, "exponential": sampling.get_sigmas_exponential}
    sigmas: Tensor = space[spacing](steps, LOW, HIGH)
    return sigmas.double()


def load_sampling() -> ModuleType:
    """Import ``k_diffusion.sampling`` without the imports of its package and torchdiffeq."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or found.submodule_search_locations is None:
        sys.exit("k_diffusion is not installed: see the top of this file for the environment it needs")
    package = ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    unused = ModuleType("torchdiffeq")
    unused.odeint = None  # type: ignore[attr-defined]
    sys.modules |= {"k_diffusion": package, "torchdiffeq": unused}
    return importlib.import_module("k_diffusion.sampling")


if __name__ == "__main__":
    main()
