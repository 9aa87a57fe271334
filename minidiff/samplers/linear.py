"""Plans as tables of numbers: each step as a few multiplications and additions, for a caller in any language.

Most samplers are linear. In row i, the next sample is a weighted sum of the sample ``x``, the model's output ``out``,
the fresh ``noise`` and the values that a multistep method remembers, with weights that only depend on the noise levels:

    x_next = a * x + b * out + c * noise + d * outputs[-1] + ...

and so is every value that it remembers for later rows. The weights are not written down a second time: they are read
off the sampler's own ``step``, which is called with 1 for one of the arguments and 0 for all the others. Then the step
is repeated with random numbers of different sizes, and a sampler that does anything else with them is refused: a clamp,
a threshold, a learned variance, a source of noise of its own.

A table holds for a run from its first row, without inpainting. Guidance comes before: ``out`` is the guided output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidiff.errors import UnsupportedError
from minidiff.samplers.method import Draw

Weights = Mapping[str, float]
"""Weights of a sum by the name of the value: "x", "out", "noise", or a remembered one. Those that are 0 are left
out."""

GIVEN = ("x", "out", "noise")
SIZES = (0.01, 1.0, 100.0)  # of the random values with which the weights are checked
EXAMPLES = 32
ROUNDING = 1e-5  # of the sum of the magnitudes: methods that compute in float32 round, and some take differences
NOT_LINEAR = {
    "clip": ("clamps x0", "None"),
    "threshold": ("divides x0 by a quantile of it", "None"),
    "noise_seed": ("takes its noise from a path of its own", "None"),
    "learned_variance": ("takes half of the output's channels", "False"),
    "variance": ("takes its variance from the model's output", "fixed_small"),
}
"""Options after which a step is not linear: what it does then, and the value after which it is."""


@dataclass(frozen=True)
class LinearRow:
    """One model call. The model gets ``scale`` * x and ``timestep``; with its output, ``x`` is the next sample, and
    ``x0`` the estimate of the picture at this row. ``remember``: the new values of what later rows need, all from the
    values before the step. ``draws``: True if the sampler draws noise in this row, even if its weight is 0."""

    timestep: float | int
    scale: float
    x: Weights
    x0: Weights
    remember: Mapping[str, Weights]
    draws: bool

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON has it."""
        return {name: dict(v) if isinstance(v, Mapping) else v for name, v in vars(self).items()} | {
            "remember": {name: dict(sum_) for name, sum_ in self.remember.items()}
        }


@dataclass(frozen=True)
class Table:
    """A plan as weights. The first sample is standard normal noise times ``first``, and ``x`` after the last of
    ``rows`` is the result. ``remembered``: names of all values that are kept between rows; they need no first value,
    since no row uses one that none before has set."""

    method: str
    prediction: str
    first: float
    rows: tuple[LinearRow, ...]

    @property
    def remembered(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for row in self.rows for name in row.remember))

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON has it."""
        rows = [row.to_json() for row in self.rows]
        return {"method": self.method, "prediction": self.prediction, "first": self.first, "rows": rows}

    def run(self, x: Tensor, predict: Callable[[Tensor, float | int], Tensor], draw: Draw) -> Iterator[Tensor]:
        """Yield the sample after each row, from the first sample ``x``, in its dtype. ``predict``: the guided model,
        called with the scaled sample and the timestep. ``draw``: fresh noise like the tensor that it is given."""
        values = {"x": x}
        for row in self.rows:
            values["out"] = predict(row.scale * values["x"], row.timestep)
            values["noise"] = draw(values["out"]) if row.draws else torch.zeros_like(values["out"])
            values = {"x": total(row.x, values)} | {name: total(sum_, values) for name, sum_ in row.remember.items()}
            yield values["x"]


def total(weights: Weights, values: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of ``values`` with these weights."""
    parts = [weight * values[name] for name, weight in weights.items()]
    return sum(parts[1:], parts[0]) if parts else torch.zeros_like(values["x"])


def table(sampler: Any, plan: Any) -> Table:
    """Return ``plan`` of ``sampler`` as weights. Raises UnsupportedError, naming the sampler and what it does, if a
    step is not linear."""
    _check_options(sampler, plan.method)
    state, rows = sampler.start(), []
    for i in range(len(plan)):
        found, state = _probe(sampler, plan, i, state)
        rows.append(found)
    first = float(plan.init_noise_sigma)
    return Table(plan.method, plan.prediction, first, _without_the_unused(rows))


def row_at(sampler: Any, plan: Any, i: int, state: Any) -> LinearRow:
    """Return row ``i`` as weights, as it is with ``state`` before it, whichever row was the first of the run. All that
    the state then holds is in ``remember``. Raises UnsupportedError if the step is not linear."""
    _check_options(sampler, plan.method)
    return _probe(sampler, plan, i, state)[0]


def remembered(state: Any) -> dict[str, Tensor]:
    """Return the tensors in a sampler's state by the names that weights give them, such as "outputs[-1]"."""
    return dict(zip(_names(state), _tensors(state), strict=True))


