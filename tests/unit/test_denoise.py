"""The denoising loop: the contents of a Step, the changes that a consumer may make, and what stays untouched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.pipeline.denoise import Run, Step, denoise
from minidiff.pipeline.job import Job, Prediction
from minidiff.pipeline.recipe import Made, Recipe
from minidiff.pipeline.request import Request
from minidiff.samplers import SAMPLERS, sampler_from_config
from minidiff.schedule import NoiseSchedule
from tests.tolerances import assert_close

SCHEDULE = NoiseSchedule.from_config(ScheduleConfig())


class Model:
    """A model that counts its calls and answers with something that depends on x and t."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.weight = torch.nn.Parameter(torch.tensor(0.3))
        self.grad: list[bool] = []

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        self.seen.append((x, t))
        self.grad.append(torch.is_grad_enabled())
        out = self.weight * torch.sin(x) + t.float() / 1000
        return Prediction(out, 2 * out, 3 * out)


def noise() -> Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))


def draws(seed: int = 2) -> Any:
    g = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=g, dtype=like.dtype)


def job(model: Any, sampler: Any, plan: Any, x: Tensor) -> Job:
    return Job(plan=plan, sampler=sampler, x=x, predict=model, draw=draws())


def start(model: Model, name: str = "ddim", steps: int = 5, first: int = 0) -> Run:
    sampler = sampler_from_config({"name": name})
    plan = sampler.plan(SCHEDULE, steps)
    rows, recipes = (
        range(first, len(plan)),
        [Recipe(request=Request(None, seed=s), made=Made(), text=False) for s in (1, 2)],
    )
    x = noise() * plan.init_noise_sigma
    return Run(Job(plan=plan, sampler=sampler, rows=rows, x=x, predict=model, draw=draws(), recipes=tuple(recipes)))


