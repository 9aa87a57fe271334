"""Every scheduler class that diffusers ships is read or refused, and every field of its config honoured or refused."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from minidiff.errors import MinidiffError, UnsupportedError
from minidiff.samplers import Scheduler, sampler_from_diffusers, schedule_from_diffusers
from minidiff.samplers.diffusers.classes import READERS, SCHEDULE
from tests.support.parity.axes import BETAS
from tests.support.parity.sampler_twins import compare, reference, walk_reference

SHAPE, STEPS = (2, 3, 4, 5), 6
SHIPPED = [name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")]

# The classes that are not read, by what they are for; a class that a later diffusers adds makes the test fail.
REFUSED = {
    "flow matching": """FlowMapEulerDiscreteScheduler FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler
        FlowMatchLCMScheduler HeliosDMDScheduler HeliosScheduler LTXEulerAncestralRFScheduler MiniMaxH3Scheduler
        PiflowScheduler RFD4ProteinaScheduler SCMScheduler""",
    "tokens instead of numbers": """AmusedScheduler BlockRefinementScheduler DiscreteDDIMScheduler
        EntropyBoundScheduler VQDiffusionScheduler""",
    "one pipeline of its own": """CogVideoXDDIMScheduler CogVideoXDPMScheduler CosineDPMSolverMultistepScheduler
        DDPMWuerstchenScheduler RePaintScheduler UnCLIPScheduler""",
    "steps in parallel": "DDIMParallelScheduler DDPMParallelScheduler",
    "score models of before": "KarrasVeScheduler ScoreSdeVeScheduler",
}
REFUSED_NAMES = sorted(name for names in REFUSED.values() for name in names.split())

# for every field a value that is not its default
OTHER = {
    "num_train_timesteps": 500,
    "beta_start": 0.0005,
    "beta_end": 0.015,
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": BETAS,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 3,
    "clip_sample_range": 2.0,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 1.7,
    "variance_type": "learned_range",
    "interpolation_type": "log_linear",
    "timestep_type": "continuous",
    "final_sigmas_type": "sigma_min",
    "sigma_min": 0.05,
    "sigma_max": 20.0,
    "sigma_data": 1.0,
    "sigma_schedule": "exponential",
    "rho": 3.0,
    "s_churn": 2.0,
    "s_tmin": 0.5,
    "s_tmax": 5.0,
    "s_noise": 1.01,
    "order": 3,
    "eta": 0.5,
    "solver_order": 3,
    "algorithm_type": "sde-dpmsolver++",
    "solver_type": "heun",
    "lambda_min_clipped": -3.0,
    "disable_corrector": [1],
    "predictor_order": 1,
    "corrector_order": 1,
    "original_inference_steps": 30,
    "strength": 0.5,
    "timestep_scaling": 5.0,
    "noise_sampler_seed": 3,
    "set_alpha_to_zero": False,
    "solver_p": {"_class_name": "DDIMScheduler"},
    "shift_terminal": 0.1,
    "tau_func": "t",
    "UniPCMultistepScheduler.solver_type": "bh1",
    "flow_shift": 2.0,
    "time_shift_type": "linear",
}
# fields without which another one would have nothing to do
NEEDS = {
    "thresholding": {"sample_max_value": 3.0},
    "dynamic_thresholding_ratio": {"thresholding": True, "sample_max_value": 3.0},
    "sigma_min": {"use_karras_sigmas": True},
    "sigma_max": {"use_karras_sigmas": True},
    "solver_type": {"final_sigmas_type": "sigma_min"},
    "sample_max_value": {"thresholding": True, "dynamic_thresholding_ratio": 0.8},
    "clip_sample_range": {"clip_sample": True},
    "steps_offset": {"timestep_spacing": "leading"},
    "lower_order_final": {"solver_order": 3, "final_sigmas_type": "sigma_min"},
    "euler_at_final": {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "predict_x0": {"final_sigmas_type": "sigma_min"},
    "s_tmin": {"s_churn": 2.0},
    "s_tmax": {"s_churn": 2.0},
    "s_noise": {"s_churn": 2.0},
    "timestep_type": {"prediction_type": "v_prediction"},
    "rescale_betas_zero_snr": {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
}
# refused although the reference takes them: what they do there is not known here
NOT_HONOURED = {"use_flow_sigmas", "shift_terminal", "use_dynamic_shifting", "solver_p", "tau_func"}


def fields(name):
    """The fields of a class with their defaults: what its constructor takes, and what we read for its ``step``."""
    taken = inspect.signature(getattr(diffusers, name).__init__).parameters
    own = {key: p.default for key, p in taken.items() if key not in ("self", "kwargs")}
    return {key: READERS[name].fields[key] for key in READERS[name].fields} | own


def test_every_class_is_read_or_refused_by_name():
    assert sorted([*READERS, *REFUSED_NAMES]) == sorted(SHIPPED)
    known = {kind.name for kind in diffusers.schedulers.scheduling_utils.KarrasDiffusionSchedulers}
    assert known <= set(READERS)  # what Stable Diffusion's pipelines take


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_a_class_that_is_not_read_is_unsupported(name):
    with pytest.raises(UnsupportedError, match=f"scheduler class '{name}' is not supported; known are DDPMScheduler"):
        Scheduler.from_diffusers({"_class_name": name})


@pytest.mark.parametrize("name", READERS)
def test_the_defaults_of_a_class_are_its_own(name):
    """A live scheduler's config, and one that has only its name, are read alike."""
    live = {**getattr(diffusers, name)().config, "_class_name": name}
    assert sampler_from_diffusers(live) == sampler_from_diffusers({"_class_name": name})
    assert schedule_from_diffusers(live) == schedule_from_diffusers({"_class_name": name})
    own = SCHEDULE | READERS[name].fields
    assert {k: v for k, v in fields(name).items() if k in own} == {k: v for k, v in own.items() if k in fields(name)}


