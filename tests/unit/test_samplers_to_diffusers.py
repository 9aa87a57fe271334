"""Samplers written as diffusers' scheduler configs: read back equal, or refused with the option that would be lost."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from minidiff.config import ScheduleConfig
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.samplers import DDIM, PNDM, SAMPLERS, Euler, sampler_from_diffusers, schedule_from_diffusers
from minidiff.samplers.diffusers.classes import READERS
from minidiff.samplers.diffusers.config import passed_to_call, sampler_to_diffusers

FORTY = ScheduleConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, steps=40)
# Options that no field of the class stands for: follow from other things, or exist for samplers chosen by name alone.
WITHOUT_A_FIELD = {
    "last_alpha_bar",  # what the reference puts there is a constant of its code
    "cut_timesteps",  # follows from the beta schedule
    "tau",  # a Python function over there
    "tau_start",
    "tau_end",
}


def schedule_for(name: str) -> ScheduleConfig:
    """A schedule that goes with the method: consistency models count 40 timesteps."""
    return FORTY if name == "cm" else ScheduleConfig()


def variations(kind: Any) -> list[Any]:
    """The default sampler, and one for every other value that an option can well have."""
    base = dataclasses.replace(kind(), like_diffusers=True)
    found = [base]
    for name, hint in get_type_hints(kind).items():
        if name == "like_diffusers" or name not in {f.name for f in dataclasses.fields(kind)}:
            continue
        kinds = get_args(hint) if get_origin(hint) is not None else (hint,)
        values: list[Any] = [v for v in kinds if isinstance(v, str)]
        values += [True, False] if bool in kinds else []
        values += [0.75, 2.5] if float in kinds else [1, 2, 3] if int in kinds and get_origin(hint) is not tuple else []
        values += [(), (0, 2)] if get_origin(hint) is tuple else []
        for value in values:
            try:
                found.append(dataclasses.replace(base, **{name: value}))
            except ConfigError:
                continue
    return found


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_option_reads_back_equal_or_is_refused(name: str) -> None:
    schedule, written = schedule_for(name), 0
    refused = set()
    base = variations(SAMPLERS[name])[0]
    for sampler in variations(SAMPLERS[name]):
        try:
            found = json.loads(json.dumps(sampler_to_diffusers(sampler, schedule)))
        except (UnsupportedError, ConfigError):
            refused |= {
                f.name for f in dataclasses.fields(sampler) if getattr(sampler, f.name) != getattr(base, f.name)
            }
            continue
        back = sampler_from_diffusers(found)
        assert dataclasses.asdict(back) == dataclasses.asdict(sampler)
        assert schedule_from_diffusers(found) == schedule
        written += 1
    assert written > 0
    allowed = WITHOUT_A_FIELD | {
        "cm": {"clip", "threshold", "threshold_max", "train_steps"},
        "edm_euler": {"clip", "threshold", "threshold_max"},
        "edm_dpmpp_2m": {"clip"},
        "dpmpp_2s": {"spacing", "steps_offset"},
        "ddpm": {"variance"},  # fixed_large_log, which the reference itself can't run
        "ddim_inverse": {"spacing"},  # linspace, which the reference's class does not have
    }.get(name, set())
    assert refused <= allowed


@pytest.mark.parametrize("name", READERS)
def test_what_a_class_writes_by_default_is_written_again(name: str) -> None:
    """From their defaults to our sampler and back: the fields that were written are the defaults."""
    config = {"_class_name": name}
    sampler, schedule = sampler_from_diffusers(config), schedule_from_diffusers(config)
    found = sampler_to_diffusers(sampler, schedule)
    assert found.pop("_class_name") == name
    reader = READERS[name]
    defaults: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    defaults |= {"beta_schedule": "linear", "prediction_type": "epsilon", **reader.fields}
    assert found or name == "IPNDMScheduler"  # whose defaults are all there is
    for key, value in found.items():
        if not (key == "clip_sample_range" and not defaults.get("clip_sample")):
            assert value == defaults[key], key


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(prediction="v_prediction"),
        ScheduleConfig(beta_schedule="squaredcos_cap_v2", steps=500),
        ScheduleConfig(zero_snr=True, prediction="v_prediction"),
        ScheduleConfig(steps=3, betas=(0.1, 0.2, 0.3)),
    ],
    ids=["v", "cosine", "zero snr", "betas"],
)
def test_schedules_make_the_trip(schedule: ScheduleConfig) -> None:
    found = sampler_to_diffusers(DDIM(like_diffusers=True), schedule)
    back = schedule_from_diffusers(json.loads(json.dumps(found)))
    assert back == (schedule if schedule.betas is None else dataclasses.replace(back, betas=schedule.betas, steps=3))
    assert sampler_from_diffusers(found) == DDIM(like_diffusers=True)


def test_a_class_that_cannot_say_it_is_named_with_what_is_lost() -> None:
    with pytest.raises(UnsupportedError, match="PNDMScheduler of diffusers has no place for zero_snr=True"):
        sampler_to_diffusers(PNDM(), ScheduleConfig(zero_snr=True, prediction="v_prediction"))
    with pytest.raises(UnsupportedError, match=r"EulerDiscreteScheduler .*last_alpha_bar=0.5"):
        sampler_to_diffusers(Euler(last_alpha_bar=0.5), ScheduleConfig())
    with pytest.raises(UnsupportedError, match="no scheduler class for the sampler object"):
        sampler_to_diffusers(object(), ScheduleConfig())


def test_what_diffusers_wants_to_be_told_in_the_call() -> None:
    assert passed_to_call(sampler_to_diffusers(DDIM(), ScheduleConfig())) == []
    assert passed_to_call(sampler_to_diffusers(DDIM(eta=0.5), ScheduleConfig())) == ["eta"]


def test_an_sde_variant_is_its_class_with_the_option_set() -> None:
    found = sampler_to_diffusers(SAMPLERS["dpmpp_3m_sde"](), ScheduleConfig())
    assert found["_class_name"] == "DPMSolverMultistepScheduler"
    assert (found["algorithm_type"], found["solver_order"]) == ("sde-dpmsolver++", 3)
