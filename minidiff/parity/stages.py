"""The stages of a run, and the observation of the networks, in the same way for every program.

    prompt/ids  prompt/text_encoder/LAYER  prompt/context     the prompt, then the same for the negative one
    prompt/ids_2  prompt/text_encoder_2/LAYER                 SDXL's second encoder; both together are step.0/context
    plan/timesteps  plan/init_noise_sigma  plan/sigmas        what the sampler will do
    encode/pixels  encode/vae/LAYER                           a picture in [-1, 1] on its way in; the masked one
    encode/latents  encode/added  encode/noisy                a picture's latents, scaled; the noise; one with the other
    start/x                                                   the first sample: noise, already scaled, or that
    step.0/input  step.0/t  step.0/context                    what the UNet is given
    step.0/mask  step.0/masked                                in further channels, by a model that inpaints
    step.0/pooled  step.0/sizes                               SDXL: the pooled text; the sizes, or the refiner's score
    step.0/unet/LAYER  step.0/prediction                      its layers, and its output (both halves with guidance)
    step.0/out  step.0/noise  step.0/x                        guided; the sampler's noise; the sample afterwards
    step.0/latents  step.0/added  step.0/noisy                what an ordinary model keeps of a masked picture
    control.0/LAYER                                           the first control, when it is first called
    decode/vae/LAYER  decode/pixels                           the picture in [0, 1]

LAYER is a module's name in minidiff (``down.0.res.1.conv2``), ``LAYER:in`` its first input tensor. Repeated stages of a
section are numbered (``encode/pixels#2``). Steps are counted from the first that is run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from minidiff.parity.taps import Inputs, Probe, named

Names = Mapping[str, Mapping[str, str]]
"""part ("unet", "vae", "text_encoder") -> module's name -> the stage's name."""

Deep = Callable[[str], bool]
"""Choice of the scopes whose layers are stages too: "prompt", "negative", "encode", "step.0", ..., "decode"."""

# The text encoders: the name of their ids, and of their output if both programs return the same one first.
TEXTS: dict[str, tuple[str, str | None]] = {"text_encoder": ("ids", "context"), "text_encoder_2": ("ids_2", None)}
# minidiff reads its table of positions without calling the module, so there is no call to compare. The positions appear
# in the sum with the tokens, at ``layers.0:in``.
NOT_CALLED = ("position",)
ENCODES = ("encoder", "quant")  # the modules of the VAE that a picture goes in by
CONTROL, LATER = "control.", ".later"  # the scope of a control, and of its calls after the first


def first_step_only(scope: str) -> bool:
    """Return True for the scopes whose layers are shown by default: all but later steps, to fit into memory."""
    return (not scope.startswith("step.") or scope == "step.0") and not scope.endswith(LATER)


@contextmanager
def watched(probe: Probe, parts: Mapping[str, Any], names: Names) -> Iterator[None]:
    """Show inputs, layers and outputs of the networks in ``parts``."""
    with ExitStack() as stack:
        for part, module in parts.items():
            if part in TEXTS:
                texts = itertools.chain(("prompt", "negative"), (f"text.{i}" for i in itertools.count(2)))
                ids, output = TEXTS[part]
                inputs: Inputs = ((named(ids), 0, ("ids", "input_ids")),)
                stack.enter_context(probe.watch_root(module, texts, inputs, output))
            if part == "unet":
                scopes = (f"step.{i}" for i in itertools.count())
                stack.enter_context(probe.watch_root(module, scopes, unet_inputs(parts), "prediction"))
            if part == "vae":
                pixels: Inputs = ((named("pixels"), 0, ("x", "sample")),)
                stack.enter_context(probe.watch_root(module.encoder, itertools.repeat("encode"), pixels))
            if part.startswith(CONTROL):
                layers = names.get(part, {})
                calls = itertools.chain([part], itertools.repeat(part + LATER))
                stack.enter_context(probe.watch_root(module, calls, ()))
                # minidiff computes the hint once, before the first call of the rest.
                hint = {name: stage for name, stage in layers.items() if stage.split(".")[0] == "hint"}
                stack.enter_context(probe.watch(module, hint, part))
                stack.enter_context(probe.watch(module, {k: v for k, v in layers.items() if k not in hint}))
                continue
            stages = {name: f"{part}/{stage}" for name, stage in names.get(part, {}).items()}
            if part == "vae":  # it is not called as a whole, but for either half
                into = {name: stage for name, stage in stages.items() if stage.split("/")[1].split(".")[0] in ENCODES}
                stack.enter_context(probe.watch(module, into, "encode"))
                stages = {name: stage for name, stage in stages.items() if name not in into}
            stack.enter_context(probe.watch(module, stages, "decode" if part == "vae" else None))
        yield


def unet_inputs(parts: Mapping[str, Any]) -> Inputs:
    """Return the inputs of the UNet, under their names in either program."""
    latent: int | None = parts["vae"].config.latent_channels if "vae" in parts else None

    def sample(probe: Probe, x: Tensor) -> Tensor:
        if latent is None or x.shape[1] == latent:
            shown: Tensor = probe.show("input", x)
            return shown
        before = torch.split(x, [latent, 1, x.shape[1] - latent - 1], dim=1)
        after = [probe.show(name, part) for name, part in zip(("input", "mask", "masked"), before, strict=True)]
        return x if all(a is b for a, b in zip(before, after, strict=True)) else torch.cat(after, dim=1)

    def added(probe: Probe, given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(probe.show(name, one) for name, one in zip(("pooled", "sizes"), given, strict=True))
        if isinstance(given, Mapping):
            pairs = (("text_embeds", "pooled"), ("time_ids", "sizes"))
            return {**given, **{key: probe.show(name, given[key]) for key, name in pairs if key in given}}
        return given

    return (
        (sample, 0, ("x", "sample")),
        (named("t"), 1, ("t", "timestep")),
        (named("context"), 2, ("context", "encoder_hidden_states")),
        (added, 3, ("added", "added_cond_kwargs")),
    )


def show_plan(probe: Probe, plan: Any) -> None:
    """Show the numbers of a plan (or of a diffusers scheduler) that both programs have."""
    for name in ("timesteps", "init_noise_sigma", "sigmas"):
        value = getattr(plan, name, None)
        if isinstance(value, Tensor):
            probe.show(name, value, "plan")


def show_noising(probe: Probe, add_noise: Callable[[Tensor, Tensor], Tensor], latents: Tensor, noise: Tensor) -> Tensor:
    """Show the noise that is added to a picture, its amount, and the result."""
    latents, noise = probe.show("latents", latents), probe.show("added", noise)
    noisy: Tensor = probe.show("noisy", add_noise(latents, noise))
    return noisy
