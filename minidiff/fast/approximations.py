"""Approximations, which trade accuracy for speed: off by default, and noted in the recipe of every picture.

    fast.approximate(sd, deep=3)       # deep features at every third step (:mod:`deep`)
    fast.approximate(sd, merge=0.5)    # half of the tokens in the largest self-attention (:mod:`merge`)
    fast.restore(sd)                   # back to the exact model

``scripts/approximations.py`` measures the time that each saves and how much the picture changes.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from minidiff.config import check
from minidiff.fast.deep import Deep
from minidiff.fast.merge import MOST, Merge
from minidiff.fast.switch import Switch, put_on
from minidiff.models.undo import surely
from minidiff.pipeline.base import Pipeline
from minidiff.pipeline.model import Model
from minidiff.pipeline.request import finite


def approximate(pipe: Pipeline, *, deep: int | None = None, merge: float | None = None) -> dict[str, int]:
    """Put approximations on the UNet of ``pipe``, in place, and return the number of UNets for each.

    ``deep``: the whole UNet runs at one of so many steps, and the others reuse its deep features (Ma et al. 2023); 1 is
    the exact model. ``merge``: the share of tokens, 0 to 0.75, that are merged away in self-attention at the highest
    resolution (Bolya & Hoffman 2023); 0 is the exact model. Active approximations stay on unless another value is
    given. Each is applied completely or, if interrupted, not at all.
    Raises :class:`ConfigError` for values outside these, and for ``merge`` on a UNet without transformers.
    """
    check(deep is not None or merge is not None, "nothing to approximate; give deep=3, merge=0.5 or both")
    wanted: dict[str, tuple[Any, Switch]] = {}
    if deep is not None:
        whole = isinstance(deep, int) and not isinstance(deep, bool) and deep >= 1
        check(whole, f"deep={deep!r} must be a whole number, 1 or more: the UNet runs whole at one step in so many")
        wanted["deep"] = deep, Deep(deep)
    if merge is not None:
        check(0 <= finite("merge", merge) <= MOST, f"merge={merge!r} must lie in 0..{MOST}, the share of tokens merged")
        wanted["merge"] = merge, Merge(merge)
    for name, (value, switch) in wanted.items():
        fits = switch.applies(pipe.unet)
        check(fits, f"{name}={value!r} needs a UNet with transformers, and the {pipe.config.family} UNet has none")
    on: dict[str, tuple[Switch, list[nn.Module]]] = pipe.__dict__.setdefault("_approximate", {})
    for name, (value, switch) in wanted.items():
        if pipe.approximations.get(name) == value:
            continue
        _take_off(pipe, name)
        try:
            layers: list[nn.Module] = []
            on[name] = switch, layers
            put_on(switch, [pipe.unet], layers)
            pipe.approximations[name] = value
        except BaseException:
            surely(lambda name=name: _take_off(pipe, name))  # type: ignore[misc]
            raise
    return {name: len(layers) for name, (_, layers) in on.items()}


def exact(pipe: Model) -> None:
    """Take all approximations off ``pipe``. Without any, nothing happens."""
    for name in list(pipe.__dict__.get("_approximate", {})):
        _take_off(pipe, name)


def _take_off(pipe: Model, name: str) -> None:
    on: dict[str, tuple[Switch, list[nn.Module]]] = pipe.__dict__["_approximate"]
    if name in on:
        switch, layers = on[name]
        for layer in layers:
            switch.take_off(layer)
        pipe.approximations.pop(name, None)
        del on[name]
