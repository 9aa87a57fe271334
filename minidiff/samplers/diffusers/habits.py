"""One-line hints for users of diffusers' schedulers: what to write here instead.

``Scheduler`` has the methods of the usual sampling loop and nothing else: no ``config`` attribute, no result objects.
Using those raises an error that names the equivalent here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

from minidiff.config import quote
from minidiff.console.spelling import near
from minidiff.errors import ConfigError
from minidiff.samplers.diffusers.classes import SCHEDULE

P = ParamSpec("P")
R = TypeVar("R")

ATTRIBUTES = {
    "config": "the options are scheduler.sampler, the noise of training is scheduler.schedule, and the config is the "
    "dict that from_diffusers was given",
    "alphas_cumprod": "write scheduler.schedule.alphas_cumprod",
    "num_train_timesteps": "write len(scheduler.schedule)",
    "num_inference_steps": "write len(scheduler.timesteps)",
    "get_velocity": "write scheduler.schedule.velocity(x0, noise, t)",
    **dict.fromkeys(
        ("set_begin_index", "begin_index", "step_index"),
        "step and add_noise find the row of the t they are given; leave it out",
    ),
    "from_config": "write Scheduler.from_diffusers(config), whose '_class_name' says which sampler",
    "from_pretrained": "write Scheduler.from_diffusers(json.load(open('scheduler_config.json')))",
    "save_pretrained": "minidiff.samplers.sampler_to_config(scheduler.sampler) is the sampler as JSON",
}
MAKE = "write Scheduler.from_diffusers({'_class_name': 'DDIMScheduler', ...}), or Scheduler(sampler, schedule)"
MADE_BY_CONFIG = dict.fromkeys((*SCHEDULE, "timestep_spacing", "steps_offset", "clip_sample", "config"), MAKE)
STEP = {
    "return_dict": "step returns the sample itself (diffusers: .prev_sample): write x = scheduler.step(out, t, x)",
    "timestep": "write scheduler.step(out, t, x)",
    "sample": "write scheduler.step(out, t, x)",
    "variance_noise": "write noise=",
}
STEP |= dict.fromkeys(
    ("eta", "use_clipped_model_output", "s_churn", "s_tmin", "s_tmax", "s_noise", "order"),
    "it is an option of the sampler: put it into the config of from_diffusers",
)
ADD_NOISE = dict.fromkeys(("original_samples", "timesteps"), "write scheduler.add_noise(x0, noise, t)")
SCALE = dict.fromkeys(("sample", "timestep"), "write scheduler.scale_model_input(x, t)")
PLAN = dict.fromkeys(("strength", "original_inference_steps"), "put it into the config of from_diffusers")
PLAN["mu"] = "it belongs to flow matching, which is not supported"


class AttributeHint(ConfigError, AttributeError):
    """ConfigError that is also an AttributeError, so that ``hasattr`` works."""


def missing(kind: type, name: str) -> AttributeHint:
    """Return the error for attribute ``name`` of an object of ``kind``, with a replacement or the nearest name."""
    known = f": {ATTRIBUTES[name]}" if name in ATTRIBUTES else near(name, [n for n in dir(kind) if n[0] != "_"])
    return AttributeHint(f"{kind.__name__} has no {name}{known}")


def absent(name: str) -> Callable[..., NoReturn]:
    """Return a constructor that raises ConfigError with what to write instead of ``name``."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(f"Scheduler has no {name}: {ATTRIBUTES[name]}")

    return staticmethod(refuse)


def hinting(instead: dict[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to raise ConfigError for an unknown keyword, with the hint in ``instead`` or the nearest
    keyword."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        known = [name for name in inspect.signature(function).parameters if name != "self"]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    guess = near(name, known) or f"; it takes {', '.join(known)}"
                    hint = f": {instead[name]}" if name in instead else guess
                    raise ConfigError(f"{function.__qualname__} has no argument {quote(name)}{hint}")
            return function(*args, **kwargs)

        return call

    return wrap
