"""Learning-rate schedules as pure functions of the step: they have no state to save or restore."""

from __future__ import annotations

import math

from minidiff.training.settings import TrainConfig


def rate_at(config: TrainConfig, step: int) -> float:
    """The learning rate of optimiser step ``step`` (the first is 0).

    It rises in a straight line from 0 through ``warmup`` steps, so that the first of these changes nothing; then it
    stays ("constant"), falls in a straight line ("linear"), or along half a cosine (Loshchilov & Hutter 2017,
    equation 5), to reach 0 after the last step.
    """
    if step < config.warmup:
        return config.rate * (step / config.warmup)
    if config.curve == "constant":
        return config.rate
    if config.curve == "linear":
        return config.rate * max(0.0, (config.steps - step) / max(1, config.steps - config.warmup))
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
