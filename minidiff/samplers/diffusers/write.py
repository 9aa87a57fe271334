"""Writer of diffusers' ``scheduler_config.json``: the tables of classes.py, applied in reverse.

The result is read back before it is returned, so an option that the class of diffusers cannot express is refused by
name, never lost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from minidiff.config import ScheduleConfig
from minidiff.errors import UnsupportedError
from minidiff.samplers.diffusers.classes import READERS, SCHEDULE, Reader
from minidiff.samplers.diffusers.read import sampler_from_diffusers, schedule_from_diffusers
from minidiff.samplers.method import Method

Fields = dict[str, Any]


# Fields that diffusers takes as arguments of the call, and ignores in a config with a warning. They are written, for
# minidiff to read, only if they differ from the scheduler's default.
CALLED = ("eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise", "strength", "order")


def sampler_to_diffusers(sampler: Any, schedule: ScheduleConfig) -> dict[str, Any]:
    """Convert ``sampler`` and ``schedule`` to a ``scheduler_config.json``, which :func:`sampler_from_diffusers` and
    :func:`schedule_from_diffusers` read back to equal ones with ``like_diffusers`` set.

    Raises :class:`UnsupportedError` for a sampler without a class in diffusers, and for an option that the class does
    not have, such as a zero-SNR schedule in a PNDMScheduler.
    """
    name, reader = _reader(sampler)
    plain = reader.sampler(**dataclasses.asdict(sampler) | {"like_diffusers": True})
    found = {"_class_name": name, **_schedule_fields(schedule, reader)}
    for option in reader.options:
        fields = option.write(getattr(plain, option.name))
        found |= {k: v for k, v in fields.items() if k in reader.fields}
    found = {k: v for k, v in found.items() if k not in CALLED or v != reader.fields[k]}
    lost = _differences(plain, sampler_from_diffusers(found)) + _differences(schedule, _read_schedule(found, schedule))
    if lost:
        raise UnsupportedError(f"{name} of diffusers has no place for {', '.join(lost)}; choose another sampler")
    return found


def passed_to_call(config: dict[str, Any]) -> list[str]:
    """Return the fields of a written config that diffusers expects from the caller instead."""
    return [key for key in CALLED if key in config]


def _reader(sampler: Any) -> tuple[str, Reader]:
    """Return the class for a sampler: that of its type or, for the SDE variants of DPM++, of its base type."""
    exact = [(n, r) for n, r in READERS.items() if type(sampler) is r.sampler]
    found = exact or [(n, r) for n, r in READERS.items() if isinstance(sampler, r.sampler)]
    if not found or not isinstance(sampler, Method):
        raise UnsupportedError(f"diffusers has no scheduler class for the sampler {type(sampler).__name__}")
    return found[0]


def _schedule_fields(schedule: ScheduleConfig, reader: Reader) -> Fields:
    fields: Fields = {
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": schedule.prediction,
        **({"beta_schedule": schedule.beta_schedule} if schedule.betas is None else {}),
        **({"trained_betas": list(schedule.betas)} if schedule.betas is not None else {}),
    }
    if reader.sampler.own_levels:  # classes without betas: unread fields are left out
        fields = {k: v for k, v in fields.items() if v != (SCHEDULE | reader.fields)[k]}
    zero_snr = {"rescale_betas_zero_snr": schedule.zero_snr} if "rescale_betas_zero_snr" in reader.fields else {}
    return fields | zero_snr


def _read_schedule(found: Fields, wanted: ScheduleConfig) -> ScheduleConfig:
    """Return the schedule as read back; with explicit betas, the curve that they replace is irrelevant."""
    read = schedule_from_diffusers(found)
    return read if read.betas is None else dataclasses.replace(read, beta_schedule=wanted.beta_schedule)


def _differences(wanted: Any, got: Any) -> list[str]:
    names = (f.name for f in dataclasses.fields(wanted))
    return [f"{n}={getattr(wanted, n)!r}" for n in names if getattr(wanted, n) != getattr(got, n)]