def _check_options(sampler: Any, method: str) -> None:
    for option, (does, instead) in NOT_LINEAR.items():
        value = getattr(sampler, option, None)
        if value is None or value is False or (option == "variance" and not value.startswith("learned")):
            continue
        raise UnsupportedError(
            f"{method} with {option}={value!r} {does}, which weights can't: use {option}={instead} or another sampler"
        )


def _probe(sampler: Any, plan: Any, i: int, state: Any) -> tuple[LinearRow, Any]:
    """Return row ``i`` and the state after it. ``state`` gives the structure alone; the values in it don't count."""
    names = (*GIVEN, *_names(state))
    one_each = torch.eye(len(names) + 1, dtype=torch.float64, device="cpu")[:-1]  # and one example of zeros alone
    probe = _Step(sampler, plan, i, state, dict(zip(names, one_each, strict=True)))
    sums = {kind: _weights(names, column, plan, i) for kind, column in probe.found.items()}
    random = torch.Generator().manual_seed(i)
    shape = (len(names), EXAMPLES)
    sizes = torch.tensor(SIZES, dtype=torch.float64, device="cpu")[torch.randint(len(SIZES), shape, generator=random)]
    values = sizes * torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")
    given = dict(zip(names, values, strict=True))
    for kind, column in _Step(sampler, plan, i, state, given).found.items():
        sum_ = sums[kind]
        magnitude = torch.stack([max(abs(sum_.get(name, 0.0)), 1.0) * v.abs() for name, v in given.items()]).sum(dim=0)
        gap = (column - total(sum_, given)).abs()
        if not bool((gap <= ROUNDING * magnitude).all()):
            raise UnsupportedError(_not_linear(plan, i))
    found = LinearRow(
        timestep=plan.timesteps[i].item(),
        scale=sums.pop("scaled").get("x", 0.0),
        x=sums.pop("x"),
        x0=sums.pop("x0"),
        remember=sums,
        draws=probe.draws,
    )
    return found, probe.state


class _Step:
    """Row ``i`` of the sampler, run with the values ``given`` (n,) by name. ``found``: the results (n,) by name, and
    ``state``, the new state."""

    def __init__(self, sampler: Any, plan: Any, i: int, state: Any, given: Mapping[str, Tensor]) -> None:
        # a pixel each, in n examples, so that what looks at a whole example sees one value
        values = {name: value[:, None, None, None] for name, value in given.items()}
        self.draws = False

        def draw(like: Tensor) -> Tensor:
            if self.draws:
                raise UnsupportedError(f"{plan.method} draws noise more than once in row {i}: a table has one")
            self.draws = True
            return values["noise"]

        rest = iter([values[name] for name in values if name not in GIVEN])
        before = _filled(state, rest)
        x, out = values["x"], values["out"]
        with torch.no_grad():
            scaled = sampler.scale_input(plan, i, x)
            x0 = sampler.denoised(plan, i, x, out, before)
            after, self.state = sampler.step(plan, i, x, out, before, draw)
        columns = {"scaled": scaled, "x": after, "x0": x0, **remembered(self.state)}
        self.found = {name: column.double().flatten() for name, column in columns.items()}


def _weights(names: tuple[str, ...], column: Tensor, plan: Any, i: int) -> Weights:
    """Return the weights from the results for each of ``names`` and, last, for zeros alone, which must be 0."""
    *found, nothing = column.tolist()
    if nothing != 0 or not bool(column.isfinite().all()):
        raise UnsupportedError(_not_linear(plan, i))
    return {name: weight for name, weight in zip(names, found, strict=True) if weight != 0}


def _not_linear(plan: Any, i: int) -> str:
    return f"{plan.method} is not linear in row {i}, so its steps can't be given as weights: use another sampler"


def _names(state: Any, name: str = "outputs") -> list[str]:
    """Return the names of the tensors in a state. Those of a sequence are counted from the latest, "outputs[-1]"; what
    has the name of a given value is of an earlier row, "noise[-1]"."""
    if isinstance(state, Tensor):
        return [f"{name}[-1]" if name in GIVEN else name]
    if not isinstance(state, tuple):
        return []
    if hasattr(state, "_fields"):
        return [x for field, part in zip(state._fields, state, strict=True) for x in _names(part, field)]
    return [x for k, part in enumerate(state) for x in _names(part, f"{name}[{k - len(state)}]")]


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, tuple):
        return [x for part in state for x in _tensors(part)]
    return [state] if isinstance(state, Tensor) else []


def _filled(state: Any, values: Iterator[Tensor]) -> Any:
    """Return ``state`` with the next of ``values`` in the place of each tensor."""
    if isinstance(state, tuple):
        parts = [_filled(part, values) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return next(values) if isinstance(state, Tensor) else state


def _without_the_unused(rows: list[LinearRow]) -> tuple[LinearRow, ...]:
    """Return the rows without the remembered values that no later sample needs."""
    needed: set[str] = set()
    found = []
    for row in reversed(rows):
        remember = {name: sum_ for name, sum_ in row.remember.items() if name in needed}
        needed = {name for sum_ in (row.x, row.x0, *remember.values()) for name in sum_}
        found.append(LinearRow(row.timestep, row.scale, row.x, row.x0, remember, row.draws))
    return tuple(reversed(found))
