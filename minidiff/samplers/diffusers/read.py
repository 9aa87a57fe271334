"""Reader of diffusers' ``scheduler_config.json``, driven by the tables of classes.py.

Fields that only other scheduler classes have are ignored, as in diffusers when a scheduler is created from another's
config. A field that no class has gives a warning. Arguments that diffusers passes to ``step()`` (eta, s_churn, ...) are
accepted in the config too.
"""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import Any

from minidiff.config import ScheduleConfig, check, from_json, quote
from minidiff.console.spelling import near
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.samplers.diffusers.classes import CURVES, READERS, SCHEDULE, Config, Reader, one_of
from minidiff.samplers.method import Method
from minidiff.schedule import MAX_BETA

# Fields of schedulers that are not (yet) in READERS, and of old versions: ignored, as diffusers ignores them.
SIBLINGS = frozenset(
    """algorithm_type clip_denoised disable_corrector euler_at_final lambda_min_clipped lower_order_final
    noise_sampler_seed original_inference_steps predict_x0 predictor_order corrector_order rho s_max s_min sampling_eps
    sigma_data sigma_schedule snr snr_shift_scale solver_order solver_p solver_type timestep_scaling use_lu_lambdas
    flow_shift shift shift_terminal use_dynamic_shifting time_shift_type base_shift max_shift base_image_seq_len
    max_image_seq_len invert_sigmas stochastic_sampling tau_func final_step_size_scale correct_steps tensor_format
    timestep_values predict_epsilon use_flow_sigmas""".split()  # noqa: SIM905
)
MOST = 10**6  # bound of all counts in a scheduler's config; training has 1,000 timesteps


def sampler_from_diffusers(config: Config) -> Method[Any, Any]:
    """Create a sampler from a ``scheduler_config.json``, given as a dict with its ``_class_name``.

    The sampler does what diffusers 0.42.1 does, including its slips. A field that no scheduler has gives a warning and
    is ignored.

    Raises UnsupportedError for a class that is not in ``READERS`` and for flow matching, ConfigError for values of
    another type and those that diffusers itself can't run.
    """
    unknown = unknown_fields(config)
    if unknown:
        name = config["_class_name"]
        shown, guess = ", ".join(map(quote, unknown)), near(unknown[0], SCHEDULE | READERS[name].fields)
        warnings.warn(f"{name} has no option {shown}; passed over, as in diffusers{guess}", stacklevel=3)
    return read_sampler(config)


def unknown_fields(config: Config) -> list[Any]:
    """Return the fields of a scheduler's config that no class has. Raises as :func:`sampler_from_diffusers`."""
    known = SIBLINGS.union(_fill(config)[1], *(r.fields for r in READERS.values()))
    return [key for key in config if key not in known and not str(key).startswith("_")]


def read_sampler(config: Config) -> Method[Any, Any]:
    """Create a sampler as :func:`sampler_from_diffusers` does, without its warning."""
    reader, filled = _fill(config)
    return reader.sampler(**{option.name: option.read(filled) for option in reader.options}, like_diffusers=True)


def schedule_from_diffusers(config: Config) -> ScheduleConfig:
    """Return the training settings in the same dict: noise schedule and prediction type. Raises as above."""
    reader, c = _fill(config)
    betas = c["trained_betas"]
    data = {
        "beta_start": c["beta_start"],
        "beta_end": c["beta_end"],
        "steps": c["num_train_timesteps"],
        "prediction": c["prediction_type"].replace("original_sample", "sample"),
        "zero_snr": bool(c.get("rescale_betas_zero_snr", False)) and "rescale_betas_zero_snr" in reader.fields,
    }
    if betas is None and one_of(c, "beta_schedule", *reader.beta_schedules) == "exp":
        betas = _exp_betas(c["num_train_timesteps"])
    if betas is None:
        data["beta_schedule"] = c["beta_schedule"]
    else:
        data["betas"] = betas.tolist() if hasattr(betas, "tolist") else betas
    return from_json(ScheduleConfig, data)


def _exp_betas(n: int) -> list[float]:
    """Return the betas of alpha_bar = exp(-12 u) at the fraction u of the way, which only Heun's class has."""
    curve = [math.exp(i / n * -12.0) for i in range(n + 1)]
    return [min(1 - b / a, MAX_BETA) for a, b in pairwise(curve)]


def _fill(config: Config) -> tuple[Reader, dict[str, Any]]:
    """Return the reader for ``config`` and its checked fields, completed by the class's defaults."""
    name = config.get("_class_name")
    check(name is not None, "the scheduler config has no _class_name: add it, for instance 'PNDMScheduler'")
    if not isinstance(name, str) or name not in READERS:
        guess = near(name, READERS)
        raise UnsupportedError(f"scheduler class {quote(name)} is not supported; known are {', '.join(READERS)}{guess}")
    if config.get("use_flow_sigmas") or str(config.get("prediction_type")).startswith("flow"):
        raise UnsupportedError(f"{name} with flow matching (use_flow_sigmas, flow_prediction) is not supported")
    reader = READERS[name]
    own = SCHEDULE | reader.fields
    # in a live scheduler's config, defaults filled in by its own class do not apply to another class
    filled_in = config.get("_use_default_values", ())
    filled = {key: default if key in filled_in else config.get(key, default) for key, default in own.items()}
    for key, default in own.items():
        _check_type(f"{name}: {key}", filled[key], default)
    check(filled["num_train_timesteps"] > 0, f"num_train_timesteps={filled['num_train_timesteps']} must be above 0")
    one_of(filled, "prediction_type", *reader.predictions)
    curves = [key for key in CURVES if filled.get(key)]
    several = f"{' and '.join(curves)} exclude each other: keep one" if len(curves) > 1 else None
    reason = reader.refuse(filled) or several
    if reason is not None:
        raise ConfigError(f"{name}: {reason}")
    return reader, filled


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raise ConfigError for a value of another type than its default, and for numbers out of any useful range."""
    if isinstance(default, bool):
        check(value in (True, False, None), f"{name}={quote(value)} should be true or false")
    elif isinstance(default, (int, float)):
        kinds = (int, float) if isinstance(default, float) else int
        check(isinstance(value, kinds) and not isinstance(value, bool), f"{name}={quote(value)} should be a number")
        endless = isinstance(value, float) and math.isinf(value)  # means no limit
        most = 2**63 if isinstance(default, float) else MOST
        check(endless or abs(value) <= most, f"{name}={quote(value)} is out of range")
    elif isinstance(default, str):
        check(isinstance(value, str), f"{name}={quote(value)} should be a name")
    elif isinstance(default, list):
        fits = isinstance(value, (list, tuple)) and all(type(v) is int and abs(v) < MOST for v in value)
        check(fits, f"{name}={quote(value)} should be a list of numbers")
    elif isinstance(value, (int, float)):
        check(abs(value) < 2**64 or abs(value) == math.inf, f"{name}={quote(value)} is out of range")
