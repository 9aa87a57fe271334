"""Learning-rate schedules as pure functions of the step: they have no state to save or restore."""

from __future__ import annotations

import math

from minidiff.training.settings import TrainConfig


def rate_at(config: TrainConfig, step: int) -> float:
    """Return the learning rate of optimiser step ``step`` (the first is 0).

    It rises linearly from 0 over ``warmup`` steps, so that the first step changes nothing. Then it stays constant
    ("constant"), or falls to 0 after the last step, linearly ("linear") or along half a cosine ("cosine"; Loshchilov &
    Hutter 2017, equation 5).
    """
    if step < config.warmup:
        return config.rate * (step / config.warmup)
    if config.curve == "constant":
        return config.rate
    if config.curve == "linear":
        return config.rate * max(0.0, (config.steps - step) / max(1, config.steps - config.warmup))
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
