"""Writer for k-diffusion: its denoiser and its samplers around a UNet, on the run of another recording.

    minidiff parity record FOLDER minidiff.safetensors --sampler heun --steps 4 --layers none
    python scripts/recorders/k_diffusion_samplers.py FOLDER minidiff.safetensors k_diffusion.safetensors

It begins with the recording's first sample and encoded prompts, and takes its noise. Sigmas, timesteps, scaling and
steps are k-diffusion's own, the UNet is minidiff's. Afterwards the two recordings are compared.

Needs torch, ``pip install scipy torchsde`` and ``pip install --no-deps k-diffusion``: only three modules of its package
are loaded, since the others import a dozen packages that no sampler has a use for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from minidiff.parity.writer import Writer

# minidiff's name of a sampler: k-diffusion's function
SAMPLERS = {
    "euler": "sample_euler",
    "euler_ancestral": "sample_euler_ancestral",
    "heun": "sample_heun",
    "lms": "sample_lms",
}
UNet = Callable[[Tensor, Tensor, Tensor], Tensor]


@functools.cache
def load() -> ModuleType:
    """Import ``k_diffusion.external`` (its ``sampling`` is the module of samplers), but not the rest of the package.

    torchdiffeq, which nothing calls here, is left out.
    """
    found = importlib.util.find_spec("k_diffusion")
    if found is None or found.submodule_search_locations is None:
        sys.exit("k-diffusion is not installed: pip install --no-deps k-diffusion")
    package, unused = ModuleType("k_diffusion"), ModuleType("torchdiffeq")
    package.__spec__, package.__path__ = found, list(found.submodule_search_locations)
    vars(unused)["odeint"] = None
    sys.modules |= {"k_diffusion": package, "torchdiffeq": unused}
    return importlib.import_module("k_diffusion.external")


def record(unet: UNet, alphas_cumprod: Tensor, followed: Path, out: Path) -> None:
    """Run k-diffusion as the recording ``followed`` was run, and record it. Steps are calls of the UNet.

    ``alphas_cumprod``: those of the model, (T,).
    """
    with safe_open(followed, "pt") as file:
        run: dict[str, Any] = json.loads(file.metadata()["recording.run"])
    tape, calls = load_file(followed), itertools.count()
    context = torch.cat([tape["negative/context"], tape["prompt/context"]])
    noises = (tape[f"step.{i}/noise"] for i in itertools.count() if f"step.{i}/noise" in tape)
    about = {key: run[key] for key in ("prompt", "negative", "steps", "scale", "sampler")}
    version = importlib.metadata.version("k-diffusion")
    with Writer(out, "k-diffusion", version=version, dtype="float32", **about) as writer:

        def shown(x: Tensor, t: Tensor) -> Tensor:
            prediction = unet(x, t, context)
            for name, value in (("input", x), ("t", t[0]), ("prediction", prediction)):
                writer.add(f"step.{call}/{name}", value.numpy())
            return prediction

        denoiser = load().DiscreteEpsDDPMDenoiser(shown, alphas_cumprod, quantize=False)

        def guided(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal call
            call = next(calls)
            writer.add("start/x" if call == 0 else f"step.{call - 1}/x", x.numpy())
            unconditional, conditional = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma])).chunk(2)
            denoised: Tensor = unconditional + run["scale"] * (conditional - unconditional)
            return denoised

        call, sigmas = 0, denoiser.get_sigmas(run["steps"])
        if sigmas.shape == tape["plan/sigmas"].shape:  # where a step is one call
            writer.add("plan/sigmas", sigmas.numpy())
        sample = getattr(load().sampling, SAMPLERS[run["sampler"]])
        options = {"noise_sampler": lambda *_: next(noises)} if "ancestral" in run["sampler"] else {}
        with torch.no_grad():
            x = sample(guided, tape["start/x"], sigmas, disable=True, **options)
        writer.add(f"step.{call}/x", x.numpy())


if __name__ == "__main__":
    import weights_convert
    from minidiff.parity.comparing import compare
    from minidiff.parity.values import open_recording

    if len(sys.argv) != 4:
        sys.exit("usage: k_diffusion_samplers.py FOLDER FOLLOWED OUT")
    model: Any = weights_convert.load(sys.argv[1], device="cpu")
    record(model.unet, model.schedule.alphas_cumprod, Path(sys.argv[2]), Path(sys.argv[3]))
    with open_recording(sys.argv[2]) as a, open_recording(sys.argv[3]) as b:
        print(compare(a, b, 1.5e-5))
