"""iPNDM: a fourth-order multistep method for models that predict v along the "crash" schedule (Dance Diffusion).

It is PNDM (pndm.py) without the repeated first interval: the first steps have less history, and a lower order, instead
("improved PNDM", Zhang & Chen 2023, section 3.4). Time runs from 1 to 0, and the noise is by definition

    noise = sin(pi t / 2)**2        signal = sqrt(1 - noise**2)        told to the model: 2 / pi * atan2(noise, signal)

so no schedule of training is needed, and none counts. Each step makes epsilon of v, combines the latest four by the
weights of Adams and Bashforth, and follows that to the next time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.samplers.base import Draw, Options, Plan, check_chosen, unit
from minidiff.samplers.pndm import adams_bashforth
from minidiff.schedule import NoiseSchedule, check_steps, x0_from_v

MAX_STEPS = 1000
SMALLEST_SIGNAL = 1e-8  # the first row is pure noise; there x0 times it is 0 by 0


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class IPNDMPlan(Plan):
    """``signal`` and ``noise`` (n + 1,): at every row, and where the last step lands; ``divisor`` (n,): the signal,
    where it is not 0."""

    signal: Tensor
    noise: Tensor
    divisor: Tensor

    def columns(self) -> dict[str, Tensor | Sequence[Any]]:
        n = len(self)
        return super().columns() | {"signal": self.signal[:n], "noise": self.noise[:n], "to noise": self.noise[1:]}


@dataclass(frozen=True, kw_only=True)
class IPNDM(Options):
    """No options. The model's answer is taken for v, whatever the schedule says. ``like_diffusers`` changes nothing."""

    own_levels: ClassVar[bool] = True

    def plan(
        self,
        schedule: NoiseSchedule | None,
        steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> IPNDMPlan:
        """``steps`` in 1..1000; the reference takes no timesteps or sigmas of one's own, and neither does this."""
        check_chosen(self, "steps", steps=steps, timesteps=timesteps, sigmas=sigmas)
        n = check_steps(steps, MAX_STEPS)
        time = torch.linspace(1, 0, n + 1, dtype=torch.float32, device="cpu")
        noise = torch.sin(time * math.pi / 2) ** 2
        signal = (1.0 - noise**2) ** 0.5
        return IPNDMPlan(
            timesteps=(torch.atan2(noise, signal) / math.pi * 2)[:-1],
            alpha_bars=signal[:-1] ** 2,
            init_noise_sigma=unit(),
            prediction="v_prediction",
            signal=signal,
            noise=noise,
            divisor=signal[:-1].clamp(min=SMALLEST_SIGNAL),
        )

    def start(self) -> tuple[Tensor, ...]:
        """The epsilons so far, oldest first, three of them at most."""
        return ()

    def scale_input(self, plan: IPNDMPlan, i: int, x: Tensor) -> Tensor:
        return x

    def denoised(self, plan: IPNDMPlan, i: int, x: Tensor, out: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        return x0_from_v(x, out, plan.signal[i], plan.noise[i])

    def step(
        self, plan: IPNDMPlan, i: int, x: Tensor, out: Tensor, state: tuple[Tensor, ...], draw: Draw
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        history = (*state, x * plan.noise[i] + out * plan.signal[i])
        epsilon = adams_bashforth(history)
        x0 = (x - plan.noise[i] * epsilon) / plan.divisor[i]
        return plan.signal[i + 1] * x0 + epsilon * plan.noise[i + 1], history[-3:]
