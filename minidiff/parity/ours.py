"""minidiff's run, stage by stage: prompt, plan, first noise, every step, pixels.

    prompt/ids  prompt/text_encoder/LAYER  prompt/context     the prompt, then the same for the negative one
    prompt/ids_2  prompt/text_encoder_2/LAYER                 SDXL's second encoder; both together are step.0/context
    plan/timesteps  plan/init_noise_sigma  plan/sigmas        what the sampler will do
    start/x                                                   the first noise, already scaled
    step.0/input  step.0/t  step.0/context                    what the UNet is given
    step.0/unet/LAYER  step.0/prediction                      its layers, and what it says (both halves with guidance)
    step.0/out  step.0/noise  step.0/x                        guided; what the sampler drew; where the sample is then
    decode/vae/LAYER  decode/pixels                           the picture in [0, 1]

LAYER is a module's name in minidiff (``down.0.res.1.conv2``), ``LAYER:in`` the first tensor that it is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minidiff.parity.names import module_names
from minidiff.parity.taps import Inputs, Probe, Tap, in_float64
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.samplers.base import Draw, Sampler

UNET_INPUTS: Inputs = (
    ("input", 0, ("x", "sample")),
    ("t", 1, ("t", "timestep")),
    ("context", 2, ("context", "encoder_hidden_states")),
)
# The text encoders: what their ids are called, and their output where both programs give the same one first.
TEXTS: dict[str, tuple[str, str | None]] = {"text_encoder": ("ids", "context"), "text_encoder_2": ("ids_2", None)}

Names = Mapping[str, Mapping[str, str]]
"""part ("unet", "vae", "text_encoder") -> module's name -> the stage's name."""

Deep = Callable[[str], bool]
"""Whether the layers are stages too, scope by scope: "prompt", "negative", "step.0", ..., "decode"."""


@dataclass(frozen=True)
class Request:
    """What both sides are to make. ``prompt`` is unused by a model without text; sizes are in pixels, None the
    model's own."""

    prompt: str = "a photo of an astronaut riding a horse"
    negative: str = ""
    steps: int = 4
    scale: float = 7.5
    seed: int = 0
    height: int | None = None
    width: int | None = None
    sampler: Sampler[Any, Any] | None = None
    eta: float = 0.0  # of DDIM and TCD: diffusers' pipelines are told it at every step
    draw_like_diffusers: bool = False  # noise in the sample's dtype; minidiff's own seeds draw float32 and round it


def first_step_only(scope: str) -> bool:
    """Layers of both prompts, of the first step and of the decoder: what fits into memory at full size."""
    return not scope.startswith("step.") or scope == "step.0"


@dataclass
class Ours:
    """minidiff as a side: ``pipe`` runs ``request``. ``names`` None shows every module under its own name."""

    pipe: StableDiffusion | Unconditional
    request: Request
    names: Names | None = None
    deep: Deep = first_step_only
    title: str = "minidiff"
    plan: Any = field(default=None, init=False)

    def run(self, tap: Tap) -> None:
        """From prompt to pixels."""
        probe, pipe, r = Probe(tap, self.deep), self.pipe, self.request
        sampler = Shown(pipe.sampler(r.sampler), probe)
        noise: dict[str, Any] = {"seed": r.seed}
        if r.draw_like_diffusers:
            noise = {"generator": torch.Generator().manual_seed(r.seed)}
        with watched(probe, pipe.parts, self.names or {n: own_names(part) for n, part in pipe.parts.items()}):
            if isinstance(pipe, StableDiffusion):
                size: dict[str, Any] = {"height": r.height, "width": r.width}
                run = pipe.steps(r.prompt, r.negative, r.steps, r.scale, sampler=sampler, **noise, **size)
            else:
                run = pipe.steps(1, r.steps, sampler=sampler, **noise)
            x = run.last().x
            probe.scope = "decode"
            probe.show("pixels", pipe.decode(x))

    def wide(self) -> AbstractContextManager[None]:
        """Every part in float64."""
        return in_float64(self.pipe.parts.values())


def own_names(module: Any) -> dict[str, str]:
    """Every module under its own name."""
    return {name: name for name in module_names(module)}


@contextmanager
def watched(probe: Probe, parts: Mapping[str, Any], names: Names) -> Iterator[None]:
    """Show what the networks in ``parts`` are given, do and give; alike for whichever program they belong to."""
    with ExitStack() as stack:
        for part, module in parts.items():
            if part in TEXTS:
                texts = itertools.chain(("prompt", "negative"), (f"text.{i}" for i in itertools.count(2)))
                ids, output = TEXTS[part]
                stack.enter_context(probe.watch_root(module, texts, ((ids, 0, ("ids", "input_ids")),), output))
            if part == "unet":
                scopes = (f"step.{i}" for i in itertools.count())
                stack.enter_context(probe.watch_root(module, scopes, UNET_INPUTS, "prediction"))
            stages = {name: f"{part}/{stage}" for name, stage in names.get(part, {}).items()}
            # The VAE is not called as a whole, but for its decoder.
            stack.enter_context(probe.watch(module, stages, "decode" if part == "vae" else None))
        yield


def show_plan(probe: Probe, plan: Any) -> None:
    """The numbers of a plan (or of a scheduler of diffusers) that both programs have."""
    probe.scope = "plan"
    for name in ("timesteps", "init_noise_sigma", "sigmas"):
        value = getattr(plan, name, None)
        if isinstance(value, Tensor):
            probe.show(name, value)


class Shown:
    """A sampler that shows its plan, the first sample, and what goes into and comes out of every step."""

    def __init__(self, inner: Sampler[Any, Any], probe: Probe) -> None:
        self.inner, self.probe = inner, probe
        self.first: Tensor | None = None

    def plan(self, schedule: Any, steps: int | None = None, *, timesteps: Any = None, sigmas: Any = None) -> Any:
        """The inner one's, shown."""
        plan = self.inner.plan(schedule, steps, timesteps=timesteps, sigmas=sigmas)
        show_plan(self.probe, plan)
        return plan

    def start(self) -> Any:
        """The inner one's."""
        return self.inner.start()

    def scale_input(self, plan: Any, i: int, x: Tensor) -> Tensor:
        """The inner one's, of the sample that was shown."""
        if i == 0:
            self.probe.scope = "start"
            x = self.first = self.probe.show("x", x)
        return self.inner.scale_input(plan, i, x)

    def denoised(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any) -> Tensor | None:
        """The inner one's."""
        return self.inner.denoised(plan, i, x, out, state)

    def step(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any, draw: Draw) -> tuple[Tensor, Any]:
        """The inner one's, from what was shown to what is shown."""
        x = self.first if i == 0 and self.first is not None else x
        out = self.probe.show("out", out)
        x, state = self.inner.step(plan, i, x, out, state, lambda like: self.probe.show("noise", draw(like)))
        return self.probe.show("x", x), state
