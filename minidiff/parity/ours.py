"""minidiff's run, stage by stage: from prompt (and picture) to pixels. The stages are listed in ``stages.py``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from minidiff.parity.names import module_names
from minidiff.parity.stages import Deep, Names, first_step_only, show_noising, show_plan, watched
from minidiff.parity.taps import Probe, Tap, in_float64
from minidiff.pipeline import StableDiffusion, Unconditional
from minidiff.pipeline.request import Request
from minidiff.samplers.method import Draw, Sampler

PROMPT = "a photo of an astronaut riding a horse"


@dataclass(frozen=True)
class Asked(Request):
    """Request for a picture that both sides generate. ``image`` and ``mask`` already have the size of the run."""

    _: KW_ONLY
    eta: float = 0.0  # of DDIM and TCD: diffusers' pipelines pass it in every step
    draw_like_diffusers: bool = False  # noise in the sample's dtype; minidiff's own seeds draw float32 and round it


def asked(prompt: str | None = PROMPT, **given: Any) -> Asked:
    """Return a request with the defaults of a comparison: few steps, and nothing left to chance or to the model.

    ``prompt``: None for an unconditional model.
    """
    texts = {} if prompt is None else {"negative_prompt": "", "guidance_scale": 7.5}
    return Asked(prompt, **{**texts, "steps": 4, "seed": 0, **given})


@dataclass
class Ours:
    """minidiff as a side: ``pipe`` runs ``request``. With ``names`` None, modules are shown under their own names."""

    pipe: StableDiffusion | Unconditional
    request: Asked
    names: Names | None = None
    deep: Deep = first_step_only
    title: str = "minidiff"

    def run(self, tap: Tap) -> None:
        """Run from prompt to pixels."""
        probe, pipe, r = Probe(tap, self.deep), self.pipe, self.request
        shown = replace(r, sampler=cast(Sampler[Any, Any], Shown(pipe.sampler(r.sampler), probe)))
        if r.draw_like_diffusers:
            assert isinstance(r.seed, int)
            shown = replace(shown, seed=None, generator=torch.Generator().manual_seed(r.seed))
        parts = self.parts
        with watched(probe, parts, self.names or {n: own_names(part) for n, part in parts.items()}):
            run = pipe.run(shown)
            x = run.last().x
            probe.scope = "decode"
            probe.show("pixels", pipe.decode(x))

    def wide(self) -> AbstractContextManager[None]:
        """Return a context in which every part is in float64."""
        return in_float64(self.parts.values())

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks of the run, those of its controls by ``control.0``, ``control.1``, ..."""
        controls = self.request.controls or ()
        return {
            **self.pipe.parts,
            **{f"control.{k}": control.model.parts["control"] for k, control in enumerate(controls)},
        }


def own_names(module: Any) -> dict[str, str]:
    """Map every module to its own name."""
    return {name: name for name in module_names(module)}


class Shown:
    """Wrapper of a sampler that shows its plan, the first sample, and the inputs and outputs of every step."""

    def __init__(self, inner: Sampler[Any, Any], probe: Probe) -> None:
        self.inner, self.probe = inner, probe
        self.first_shown = False
        self.first: Tensor | None = None

    @property
    def order(self) -> int:
        """Model calls per step."""
        return int(getattr(self.inner, "order", 1))

    def start(self) -> Any:
        """Return the wrapped sampler's state before the first step."""
        return self.inner.start()

    def plan(self, schedule: Any = None, steps: int | None = None, *, timesteps: Any = None, sigmas: Any = None) -> Any:
        """Return the plan of the wrapped sampler, and show it."""
        plan = self.inner.plan(schedule, steps, timesteps=timesteps, sigmas=sigmas)
        show_plan(self.probe, plan)
        return ShownPlan(plan, self.probe)

    def scale_input(self, plan: Any, i: int, x: Tensor) -> Tensor:
        """Scale the sample that was shown, by the wrapped sampler."""
        if not self.first_shown:
            self.first_shown = True
            x = self.first = self.probe.show("x", x, "start")
        return self.inner.scale_input(plan.inner, i, x)

    def denoised(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any) -> Tensor | None:
        """Return the wrapped sampler's estimate of x0, if it has one."""
        return self.inner.denoised(plan.inner, i, x, out, state)

    def step(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any, draw: Draw) -> tuple[Tensor, Any]:
        """Take the step of the wrapped sampler on the values shown, and show the result."""
        x, self.first = x if self.first is None else self.first, None
        out = self.probe.show("out", out)
        x, state = self.inner.step(plan.inner, i, x, out, state, lambda like: self.probe.show("noise", draw(like)))
        return self.probe.show("x", x), state


class ShownPlan:
    """Wrapper of a plan that shows the noise it adds to a picture."""

    def __init__(self, inner: Any, probe: Probe) -> None:
        self.inner, self.probe = inner, probe

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def to(self, device: torch.device) -> ShownPlan:
        """Return the wrapped plan on another device, wrapped again."""
        return ShownPlan(self.inner.to(device), self.probe)

    def add_noise(self, x0: Tensor, noise: Tensor, i: int) -> Tensor:
        """Return the wrapped plan's noisy picture, and show picture and noise."""
        return show_noising(self.probe, lambda x0, noise: self.inner.add_noise(x0, noise, i), x0, noise)
