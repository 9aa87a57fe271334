"""Reading diffusers' ``scheduler_config.json``: one engine for the tables of ``readers.py``.

Fields that only sibling classes have are ignored, as diffusers does when one scheduler is made from another's config; a
field that nobody has is an error. What diffusers passes to ``step()`` (eta, s_churn, ...) may stand in the config too.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from minidiff.config import ScheduleConfig, check, from_json
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.samplers.base import Options
from minidiff.samplers.readers import READERS, SCHEDULE, Config, Reader, one_of
from minidiff.schedule import MAX_BETA
from minidiff.spelling import near

# Fields of schedulers that are not (yet) in READERS, and of old versions: ignored, as diffusers ignores them.
SIBLINGS = frozenset(
    """algorithm_type clip_denoised disable_corrector euler_at_final lambda_min_clipped lower_order_final
    noise_sampler_seed original_inference_steps predict_x0 predictor_order corrector_order rho s_max s_min sampling_eps
    sigma_data sigma_schedule snr snr_shift_scale solver_order solver_p solver_type timestep_scaling use_lu_lambdas
    flow_shift shift shift_terminal use_dynamic_shifting time_shift_type base_shift max_shift base_image_seq_len
    max_image_seq_len invert_sigmas stochastic_sampling tau_func final_step_size_scale correct_steps tensor_format
    timestep_values predict_epsilon use_flow_sigmas""".split()  # noqa: SIM905
)


def sampler_from_diffusers(config: Config) -> Options:
    """The sampler that a ``scheduler_config.json`` (as a dict, with its ``_class_name``) describes, doing what
    diffusers 0.42.1 does, its slips included.

    Raises UnsupportedError for a class that is not in ``READERS`` and for flow matching, ConfigError for fields that
    are unknown or that diffusers itself can't run.
    """
    reader, filled = _fill(config)
    options = {name: source(filled) if callable(source) else filled[source] for name, source in reader.options.items()}
    return reader.sampler(**options, like_diffusers=True)


def schedule_from_diffusers(config: Config) -> ScheduleConfig:
    """What the same dict says about training: the noise schedule and the prediction type. Raises as above."""
    reader, c = _fill(config)
    betas = c["trained_betas"]
    data = {
        "beta_start": c["beta_start"],
        "beta_end": c["beta_end"],
        "steps": c["num_train_timesteps"],
        "prediction": c["prediction_type"].replace("original_sample", "sample"),
        "zero_snr": bool(c.get("rescale_betas_zero_snr", False)) and "rescale_betas_zero_snr" in reader.fields,
    }
    if betas is None and one_of(c, "beta_schedule", reader.beta_schedules) == "exp":
        betas = _exp_betas(c["num_train_timesteps"])
    if betas is None:
        data["beta_schedule"] = c["beta_schedule"]
    else:
        data["betas"] = betas.tolist() if hasattr(betas, "tolist") else betas
    return from_json(ScheduleConfig, data)


def _exp_betas(n: int) -> list[float]:
    """The betas of alpha_bar = exp(-12 u) at the fraction u of the way, which only Heun's class knows."""
    check(isinstance(n, int) and n > 0, f"num_train_timesteps={n!r} must be a whole number above 0")
    curve = [math.exp(i / n * -12.0) for i in range(n + 1)]
    return [min(1 - b / a, MAX_BETA) for a, b in pairwise(curve)]


def _fill(config: Config) -> tuple[Reader, dict[str, Any]]:
    """The reader for ``config``, and its fields with the class's defaults where they are missing; all checked."""
    name = config.get("_class_name")
    check(name is not None, "the scheduler config has no _class_name: add it, for instance 'PNDMScheduler'")
    if name not in READERS:
        guess = near(name, READERS)
        raise UnsupportedError(f"scheduler class {name!r} is not supported; known are {', '.join(READERS)}{guess}")
    if config.get("use_flow_sigmas") or str(config.get("prediction_type")).startswith("flow"):
        raise UnsupportedError(f"{name} with flow matching (use_flow_sigmas, flow_prediction) is not supported")
    reader = READERS[name]
    own = SCHEDULE | reader.fields
    known = SIBLINGS.union(own, *(r.fields for r in READERS.values()))
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    guess = near(unknown[0], own) if unknown else ""
    said = f"{name} has no option {', '.join(map(repr, unknown))}; it knows {', '.join(sorted(own))}"
    check(not unknown, said + guess)
    # in a live scheduler's config, what its own class filled in does not count for another class
    filled_in = config.get("_use_default_values", ())
    filled = {key: default if key in filled_in else config.get(key, default) for key, default in own.items()}
    one_of(filled, "prediction_type", reader.predictions)
    reason = reader.refuse(filled)
    if reason is not None:
        raise ConfigError(f"{name}: {reason}")
    return reader, filled
