"""Processes that `bench_generate.py` starts and measures from outside: each does one thing and ends.

    python scripts/_children.py picture FOLDER DTYPE STEPS OUT.png     # what somebody would write with diffusers
    python scripts/_children.py ours MODEL.safetensors WHEN            # minidiff as far as WHEN: loaded, begun, stepped
    python scripts/_children.py theirs FOLDER WHEN                     # diffusers as far
    ...

A process that is measured as far as some point ends right there, without taking down what it has built up.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = "a photograph of an astronaut riding a horse"
STEPS = 20


def picture(folder: str, dtype: str, steps: str, out: str) -> None:
    """Make a picture with diffusers; DTYPE "default" sets none."""
    import torch
    from diffusers import StableDiffusionPipeline

    options = {} if dtype == "default" else {"torch_dtype": getattr(torch, dtype)}
    pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipe(PROMPT, num_inference_steps=int(steps)).images[0].save(out)


def ours(model: str, when: str) -> None:
    """Run minidiff as far as ``when``."""
    import minidiff

    sd: Any = minidiff.load(model, device="cpu")
    if when == "loaded":
        end(weights=size(sd.parts.values()))
    end_at(sd.unet, when)
    sd.generate(PROMPT, steps=STEPS, progress=False)


def theirs(folder: str, when: str) -> None:
    """Run diffusers as far as ``when``."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    if when == "loaded":
        end(weights=size((pipe.unet, pipe.vae, pipe.text_encoder)))
    end_at(pipe.unet, when)
    pipe(PROMPT, num_inference_steps=STEPS)


def imports(which: str) -> None:
    """Only make the imports of ``ours`` or ``theirs``."""
    if which == "ours":
        from minidiff import load  # noqa: F401
    else:
        from diffusers import StableDiffusionPipeline  # noqa: F401
    end()


def pictures(model: str, count: str, steps: str) -> None:
    """Make ``count`` pictures in one batch, after a short one to warm up; an empty ``model`` is the bundled one."""
    import minidiff

    sd: Any = minidiff.load(model) if model else minidiff.bundled()
    prompt, n = "a red star on a blue background", int(count)
    sd.generate(prompt, steps=1, num_images=n, progress=False)
    begun = time.perf_counter()
    sd.generate(prompt, steps=int(steps), num_images=n, progress=False)
    end(seconds=time.perf_counter() - begun, dtype=str(sd.dtype), device=str(sd.device))


def recipe(path: str) -> None:
    """Print the recipe of a picture."""
    from minidiff import read_recipe

    end(**read_recipe(path))


def prepare(work: str, kind: str) -> None:
    """Write a Stable Diffusion 1.5 with random weights: ``folder`` as diffusers does, and two minidiff files."""
    from check_full_size import random_pipeline

    import weights_convert
    from tests.support.parity.twins import pipeline_twin

    root = Path(work)
    shutil.rmtree(root / "folder", ignore_errors=True)
    (pipeline_twin("sd1") if kind == "tiny" else random_pipeline()).save_pretrained(root / "folder")
    for dtype in ("float32", "float16"):
        (root / f"{dtype}.safetensors").unlink(missing_ok=True)
        weights_convert.convert(root / "folder", root / f"{dtype}.safetensors", dtype=dtype)


def prepare_control(work: str, kind: str) -> None:
    """Write a ControlNet with random weights for the model of ``prepare``, in two layouts, and a picture for it."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel
    from torchvision.utils import save_image

    import weights_convert

    root = Path(work)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(root / "folder" / "unet")
    widths = (8, 12, 16) if kind == "tiny" else (16, 32, 96, 256)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths)
    for parameter in net.parameters():
        if not parameter.any():  # the convolutions that training begins at zero
            torch.nn.init.normal_(parameter, std=0.01)
    net.save_pretrained(root / "controlnet")
    (root / "controlnet.safetensors").unlink(missing_ok=True)
    weights_convert.convert(root / "controlnet", root / "controlnet.safetensors")
    side = 32 if kind == "tiny" else 512
    save_image(torch.rand(3, side, side), root / "edges.png")


def controlled(work: str, dtype: str, steps: str) -> None:
    """Make a picture under a ControlNet, as ``minidiff generate`` does."""
    import torch

    import minidiff
    from minidiff import fast

    root, kind = Path(work), getattr(torch, dtype)
    sd = minidiff.StableDiffusion.load(root / "float32.safetensors", "cpu", kind, low_memory=True)
    net = minidiff.ControlModel.load(root / "controlnet.safetensors", "cpu", kind, low_memory=True)
    for model in (sd, net):
        fast.optimize(model)
    begun = time.perf_counter()
    controls = [minidiff.Control(net, root / "edges.png")]
    image = sd.generate(PROMPT, controls=controls, steps=int(steps), seed=0, progress=False)[0]
    seconds = time.perf_counter() - begun
    image.save(root / "ours.png")
    end(seconds=seconds)


def controlled_theirs(work: str, dtype: str, steps: str) -> None:
    """Make a picture under a ControlNet with diffusers."""
    import torch
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
    from PIL import Image

    root, kind = Path(work), getattr(torch, dtype)
    net = ControlNetModel.from_pretrained(root / "controlnet", torch_dtype=kind)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(root / "folder", controlnet=net, torch_dtype=kind)
    begun = time.perf_counter()
    seed = torch.Generator().manual_seed(0)
    image = pipe(PROMPT, image=Image.open(root / "edges.png"), num_inference_steps=int(steps), generator=seed).images[0]
    seconds = time.perf_counter() - begun
    image.save(root / "theirs.png")
    end(seconds=seconds)


def size(parts: Any) -> int:
    """Return the bytes of all weights."""
    return sum(p.numel() * p.element_size() for part in parts for p in part.state_dict().values())


def end_at(unet: Any, when: str) -> None:
    """Let the process end when the first call of ``unet`` begins, or when it is done."""
    if when == "begun":
        unet.register_forward_pre_hook(lambda *_: end())
    else:
        unet.register_forward_hook(lambda *_: end())


def end(**facts: Any) -> None:
    """Print ``facts`` and end the process at once."""
    print(json.dumps(facts), flush=True)
    os._exit(0)


CHILDREN = (
    *(picture, ours, theirs, imports, pictures, recipe, prepare),
    *(prepare_control, controlled, controlled_theirs),
)

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    {child.__name__: child for child in CHILDREN}[name](*arguments)
