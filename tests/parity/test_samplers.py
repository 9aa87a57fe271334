"""Every sampler against diffusers, step by step: equal bits. The cases are listed in ``sampler_cases.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minidiff.errors import ConfigError
from minidiff.samplers import Scheduler
from tests.support.parity.axes import Config
from tests.support.parity.sampler_cases import FAMILIES, Family, Refused
from tests.support.parity.sampler_twins import (
    DTYPES,
    compare,
    compare_all,
    compare_some,
    compare_starts,
    compare_wide,
    label,
    reference,
    step_options,
    takes_generator,
    turn,
    walk_reference,
)  # fmt: skip


def each(attribute: str) -> list[Any]:
    """One test for each entry of a list of every family."""
    return [
        pytest.param(family, entry, id=f"{family.name.removesuffix('Scheduler')}-{shown(family, entry)}")
        for family in FAMILIES
        for entry in getattr(family, attribute)
    ]


def shown(family: Family, entry: Any) -> str:
    options, *given = entry if isinstance(entry, tuple) else (entry,)
    length = "" if not given else f"-{given[0]}"[:50]
    return label({**options, "_class_name": ""}) + length


@pytest.mark.parametrize(("family", "c"), each("configs"))
def test_trajectories(family: Family, c: Config) -> None:
    first = family.configs.index(c) + family.first_turn
    lengths = family.lengths(c, first) if callable(family.lengths) else family.lengths
    if family.how == "all":
        compare_all(c, lengths)
    elif family.how == "wide":
        compare_wide(c, lengths)
    elif has_middles(c):
        compare_some(c, first, lengths)
    else:
        for j, n in enumerate(lengths):
            if has_middles(c, n):
                compare(c, n, turn(DTYPES, first + j))


def has_middles(c: Config, *lengths: int) -> bool:
    """True if the reference's DPM2 has one in each interval; see the entry of its ancestral form."""
    if "Ancestral" not in c["_class_name"] or "KDPM2" not in c["_class_name"]:
        return True
    ref = reference(c)
    for n in lengths or (1, 2, 3, 5, 20):
        ref.set_timesteps(n)
        if bool(ref.timesteps.isnan().any()):
            return False
    return True


@pytest.mark.parametrize(("family", "c"), each("also_all"))
def test_every_length_in_every_dtype(family: Family, c: Config) -> None:
    compare_all(c, family.lengths(c, 0) if callable(family.lengths) else family.lengths)


@pytest.mark.parametrize(("family", "c"), each("starts"))
def test_from_every_row(family: Family, c: Config) -> None:
    compare_starts(c, family.start_steps, family.start_every)


@pytest.mark.parametrize(("family", "run"), each("runs"))
def test_single_runs(family: Family, run: tuple[Config, Any]) -> None:
    options, given = run
    if isinstance(given, int):
        compare(family.make(options), given)
    else:
        compare(family.make(options), None, **given)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.mixed], ids=lambda f: f.name)
def test_sample_and_model_of_different_dtypes(family: Family) -> None:
    """UniPC: in a step of order 3 the reference multiplies matrices of both, and raises."""
    for of_x, of_model in family.dtypes:
        refused = 0
        for c in map(family.make, family.mixed):
            try:
                compare(c, 10, of_x, out_dtype=of_model)
            except ConfigError:
                with pytest.raises(RuntimeError, match="expected"):
                    walk_reference(c, {"num_inference_steps": 10}, of_x, of_model)
                refused += 1
        assert 3 <= refused <= 12 if family.name.startswith("UniPC") else refused == 0


@pytest.mark.parametrize(("family", "refused"), each("refused"))
def test_refused(family: Family, refused: Refused) -> None:
    """Trap: limits of the reference."""
    c = family.make(refused.options)
    error, message = refused.theirs if isinstance(refused.theirs, tuple) else (refused.theirs, "")
    if error == "nan":
        assert not is_finite(c, refused.given)
    elif error is not None:
        with pytest.raises(error, match=message):
            is_finite(c, refused.given)
    with pytest.raises(ConfigError, match=refused.ours):
        Scheduler.from_diffusers(c).set_timesteps(**refused.given)


def is_finite(c: Config, given: dict[str, Any]) -> bool:
    """True if a run of the reference gives finite samples. Stops at the first that is not."""
    ref = reference(c)
    ref.set_timesteps(**given, **{k: v for k, v in c.items() if k == "strength"})
    x, options = torch.ones(1, 3, 2, 2), step_options(ref, c)
    for i, t in enumerate(ref.timesteps):
        out = torch.full_like(x, i % 3)
        out = torch.cat([out, out], dim=1) if str(c.get("variance_type")).startswith("learned") else out
        x = ref.step(out, t, x, **options).prev_sample
        if not bool(x.isfinite().all()) or bool(t.isnan()):
            return False
    return True


@pytest.mark.parametrize(("family", "loop"), each("loops"))
def test_the_familiar_loop(family: Family, loop: tuple[Config, int]) -> None:
    """Through Scheduler, as image to image slices the timesteps."""
    c, first = family.make(loop[0]), loop[1]
    ours, theirs = Scheduler.from_diffusers(c), reference(c)
    ours.set_timesteps(8)
    theirs.set_timesteps(8)
    if first:
        theirs.set_begin_index(first)
    assert ours.order == theirs.order
    a, b = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    draws = {"generator": b} if takes_generator(theirs) else {}
    x = y = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * ours.init_noise_sigma
    assert torch.equal(ours.init_noise_sigma, torch.as_tensor(theirs.init_noise_sigma, dtype=torch.float32))
    for t in ours.timesteps[first:]:
        seen = ours.scale_model_input(x, t)
        assert torch.equal(seen, theirs.scale_model_input(y, t))
        x = ours.step(torch.sin(seen), t, x, generator=a)
        y = theirs.step(torch.sin(seen), t, y, **draws).prev_sample
        assert torch.equal(x, y)