@pytest.fixture(params=sorted(SAMPLERS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_step_is_the_samplers(name: str) -> None:
    """The loop adds nothing of its own: written out by hand it gives the same bits."""
    sampler, model, draw = sampler_from_config({"name": name}), Model(), draws()
    plan = sampler.plan(SCHEDULE, 5)
    x, state = noise() * plan.init_noise_sigma, sampler.start()
    steps = list(start(Model(), name))
    assert len(steps) == len(plan) == len(plan.timesteps)
    for i, step in enumerate(steps):
        with torch.no_grad():
            out = model(sampler.scale_input(plan, i, x), plan.timesteps[i]).out
            x0 = sampler.denoised(plan, i, x, out, state)
            x, state = sampler.step(plan, i, x, out, state, draw)
        assert step.i == i
        assert torch.equal(step.t, plan.timesteps[i])
        assert_close(step.out, out)
        assert_close(step.x, x)
        assert step.conditional is not None
        assert step.unconditional is not None
        assert_close(step.conditional, 2 * out)
        assert_close(step.unconditional, 3 * out)
        if x0 is None:
            assert step.x0 is None
        else:
            assert step.x0 is not None
            assert_close(step.x0, x0)


def test_gradients_between_two_steps_are_the_callers() -> None:
    """TRAPS: `with torch.no_grad(): yield` would leave them off."""
    model = Model()
    assert torch.is_grad_enabled()
    seen = []
    for step in start(model):
        seen.append(torch.is_grad_enabled())
        assert not step.x.requires_grad
        loss = (model.weight * step.x).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert step.x0 is not None
        assert not step.x0.requires_grad
        assert torch.is_grad_enabled()
    assert seen == [True] * 5
    assert model.grad == [False] * 5
    assert model.weight.grad is not None
    assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in start(model):
            assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    run = start(model)
    next(run)
    run.close()
    assert torch.is_grad_enabled()


def test_an_error_in_the_model_leaves_gradients_on() -> None:
    def broken(x: Tensor, t: Tensor) -> Prediction:
        raise RuntimeError("no")

    sampler = sampler_from_config({"name": "ddim"})
    with pytest.raises(RuntimeError, match="no"):
        list(denoise(job(broken, sampler, sampler.plan(SCHEDULE, 2), noise())))
    assert torch.is_grad_enabled()


def test_an_assigned_x_changes_the_rest(name: str) -> None:
    plain = list(start(Model(), name))
    changed, edited = [], Model()
    for step in start(edited, name):
        if step.i == 2:
            step.x = step.x + 1
        changed.append(step)
    for a, b in zip(plain[:2], changed[:2], strict=True):
        assert_close(a.x, b.x)
    assert_close(plain[2].out, changed[2].out)
    assert_close(plain[2].x + 1, changed[2].x)
    for a, b in zip(plain[3:], changed[3:], strict=True):
        assert not torch.equal(a.out, b.out)  # the model saw the edited sample
        assert not torch.equal(a.x, b.x)


def test_a_sample_that_requires_gradients_may_be_put_in() -> None:
    for step in start(Model()):
        assert step.x0 is not None
        assert not step.x0.requires_grad
        step.x = step.x.clone().requires_grad_()
    assert step.x.requires_grad


def test_x0_is_computed_when_it_is_read_and_from_this_step() -> None:
    calls: list[int] = []
    sampler: Any = sampler_from_config({"name": "ddim"})
    real = type(sampler).denoised

    class Counting(type(sampler)):  # type: ignore[misc]
        def denoised(self, plan: Any, i: int, *rest: Any) -> Any:
            calls.append(i)
            return real(self, plan, i, *rest)

        def step(self, *args: Any) -> Any:  # the step's own use does not count
            result = super().step(*args)
            calls.clear()
            return result

    counting = Counting()
    steps = list(denoise(job(Model(), counting, counting.plan(SCHEDULE, 5), noise())))
    assert calls == []
    late = [step.x0 for step in steps]  # long after, and in any order
    assert calls == [0, 1, 2, 3, 4]
    for now, then in zip(start(Model()), late, strict=True):
        assert now.x0 is not None
        assert then is not None
        assert_close(now.x0, then)


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    model = Model()
    run = start(model)
    assert model.seen == []
    next(run)
    assert len(model.seen) == 1
    next(run)
    run.close()
    assert list(run) == []
    assert len(model.seen) == 2


def test_the_input_and_the_plan_stay_as_they_were(name: str) -> None:
    sampler = sampler_from_config({"name": name})
    plan, x = sampler.plan(SCHEDULE, 5), noise()
    shown, before, version = str(plan), x.clone(), x._version
    held: list[tuple[Tensor, Tensor]] = []
    for step in denoise(job(Model(), sampler, plan, x)):
        held.append((step.x, step.x.clone()))
    assert_close(x, before)
    assert x._version == version
    assert str(plan) == shown
    for now, then in held:  # no step writes into the sample of an earlier one
        assert_close(now, then)


def test_the_same_run_twice_gives_the_same(name: str) -> None:
    for a, b in zip(start(Model(), name), start(Model(), name), strict=True):
        assert_close(a.x, b.x)


def test_a_run_may_begin_at_a_later_row() -> None:
    steps = list(start(Model(), steps=5, first=3))
    assert [s.i for s in steps] == [3, 4]


def test_run_is_an_iterator_that_knows_its_length() -> None:
    run = start(Model())
    assert iter(run) is run
    assert isinstance(run, Iterator)
    assert len(run) == len(run.plan) == 5
    assert [recipe["seed"] for recipe in run.recipes] == [1, 2]
    assert isinstance(next(run), Step)
    assert len(run) == 5  # in all, not what is left


def test_last_runs_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    steps = list(start(Model()))
    assert_close(start(Model()).last().x, steps[-1].x)
    run = start(Model())
    next(run)
    assert_close(run.last().x, steps[-1].x)
    assert_close(run.last().x, steps[-1].x)  # again: it is over, and the last one is still the last one
    run = start(Model())
    seen = list(run)
    assert run.last() is seen[-1]
    assert capsys.readouterr().err == ""
    start(Model()).last(progress=True)
    assert "step 5 of 5" in capsys.readouterr().err


def test_last_of_a_run_that_was_stopped() -> None:
    run = start(Model())
    step = next(run)
    run.close()
    assert run.last() is step
    run = start(Model())
    run.close()
    with pytest.raises(ConfigError, match="closed before its first step"):
        run.last()


def test_the_model_sees_the_timesteps_of_the_plan_in_order() -> None:
    model = Model()
    run = start(model, steps=5)
    list(run)
    assert torch.equal(torch.stack([t for _, t in model.seen]), run.plan.timesteps)
    assert all(t.ndim == 0 for _, t in model.seen)