# fields that change nothing in the reference, in any class or in one
IDLE = {
    *("flow_shift", "time_shift_type", "use_dynamic_shifting"),  # without flow sigmas
    *(("LCMScheduler", key) for key in ("set_alpha_to_one", "steps_offset", "timestep_spacing")),
    *(("TCDScheduler", key) for key in ("set_alpha_to_one", "steps_offset", "timestep_spacing", "timestep_scaling")),
    *(("TCDScheduler", key) for key in ("clip_sample", "clip_sample_range", "thresholding")),
    *(("TCDScheduler", key) for key in ("dynamic_thresholding_ratio", "sample_max_value")),
    *((name, "num_train_timesteps") for name in READERS if name.startswith(("EDM", "IPNDM"))),
    ("DEISMultistepScheduler", "solver_type"),  # whatever it is called, it is logrho
    ("EDMDPMSolverMultistepScheduler", "euler_at_final"),  # a last step from sigma_min to itself
}


@pytest.mark.parametrize("name", READERS)
def test_every_field_is_honoured_or_refused(name):
    """With another value than its default: the same trajectory as the reference's, bit for bit, and another than
    without; or an error, where the reference fails too or the field is one that we say we do not know."""
    base = {"_class_name": name, **({"noise_sampler_seed": 7} if name == "DPMSolverSDEScheduler" else {})}
    idle = set()
    for key, default in fields(name).items():
        value = not default if isinstance(default, bool) else OTHER.get(f"{name}.{key}", OTHER.get(key))
        assert value != default, f"{name}.{key}: the test's value is the default"
        c = {**base, **{k: v for k, v in NEEDS.get(key, {}).items() if k in fields(name)}}
        try:
            moved = compare({**c, key: value}, STEPS, shape=SHAPE)
        except MinidiffError:
            known = key in NOT_HONOURED or (name, key) == ("IPNDMScheduler", "trained_betas")
            if not (known or fails({**c, key: value})):
                raise
        else:
            still = compare(c, STEPS, shape=SHAPE)
            if len(still) == len(moved) and all(map(torch.equal, still, moved)):
                idle.add(key)
    assert not [key for key in idle if key not in IDLE and (name, key) not in IDLE], f"{name}: {idle} change nothing"


def fails(c):
    """True if the reference raises, or gives values that are not finite, where minidiff refuses."""
    try:
        reference(c)
        return not walk_reference(c, {"num_inference_steps": STEPS}, shape=SHAPE)
    except Exception:  # whatever it raises
        return True


@pytest.mark.parametrize("prediction", ["flow_prediction", "flow"])
def test_flow_matching_is_unsupported_in_every_class(prediction):
    for name in READERS:
        for c in ({"use_flow_sigmas": True}, {"prediction_type": prediction}):
            with pytest.raises(UnsupportedError, match="flow matching"):
                Scheduler.from_diffusers({"_class_name": name, **c})
