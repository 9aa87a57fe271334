"""minidiff's run, stage by stage: from prompt (and picture) to pixels. The stages stand in ``stages.py``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.parity.names import module_names
from minidiff.parity.stages import Deep, Names, first_step_only, show_noising, show_plan, watched
from minidiff.parity.taps import Probe, Tap, in_float64
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.samplers.method import Draw, Sampler
from minidiff.samplers.wrapped import Wrapped

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Request:
    """Picture for both sides to make. ``prompt`` is unused by a model without text; sizes are in pixels, None the
    model's own. ``image`` and ``mask``, RGB and grey, are of that size; ``image`` None begins from noise alone."""

    prompt: str = "a photo of an astronaut riding a horse"
    negative: str = ""
    steps: int = 4
    scale: float = 7.5
    seed: int = 0
    height: int | None = None
    width: int | None = None
    sampler: Sampler[Any, Any] | None = None
    eta: float = 0.0  # of DDIM and TCD: diffusers' pipelines are told it at every step
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float = 0.8
    draw_like_diffusers: bool = False  # noise in the sample's dtype; minidiff's own seeds draw float32 and round it


@dataclass
class Ours:
    """minidiff as a side: ``pipe`` runs ``request``. ``names`` None shows every module under its own name."""

    pipe: StableDiffusion | Unconditional
    request: Request
    names: Names | None = None
    deep: Deep = first_step_only
    title: str = "minidiff"

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
                begin: dict[str, Any] = {"image": r.image, "mask": r.mask, "strength": r.strength}
                run = pipe.steps(r.prompt, r.negative, r.steps, r.scale, sampler=sampler, **noise, **size, **begin)
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


class Shown(Wrapped):
    """A sampler that shows its plan, the first sample, and what goes into and comes out of every step."""

    def __init__(self, inner: Sampler[Any, Any], probe: Probe) -> None:
        super().__init__(inner)
        self.probe = probe
        self.begun = False
        self.first: Tensor | None = None

    def plan(self, schedule: Any = None, steps: int | None = None, *, timesteps: Any = None, sigmas: Any = None) -> Any:
        """The inner one's, shown."""
        plan = self.inner.plan(schedule, steps, timesteps=timesteps, sigmas=sigmas)
        show_plan(self.probe, plan)
        return ShownPlan(plan, self.probe)

    def scale_input(self, plan: Any, i: int, x: Tensor) -> Tensor:
        """The inner one's, of the sample that was shown."""
        if not self.begun:
            self.begun = True
            x = self.first = self.probe.show("x", x, "start")
        return self.inner.scale_input(plan.inner, i, x)

    def denoised(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any) -> Tensor | None:
        """The inner one's."""
        return self.inner.denoised(plan.inner, i, x, out, state)

    def step(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any, draw: Draw) -> tuple[Tensor, Any]:
        """The inner one's, from what was shown to what is shown."""
        x, self.first = x if self.first is None else self.first, None
        out = self.probe.show("out", out)
        x, state = self.inner.step(plan.inner, i, x, out, state, lambda like: self.probe.show("noise", draw(like)))
        return self.probe.show("x", x), state


class ShownPlan:
    """A plan that shows what noise it adds to a picture."""

    def __init__(self, inner: Any, probe: Probe) -> None:
        self.inner, self.probe = inner, probe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def to(self, device: torch.device) -> ShownPlan:
        """The inner one's, still shown."""
        return ShownPlan(self.inner.to(device), self.probe)

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """The inner one's."""
        return show_noising(self.probe, lambda x0, noise: self.inner.add_noise(x0, noise, i), x0, noise)
