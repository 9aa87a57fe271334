"""Static check of the source: no sampler step, and nothing in the loop, fetches a value from a tensor.

A value asked for on the host makes it wait for the card, and a coefficient that is a Python float rounds elsewhere.
``cuda_guard.py`` sees it where a test runs the line; this finds it on every line that a step can reach.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FunctionType, ModuleType
from typing import Any

import pytest
from torch import Tensor

from minidiff.pipeline import StableDiffusion, guidance
from minidiff.pipeline.denoise import Step, denoise
from minidiff.pipeline.guidance import predictor
from minidiff.pipeline.latents import putting_back
from minidiff.samplers import DDIM, SAMPLERS

FETCHES = {"item", "tolist", "numpy", "cpu", "nonzero"}
# Asked in the first row alone, and only of an epsilon model on a schedule that begins in pure noise.
ONCE = {"Limited.denoised: bool(x0.isnan().any())"}
NUMBERS = {"float", "int", "bool", "complex"}


def reached(function: Any, owner: Any = None) -> dict[str, ast.AST]:
    """The syntax of ``function`` and of all of minidiff's that it calls, by name. ``owner``: the class of ``self``."""
    found: dict[str, ast.AST] = {}

    def visit(function: Any) -> None:
        function = inspect.unwrap(function)
        if function.__qualname__ in found or not isinstance(function, FunctionType):
            return
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        found[function.__qualname__] = tree
        for node in ast.walk(tree):
            target: Any = None
            if isinstance(node, ast.Name):
                target = function.__globals__.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                holder = function.__globals__.get(node.value.id)
                holder = owner if node.value.id == "self" else holder
                known = isinstance(holder, (ModuleType, type))
                target = inspect.getattr_static(holder, node.attr, None) if known else None
                target = target.fget if isinstance(target, property) else target
            if isinstance(target, FunctionType) and target.__module__.split(".")[0] in ("minidiff", "tests"):
                visit(target)

    visit(function)
    return found


def fetches(function: Any, owner: Any = None) -> list[str]:
    """The calls, in ``function`` and in what it calls, that turn a tensor into a number or move it to the host."""
    wrong = []
    for name, tree in reached(function, owner).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                method = isinstance(node.func, ast.Attribute) and node.func.attr in FETCHES
                number = isinstance(node.func, ast.Name) and node.func.id in NUMBERS
                if method or number:
                    wrong.append(f"{name}: {ast.unparse(node)}")
    return wrong


@pytest.mark.parametrize("method", ["start", "scale_input", "denoised", "step"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_step_fetches_a_value(name: str, method: str) -> None:
    kind = SAMPLERS[name]
    assert set(fetches(getattr(kind, method), kind)) <= ONCE


@pytest.mark.parametrize("function", [denoise, Step.x0.fget, predictor, putting_back, guidance.guide, guidance.rescale])
def test_the_loop_fetches_no_value(function: Any) -> None:
    assert fetches(function, StableDiffusion) == []


def fetching_helper(x: Tensor) -> Tensor:
    return x * x.max().item()


class Fetching(DDIM):
    def step(self, plan: Any, i: int, x: Tensor, out: Tensor, state: Any, draw: Any) -> Any:
        return self.inner(plan, i, x) * float(plan.signal[i]), state

    def inner(self, plan: Any, i: int, x: Tensor) -> Tensor:
        return fetching_helper(x)


def test_a_fetched_value_is_seen() -> None:
    assert fetches(Fetching.step, Fetching) == [
        "Fetching.step: float(plan.signal[i])",
        "fetching_helper: x.max().item()",
    ]
