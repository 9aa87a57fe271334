"""``Scheduler`` before ``set_timesteps`` for samplers by name, and its messages to users of diffusers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError
from minidiff.samplers import CM, DDIM, DDPM, IPNDM, SAMPLERS, Euler, EulerAncestral, Scheduler
from minidiff.schedule import NoiseSchedule
from tests.tolerances import assert_close

SCHEDULE = NoiseSchedule.from_config(
    ScheduleConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps=100)
)
EULER = {"_class_name": "EulerDiscreteScheduler"}
X = torch.ones(2, 1, 2, 2)
OWN_LEVELS = ("cm", "ipndm", "edm_euler", "edm_dpmpp_2m")


def hint(act) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- before set_timesteps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in OWN_LEVELS and n != "pndm"])
def test_a_sampler_by_name_knows_every_timestep_of_training(name):
    """Also where its spacing has an offset, which would lead beyond the last of them."""
    s = Scheduler(SAMPLERS[name](), SCHEDULE)
    whole = s.timesteps[:: s.order] if name.startswith(("dpm2", "dpmpp_sde")) else s.timesteps.unique()
    assert sorted(whole.round().tolist()) == list(range(100))
    rising = name.endswith("inverse")
    assert (s.timesteps[0] < s.timesteps[-1]) == rising


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in OWN_LEVELS])
def test_a_sampler_by_name_adds_the_noise_of_the_timestep_that_it_is_given(name):
    """The solvers in lambda, too, which take the opposite timestep when they are read from diffusers' configs."""
    s = Scheduler(SAMPLERS[name](), SCHEDULE)
    x0, noise = torch.randn(2, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for t in (99, 40):
        alpha_bar = SCHEDULE.alphas_cumprod[t]
        scale = 1 if s.sampler.space == "sigma" else alpha_bar**0.5
        wanted = scale * (x0 + ((1 - alpha_bar) / alpha_bar) ** 0.5 * noise)
        torch.testing.assert_close(s.add_noise(x0, noise, t), wanted, rtol=2e-6, atol=2e-6)


def test_ddpm_walks_training_backwards():
    s = Scheduler(DDPM(), SCHEDULE)
    assert s.timesteps.tolist() == list(range(99, -1, -1))
    assert s.init_noise_sigma == 1
    run = Scheduler(DDPM(), SCHEDULE)
    run.set_timesteps(100)
    x = y = X
    for t in s.timesteps[:3]:
        x, y = s.step(X, t, x, noise=X), run.step(X, t, y, noise=X)
        assert_close(x, y)
        assert_close(s.last_x0, run.last_x0)
    assert len(s.plan) == 100


@pytest.mark.parametrize(
    "sampler", [Euler(), EulerAncestral(), Euler(spacing="trailing", sigma_spacing="karras"), CM(), IPNDM()], ids=repr
)
def test_before_set_timesteps_a_run_of_every_timestep_can_be_walked(sampler):
    schedule = None if sampler.own_levels else SCHEDULE
    total = {CM: 40, IPNDM: 1000}.get(type(sampler), 100)
    s, run = Scheduler(sampler, schedule), Scheduler(sampler, schedule)
    run.set_timesteps(total)
    assert_close(s.timesteps, run.timesteps)
    t = s.timesteps[total // 2]
    assert_close(s.step(X, t, X, noise=X), run.step(X, t, X, noise=X))


@pytest.mark.parametrize("name", ["ddim", "ddim_inverse", "pndm", "lcm", "tcd", "dpmpp_2m", "unipc", "edm_dpmpp_2m"])
def test_a_step_that_needs_the_number_of_steps_says_so(name):
    s = Scheduler(SAMPLERS[name](), SCHEDULE)
    assert_close(s.scale_model_input(X, 50) if s.sampler.space != "sigma" else X, X)
    wanted = r"can't step before it has timesteps: call set_timesteps\(50\) first"
    with pytest.raises(ConfigError, match=wanted):
        s.step(X, 50, X)
    with pytest.raises(ConfigError, match=wanted):
        s.plan  # noqa: B018
    s.set_timesteps(5)
    assert s.step(X, s.timesteps[0], X, noise=X).isfinite().all()


def test_set_timesteps_leaves_nothing_of_what_was_before():
    s, other = Scheduler(DDIM(), SCHEDULE), Scheduler(DDIM(), SCHEDULE)
    assert len(s.timesteps) == 100
    for each in (s, other):
        each.set_timesteps(4)
    assert s.timesteps.tolist() == other.timesteps.tolist() == [76, 51, 26, 1]
    with pytest.raises(ConfigError, match="t=50 is none of the scheduler's timesteps"):
        s.step(X, 50, X)


# --- habits ----------------------------------------------------------------------------------------------------------


def test_config_is_a_hint_of_one_line():
    s = Scheduler.from_diffusers(EULER)
    shown = hint(lambda: s.config)
    assert "Scheduler has no config: the options are scheduler.sampler" in shown
    assert not hasattr(s, "config")
    assert "write len(scheduler.schedule)" in hint(lambda: s.num_train_timesteps)
    assert "did you mean set_timesteps?" in hint(lambda: s.set_timestep)
    assert hint(lambda: s.qqqq) == "Scheduler has no qqqq"


@pytest.mark.parametrize("call", [Scheduler.from_config, Scheduler.from_pretrained])
def test_other_ways_to_make_one_name_from_diffusers(call):
    assert "write Scheduler.from_diffusers(" in hint(lambda: call({"beta_start": 0.1}))
    assert "write Scheduler.from_diffusers(" in hint(lambda: call("folder", subfolder="scheduler"))


def test_options_of_a_config_are_not_options_of_the_scheduler():
    made = "write Scheduler.from_diffusers({'_class_name': 'DDIMScheduler', ...})"
    for act in (
        lambda: Scheduler(num_train_timesteps=1000, beta_schedule="linear"),
        lambda: Scheduler("euler", SCHEDULE),
        lambda: Scheduler(EULER, SCHEDULE),
        lambda: Scheduler(DDIM(), {"beta_start": 0.1}),
    ):
        assert made in hint(act)
    assert "config='euler' must be a dict" in hint(lambda: Scheduler.from_diffusers("euler"))
    assert "did you mean schedule?" in hint(lambda: Scheduler(DDIM(), schedul=SCHEDULE))


def test_keywords_of_diffusers_and_misspelt_ones_are_answered_by_what_to_write():
    s = Scheduler.from_diffusers(EULER)
    s.set_timesteps(5)
    t = s.timesteps[0]
    plain = "step returns the sample itself (diffusers: .prev_sample): write x = scheduler.step(out, t, x)"
    for given in (True, False):
        assert plain in hint(lambda given=given: s.step(X, t, X, return_dict=given))
    assert "write scheduler.step(out, t, x)" in hint(lambda: s.step(model_output=X, timestep=t, sample=X))
    assert "put it into the config of from_diffusers" in hint(lambda: s.step(X, t, X, eta=0.5))
    assert "has no argument 'generato'; did you mean generator?" in hint(lambda: s.step(X, t, X, generato=None))
    assert "write scheduler.scale_model_input(x, t)" in hint(lambda: s.scale_model_input(sample=X, timestep=t))
    assert "write scheduler.add_noise(x0, noise, t)" in hint(lambda: s.add_noise(X, X, timesteps=t[None]))
    assert "did you mean num_inference_steps?" in hint(lambda: s.set_timesteps(num_inference_step=5))
    assert "it takes num_inference_steps, device, timesteps, sigmas" in hint(lambda: s.set_timesteps(zzz=5))
    assert len(s.timesteps) == 5


def test_step_gives_a_plain_tensor_and_says_what_diffusers_calls_it():
    s = Scheduler.from_diffusers(EULER)
    s.set_timesteps(5)
    assert type(s.step(X, s.timesteps[0], X)) is torch.Tensor
    assert ".prev_sample" in Scheduler.step.__doc__


def test_it_says_what_it_is():
    s = Scheduler(DDIM(), SCHEDULE)
    assert repr(s).startswith("Scheduler(DDIM(")
    assert repr(s).endswith("before set_timesteps)")
    s.set_timesteps(7)
    assert repr(s).endswith("7 timesteps)")


def test_it_can_be_copied_and_pickled():
    """Both ask an empty object for attributes, which must not end in hints."""
    s = Scheduler.from_diffusers(EULER)
    s.set_timesteps(3)
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert_close(other.step(X, other.timesteps[0], X), s.step(X, s.timesteps[0], X))
        s.set_timesteps(3)
