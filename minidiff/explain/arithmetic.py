"""A step of a run as sums: the weights that its sampler gave to each value, and the same step written in other values.

A linear step is ``x_next = a * x + b * out + c * noise + ...``. Since x0 is a sum of x and out as well, out can be
expressed by x0, and x by x0 and epsilon, and the same step then reads ``a' * x + b' * x0 + ...`` or
``A * x0 + B * epsilon + ...``. Nothing but substitution happens here; the weights are read off the sampler itself
(:mod:`minidiff.samplers.linear`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.errors import UnsupportedError
from minidiff.explain.collect import Frame, Seen
from minidiff.samplers.linear import NOT_LINEAR, LinearRow, Weights, remembered, row_at

NOTHING = 1e-12  # weights that are left over where a substitution cancels


@dataclass(frozen=True, eq=False, kw_only=True)
class Sums:
    """One step. ``given``: the values that it is made of, (C, h, w) float32 by name. ``x0``, ``direct``, ``through``
    and ``split``: weights of x0, and of the next sample in x and out, in x and x0, and in x0 and epsilon; None if there
    is no such sum. ``signal`` and ``noise``: x = signal * x0 + noise * epsilon. ``scale``: factor of what the model
    sees. ``why``: the option after which the step is not linear, or "other". ``kept``: something else changed the
    sample after the step, such as a mask."""

    given: Mapping[str, Tensor]
    scale: float
    signal: float
    noise: float
    x0: Weights | None
    direct: Weights | None
    through: Weights | None
    split: Weights | None
    why: str | None
    kept: bool

    @property
    def values(self) -> dict[str, Tensor]:
        """Return the values given, and x0 and epsilon if they are sums of them."""
        found = dict(self.given)
        if self.x0 is not None:
            found["x0"] = total(self.x0, found)
            if self.noise:
                found["epsilon"] = (found["x"] - self.signal * found["x0"]) / self.noise
        return found


@torch.no_grad()
def sums(seen: Seen, frame: Frame) -> Sums:
    """Return the step of a frame."""
    plan, sampler, row, why = seen.plan, seen.sampler, None, None
    try:
        row = row_at(sampler, plan, frame.i, frame.state)
    except UnsupportedError:
        options = {name: getattr(sampler, name, None) for name in NOT_LINEAR}
        set_ = (name for name, value in options.items() if not (value is None or value is False or _fixed(value)))
        why = next(set_, "other")
    again = iter(frame.noise)
    stepped, _ = sampler.step(plan, frame.i, frame.before, frame.out, frame.state, lambda like: next(again))
    signal, noise = float(plan.signal[frame.i]), float(plan.noise[frame.i])
    if plan.space == "sigma":  # x is at the picture's own scale
        signal, noise = 1.0, noise / signal
    scale = float(sampler.scale_input(plan, frame.i, torch.ones(1, 1, 1, 1, device=frame.before.device)))
    direct = None if row is None else row.x
    return Sums(
        given=_given(frame),
        scale=scale,
        signal=signal,
        noise=noise,
        x0=None if row is None else row.x0,
        direct=direct,
        through=None if row is None else through_x0(row),
        split=None if row is None else picture_and_noise(row, signal, noise),
        why=why,
        kept=not torch.equal(stepped, frame.after),
    )


def _fixed(variance: object) -> bool:
    return isinstance(variance, str) and variance.startswith("fixed")


def _given(frame: Frame) -> dict[str, Tensor]:
    values = {"x": frame.before, "out": frame.out}
    if len(frame.noise) == 1:
        values["noise"] = frame.noise[0]
    values |= remembered(frame.state)
    return {name: value[0].float().cpu() for name, value in values.items()}


def total(weights: Weights, values: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of ``values`` with these weights, in their dtype. One that is not given counts as 0."""
    found = torch.zeros_like(values["x"])
    for name, weight in weights.items():
        if name in values:
            found = found + weight * values[name]
    return found


def replaced(weights: Weights, name: str, by: Weights) -> Weights:
    """Return a sum in which ``name`` is written as another sum."""
    found = {key: weight for key, weight in weights.items() if key != name}
    for key, weight in by.items():
        found[key] = found.get(key, 0.0) + weights.get(name, 0.0) * weight
    largest = max(map(abs, found.values()), default=0.0)
    return {key: weight for key, weight in found.items() if abs(weight) > NOTHING * largest}


def through_x0(row: LinearRow) -> Weights | None:
    """Return the weights of the next sample with x0 in the place of out; None if x0 does not depend on out."""
    share = row.x0.get("out", 0.0)
    if not share:
        return None
    rest = {name: -weight / share for name, weight in row.x0.items() if name != "out"}
    return replaced(row.x, "out", {"x0": 1 / share, **rest})


def picture_and_noise(row: LinearRow, signal: float, noise: float) -> Weights | None:
    """Return the weights of the next sample in x0 and epsilon, of which x = signal * x0 + noise * epsilon."""
    through = through_x0(row)
    return None if through is None or not noise else replaced(through, "x", {"x0": signal, "epsilon": noise})
