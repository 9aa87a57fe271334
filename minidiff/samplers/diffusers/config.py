"""Reader and writer of diffusers' ``scheduler_config.json``, both driven by the tables of classes.py.

Fields that only other scheduler classes have are ignored, as in diffusers when a scheduler is created from another's
config. A field that no class has gives a warning. Arguments that diffusers passes to ``step()`` (eta, s_churn, ...) are
accepted in the config too.

A written config is read back before it is returned, so an option that the class of diffusers cannot express is refused
by name, never lost.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from itertools import pairwise
from typing import Any

from minidiff.config import ScheduleConfig, check, from_json, quote
from minidiff.console.spelling import near
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.samplers.diffusers.classes import READERS, SCHEDULE, Config, Reader, one_of, refusals
from minidiff.samplers.method import Method, Sampler
from minidiff.schedule import MAX_BETA

# Fields of schedulers that are not in READERS (most of them for flow matching), and of old versions: ignored, as
# diffusers ignores them.
SIBLINGS = frozenset(
    """base_image_seq_len base_shift correct_steps final_step_size_scale flow_shift invert_sigmas max_image_seq_len
    max_shift predict_epsilon s_max s_min sampling_eps shift snr snr_shift_scale stochastic_sampling tensor_format
    time_shift_type timestep_values use_flow_sigmas""".split()  # noqa: SIM905
)
MOST = 10**6  # bound of all counts in a scheduler's config; training has 1,000 timesteps


def sampler_from_diffusers(config: Config) -> Method[Any, Any]:
    """Create a sampler from a ``scheduler_config.json``, given as a dict with its ``_class_name``.

    The sampler does what diffusers 0.42.1 does, including its slips. A field that no scheduler has gives a warning and
    is ignored.

    Raises UnsupportedError for a class that is not in ``READERS`` and for flow matching, ConfigError for values of
    another type and those that diffusers itself can't run.
    """
    warn_of_unknown(config)
    return read_sampler(config)


def warn_of_unknown(config: Config) -> None:
    """Warn the caller's caller of the fields that no class has."""
    unknown = unknown_fields(config)
    if unknown:
        name = config["_class_name"]
        shown, guess = ", ".join(map(quote, unknown)), near(unknown[0], SCHEDULE | READERS[name].fields)
        warnings.warn(f"{name} has no option {shown}; passed over, as in diffusers{guess}", stacklevel=3)


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
    if betas is None and one_of(c, "beta_schedule", *reader.betas) == "exp":
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
    for key, values in {"prediction_type": reader.predictions, **reader.known}.items():
        one_of(filled, key, *values)
    for reason in refusals(name, filled):
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


# --- writing ----------------------------------------------------------------------------------------------------------

# Fields that diffusers takes as arguments of the call, and ignores in a config with a warning. They are written, for
# minidiff to read, only if they differ from the scheduler's default.
CALLED = ("eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise", "strength", "order")


def sampler_to_diffusers(sampler: Sampler[Any, Any], schedule: ScheduleConfig) -> dict[str, Any]:
    """Convert ``sampler`` and ``schedule`` to a ``scheduler_config.json``, which :func:`sampler_from_diffusers` and
    :func:`schedule_from_diffusers` read back to equal ones with ``like_diffusers`` set.

    Raises :class:`UnsupportedError` for a sampler without a class in diffusers, and for an option that the class does
    not have, such as a zero-SNR schedule in a PNDMScheduler.
    """
    name, reader = _class_of(sampler)
    plain = reader.sampler(**dataclasses.asdict(sampler) | {"like_diffusers": True})
    found = {"_class_name": name, **_schedule_fields(schedule, reader)}
    for option in reader.options:
        found |= {k: v for k, v in option.write(getattr(plain, option.name)).items() if k in reader.fields}
    found = {k: v for k, v in found.items() if k not in CALLED or v != reader.fields[k]}
    read = schedule_from_diffusers(found)
    if read.betas is not None:  # the curve that they replace is irrelevant
        read = dataclasses.replace(read, beta_schedule=schedule.beta_schedule)
    lost = _differences(plain, read_sampler(found)) + _differences(schedule, read)
    if lost:
        raise UnsupportedError(f"{name} of diffusers has no place for {', '.join(lost)}; choose another sampler")
    return found


def passed_to_call(config: dict[str, Any]) -> list[str]:
    """Return the fields of a written config that diffusers expects from the caller instead."""
    return [key for key in CALLED if key in config]


def _class_of(sampler: Any) -> tuple[str, Reader]:
    """Return the class for a sampler: that of its type or, for the SDE variants of DPM++, of its base type."""
    exact = [(n, r) for n, r in READERS.items() if type(sampler) is r.sampler]
    found = exact or [(n, r) for n, r in READERS.items() if isinstance(sampler, r.sampler)]
    if not found:
        raise UnsupportedError(f"diffusers has no scheduler class for the sampler {type(sampler).__name__}")
    return found[0]


def _schedule_fields(schedule: ScheduleConfig, reader: Reader) -> dict[str, Any]:
    curve = {"beta_schedule": schedule.beta_schedule}
    fields = {
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": schedule.prediction,
        **(curve if schedule.betas is None else {"trained_betas": list(schedule.betas)}),
    }
    if reader.sampler.own_levels:  # classes without betas: unread fields are left out
        fields = {k: v for k, v in fields.items() if v != (SCHEDULE | reader.fields)[k]}
    zero_snr = {"rescale_betas_zero_snr": schedule.zero_snr} if "rescale_betas_zero_snr" in reader.fields else {}
    return fields | zero_snr


def _differences(wanted: Any, got: Any) -> list[str]:
    names = (f.name for f in dataclasses.fields(wanted))
    return [f"{n}={getattr(wanted, n)!r}" for n in names if getattr(wanted, n) != getattr(got, n)]
