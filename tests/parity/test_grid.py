"""A sample of the grid of samplers and options; ``scripts/parity_grid.py`` goes through all of it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from minidiff.samplers import sampler_from_diffusers
from minidiff.samplers.diffusers.classes import READERS
from tests.support.parity import grid
from tests.support.parity.axes import SD
from tests.support.parity.sampler_twins import DTYPES

PER_CLASS = 6
SHORT = (1, 5)


def sample(name):
    """A few configs of the class, from all over its part of the grid, each with some ways to plan it and a dtype."""
    configs = grid.configs(name)
    few = configs[:: max(1, len(configs) // PER_CLASS)]
    runs = [r for r in grid.givens(name) if r.get("num_inference_steps", 3) in (*SHORT, 3)]
    for i, c in enumerate(few):
        yield c, [runs[i % len(runs)], runs[(i + 1) % len(runs)]], [DTYPES[i % 3]]


@pytest.mark.parametrize("name", grid.GRID)
def test_a_sample_is_equal_bit_for_bit_or_refused_as_the_reference_fails(name):
    found = Counter()
    for c, runs, dtypes in sample(name):
        for outcome in grid.outcomes(c, runs, dtypes):
            alone = outcome.status == grid.OURS and any(why in outcome.note for why in grid.ALONE)
            assert alone or outcome.status in (grid.EQUAL, grid.NEAR, grid.OVERFLOW, grid.BOTH), outcome.note
            found[outcome.status] += 1
    assert found[grid.EQUAL] + found[grid.NEAR] >= 2


def test_the_grid_has_every_class_that_is_read():
    assert set(grid.GRID) == set(READERS)


@pytest.mark.parametrize("name", READERS)
def test_the_grid_gives_every_field_of_a_class_another_value_than_its_default(name):
    """Or the field is named here, with why not."""
    fields = {**grid_defaults(name)}
    moved = {key for c in grid.configs(name) for key, value in c.items() if fields.get(key, value) != value}
    moved |= set(SD) | {"trained_betas", "num_train_timesteps", "beta_schedule"}
    left = set(fields) - moved - IDLE.get(name, set()) - REFUSED
    assert not left, f"{name}: the grid never sets {sorted(left)}"


# what changes nothing in the reference (see the samplers' docstrings)
IDLE = {
    "LCMScheduler": {"set_alpha_to_one", "steps_offset", "timestep_spacing"},
    "TCDScheduler": {"set_alpha_to_one", "steps_offset", "timestep_spacing", "timestep_scaling"},
    "DDIMInverseScheduler": {"set_alpha_to_zero"},  # the old name of set_alpha_to_one
    "IPNDMScheduler": {"beta_start", "beta_end", "prediction_type"},
    "CMStochasticIterativeScheduler": {"prediction_type"},
}
# what minidiff refuses when it is set
REFUSED = {"solver_p", "use_dynamic_shifting", "shift_terminal", "tau_func"}


def grid_defaults(name):
    return READERS[name].fields | {"prediction_type": "epsilon"}


def test_a_slip_is_found(monkeypatch):
    """A last bit that differs, in one step of one combination."""
    c = grid.configs("EulerDiscreteScheduler")[0]
    kind = type(sampler_from_diffusers(c))
    step = kind.step

    def slips(self, plan, i, x, out, state, draw):
        after, state = step(self, plan, i, x, out, state, draw)
        if i == 3:
            after[0, 0, 0, 0] = torch.nextafter(after[0, 0, 0, 0], torch.tensor(1e3))
        return after, state

    monkeypatch.setattr(kind, "step", slips)
    runs = [{"num_inference_steps": n} for n in (3, 5)]
    first, second = grid.outcomes(c, runs, [torch.float32])
    assert first.status == grid.EQUAL
    assert second.status == grid.DIFFERENT
    assert "row 3: 1 of 210 entries differ" in second.note


def test_equal_trajectories_have_one_key_and_others_have_their_own():
    """The offset counts with leading spacing only, and the order of a solver not in a single step."""
    one, other = (
        grid.config("DPMSolverMultistepScheduler", solver_order=order, steps_offset=offset)
        for order, offset in ((2, 0), (3, 7))
    )
    runs = [{"num_inference_steps": n} for n in (1, 20)]
    a, b = ([o.key for o in grid.outcomes(c, runs, [torch.float32])] for c in (one, other))
    assert a[0] == b[0]
    assert a[1] != b[1]
    (half,) = grid.outcomes(one, runs[:1], [torch.float16])
    assert half.key != a[0]


def test_a_refusal_is_held_against_the_reference():
    refused = grid.config("DPMSolverMultistepScheduler", algorithm_type="dpmsolver")
    (both,) = grid.outcomes(refused, [{"num_inference_steps": 2}], [torch.float32])
    assert both.status == grid.BOTH
    alone = {"_class_name": "IPNDMScheduler", "trained_betas": [0.9, 0.5, 0.1]}
    (ours,) = grid.outcomes(alone, [{"num_inference_steps": 2}], [torch.float32])
    assert ours.status == grid.OURS
    assert "trained_betas are the noise of every row" in ours.note
