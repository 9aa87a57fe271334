"""Planted errors: the guard of ``cuda_guard.py`` sees each kind, in samplers, in models and in the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff.config import ScheduleConfig
from minidiff.models.unet import UNet
from minidiff.pipeline import guidance
from minidiff.pipeline.denoise import denoise
from minidiff.pipeline.job import Job, Prediction
from minidiff.samplers import DDIM, EulerAncestral
from minidiff.schedule import NoiseSchedule
from tests.support.cuda_guard import CudaGuard, GuardError, fake_card
from tests.unit.test_fake_cuda import UNETS, build, on_card, randn, sd1, watch_loop

Plant = Callable[[Any, int, Tensor], Tensor]

PLANTS: dict[str, tuple[str, Plant]] = {
    "a sum of two dtypes": ("mixed dtypes: add", lambda plan, i, x: x + x.float()),
    "a product of two dtypes": ("mixed dtypes: mul", lambda plan, i, x: x * torch.ones_like(x, dtype=torch.float64)),
    "a coefficient as a float": ("the host waits", lambda plan, i, x: x * plan.signal[i].item()),
    "a constant as a float": ("the host waits", lambda plan, i, x: x * float(torch.tensor(0.5))),
    "a timestep read back": ("the host waits", lambda plan, i, x: x * int(plan.timesteps[i])),
    "a decision by the data": ("the host waits", lambda plan, i, x: x if bool((x > 0).any()) else -x),
    "a comparison": ("the host waits: equal", lambda plan, i, x: x if torch.equal(x, x) else -x),
    "a mask as an index": ("the host waits: index", lambda plan, i, x: x + x[x > 0].sum()),
    "a scalar made on the card": (
        "copy inside the loop",
        lambda plan, i, x: x * torch.tensor(0.5, dtype=x.dtype, device=x.device),
    ),
    "a row moved": ("copy inside the loop", lambda plan, i, x: x * plan.signal.to(x.device, x.dtype)[i]),
    "a copy into the sample": ("copy inside the loop: copy_", lambda plan, i, x: x.copy_(torch.zeros(x.shape))),
    "a copy to the host": ("copy inside the loop", lambda plan, i, x: x if x.cpu() is x else -x),
    "a stray host tensor": ("mixed devices: mul", lambda plan, i, x: x * torch.ones(x.shape[-1], dtype=x.dtype)),
    "a host table indexed on the card": (
        "mixed devices: index",
        lambda plan, i, x: x * plan.signal[plan.timesteps[i : i + 1]].mean(),
    ),
    "a table on the card indexed by the host": (
        "mixed devices: index",
        lambda plan, i, x: x + plan.timesteps[torch.arange(1)].to(x.dtype),
    ),
    "gather": (
        "mixed devices: index_select",
        lambda plan, i, x: x * plan.signal.index_select(0, plan.timesteps[:1]).mean(),
    ),
    "stack": ("mixed devices: stack", lambda plan, i, x: x * torch.stack([plan.signal[i], x.sum().float()]).sum()),
    "lerp": ("mixed devices: lerp", lambda plan, i, x: torch.lerp(x, x, plan.signal[i].to(x.dtype))),
    "where": ("mixed devices: where", lambda plan, i, x: torch.where(x > 0, plan.signal[i].to(x.dtype), x)),
    "clamp": ("mixed devices: clamp", lambda plan, i, x: x.clamp(max=plan.signal[i].to(x.dtype))),
    "a sum into a coefficient": ("mixed devices: add_", lambda plan, i, x: plan.signal[i].clone().add_(x.sum()) * x),
    "a generator of the host": (
        "wrong generator: randn",
        lambda plan, i, x: torch.randn(x.shape, generator=torch.Generator(), dtype=x.dtype, device=x.device),
    ),
}


@pytest.mark.parametrize("method", ["scale_input", "step", "denoised"])
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_error_is_caught(plant: str, method: str) -> None:
    """In each method of a sampler."""
    message, planted = PLANTS[plant]
    if method != "step" and plant == "a copy into the sample":
        method = "step"

    class Planted(DDIM):
        pass

    def patched(self: Any, plan: Any, i: int, x: Tensor, *rest: Any) -> Any:
        return getattr(DDIM, method)(self, plan, i, planted(plan, i, x), *rest)

    setattr(Planted, method, patched)
    with pytest.raises(GuardError, match=f"^{message}"):
        run_toy(Planted(), guarded=True)


def run_toy(sampler: Any, guarded: bool) -> None:
    """Two steps of ``sampler`` with a model that halves, on a fake card."""
    card = fake_card()
    plan = sampler.plan(NoiseSchedule.from_config(ScheduleConfig()), 2)
    with card:
        plan = plan.to("cuda")
        with CudaGuard() if guarded else nullcontext():
            x = randn(1, 4, 4, 4, dtype=torch.float16)
            for _ in denoise(
                Job(predict=lambda x, t: Prediction(0.5 * x), sampler=sampler, plan=plan, x=x, draw=torch.randn_like)
            ):
                pass


def test_without_a_planted_error_nothing_is_caught() -> None:
    run_toy(DDIM(), guarded=True)


def widened(unet: UNet) -> None:
    unet.mid.float()


def on_the_host(unet: UNet) -> None:
    unet.time.linear1.weight = nn.Parameter(torch.zeros(unet.time.linear1.weight.shape, dtype=torch.float16))


@pytest.mark.parametrize(("plant", "message"), [(widened, "mixed dtypes"), (on_the_host, "mixed devices")])
def test_a_model_with_a_planted_error_is_caught(plant: Callable[[UNet], None], message: str) -> None:
    card = fake_card()
    unet = build(card, UNet, UNETS["sd1"], torch.float16)
    with card:
        if plant is widened:  # as `.float()` on a part of it would leave it; fake parameters can't be converted
            config = UNETS["sd1"]
            unet.mid = build(card, lambda c: UNet(c).mid, config, torch.float32)
        else:
            plant(unet)
    with on_card(card), pytest.raises(GuardError, match=f"^{message}"):
        unet(
            randn(1, 4, 8, 8, dtype=torch.float16),
            torch.full((), 981, device="cuda"),
            randn(1, 5, 24, dtype=torch.float16),
        )


def float32_guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    return unconditional + scale * (conditional - unconditional).float()


def waiting_guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    return unconditional + scale * conditional.std().item() * (conditional - unconditional)


def copying_guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    return unconditional + torch.tensor(scale, device=conditional.device) * (conditional - unconditional)


@pytest.mark.parametrize(
    ("guide", "message"),
    [(float32_guide, "mixed dtypes"), (waiting_guide, "the host waits"), (copying_guide, "copy inside the loop")],
)
def test_a_pipeline_with_a_planted_error_is_caught(guide: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = fake_card()
    sd = sd1(card, torch.float16)
    monkeypatch.setattr(guidance, "guide", guide)
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, DDIM, guard)
        run = sd.steps("a cat", steps=2, sampler="ddim", seed=0)
        with pytest.raises(GuardError, match=f"^{message}"):
            next(run)


def test_noise_from_the_host_inside_the_loop_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    card = fake_card()
    sd = sd1(card, torch.float16)
    with on_card(card, loop=False) as guard:
        watch_loop(monkeypatch, EulerAncestral, guard)
        run = sd.steps("a cat", steps=2, sampler="euler_ancestral", seed=0)
        with pytest.raises(GuardError, match=r"^copy inside the loop"):
            next(run)
