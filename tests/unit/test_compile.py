"""Compilation of the UNet: one graph without a break for all timesteps, with equal bits.

``backend="eager"`` traces as any backend does and then runs the graph operator by operator, so what is tested is the
tracing, in seconds and without a compiler. Inductor, which ``fast.optimize(sd, ("compile",))`` uses, fuses and sums in
another order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minidiff import fast
from minidiff.config import Level, ModelConfig, text
from minidiff.errors import ConfigError
from minidiff.models.unet import UNet
from minidiff.pipeline import StableDiffusion, random_model
from tests.support.tiny import SD, UNET, XL, redraw, tiny_sd
from tests.tolerances import assert_close

SMALL = replace(UNET, levels=(Level(channels=16), Level(channels=16)), mid=text(16, 2))

Compile = Callable[..., Callable[..., Tensor]]


def counting(graphs: list[int]) -> Compile:
    """``torch.compile`` without a compiler, that notes the size of each graph."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    compile = torch.compile  # the real one, whatever a test puts in its place
    return lambda f, **options: compile(f, backend=backend, **options)


@torch.no_grad()
def test_one_graph_serves_every_timestep() -> None:
    unet = UNet(SMALL).eval()
    redraw(unet)
    graphs: list[int] = []
    compiled = counting(graphs)(unet, fullgraph=True, dynamic=False)
    x = torch.randn(2, SMALL.in_channels, 8, 8)
    context = torch.randn(2, 5, 16)
    for t in torch.tensor([981, 501, 1]):
        assert_close(compiled(x, t, context), unet(x, t, context))
    assert len(graphs) == 1


@torch.no_grad()
def test_controls_break_no_graph() -> None:
    unet = UNet(SMALL).eval()
    redraw(unet)
    graphs: list[int] = []
    compiled = counting(graphs)(unet, fullgraph=True, dynamic=False)
    x, t, context = torch.randn(2, SMALL.in_channels, 8, 8), torch.tensor(5), torch.randn(2, 5, 16)
    sides = (8, 8, 4, 4)  # of the skips: the first convolution, a level, its downsampling, a level
    residuals = [torch.randn(2, 16, side, side) for side in sides], torch.randn(2, 16, 4, 4)
    features = [torch.randn(2, 16, 4, 4)] * 3  # levels without attention take theirs after downsampling; the middle
    for given in ((residuals, None), (None, features), (residuals, features)):
        wanted = unet(x, t, context, residuals=given[0], features=given[1])
        assert_close(compiled(x, t, context, None, None, *given), wanted)
    assert len(graphs) == 3


# --- the switch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The graphs that the switch has compiled, with the compiler replaced."""
    found: list[int] = []
    monkeypatch.setattr(torch, "compile", counting(found))
    monkeypatch.setattr("minidiff.fast.compile.check_compiler", lambda: None)
    return found


@pytest.mark.parametrize("config", [SD, XL], ids=["sd", "xl"])
def test_no_graph_is_made_anew_over_steps_scales_and_prompts(config: ModelConfig, graphs: list[int]) -> None:
    """Of a pipeline as it runs: as many steps as one likes, by any guidance scale but 1, with any prompt."""
    sd = random_model(replace(config, unet=replace(config.unet, levels=(Level(channels=16),), mid=text(16, 2))))
    assert isinstance(sd, StableDiffusion)
    runs = [("a horse", 2, 7.5), ("a horse", 3, 3.0), ("two red foxes in the snow", 2, 1.5), ("a horse", 2, 0.0)]

    def drawn(prompt: str, steps: int, scale: float) -> Tensor:
        found: Tensor = sd.generate(
            prompt, steps=steps, guidance_scale=scale, sampler="ddim", seed=0, output="latent", progress=False
        )
        return found

    plain = [drawn(*run) for run in runs]
    assert fast.optimize(sd, ("compile",)) == {"compile": 1}
    for run, want in zip(runs, plain, strict=True):
        assert_close(drawn(*run), want)
        assert len(graphs) == 1, run
    fast.restore(sd)
    assert "forward" not in sd.unet.__dict__
    assert_close(drawn(*runs[0]), plain[0])
    assert len(graphs) == 1


def test_it_learns_uncompiled(graphs: list[int]) -> None:
    sd = tiny_sd()
    sd.unet.requires_grad_(True)
    fast.optimize(sd, ("compile",))
    sd.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 5, 16)).sum().backward()
    assert all(p.grad is not None for p in sd.unet.parameters())
    assert graphs == []


def test_it_goes_alone(graphs: list[int]) -> None:
    sd = tiny_sd()
    with pytest.raises(ConfigError, match=r"'compile' cannot be combined with inplace, memory; fast\.restore"):
        fast.optimize(sd, ("memory", "compile", "inplace"))
    fast.optimize(sd, ("compile",))
    assert fast.optimize(sd, ("compile",)) == {"compile": 1}
    with pytest.raises(ConfigError, match="'compile' cannot be combined"):
        fast.optimize(sd)
    fast.restore(sd)
    assert "compile" not in fast.optimize(sd)
    assert graphs == []


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder

    def none() -> str:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\nand more")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    sd = tiny_sd()
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and none is found.*install g\+\+") as caught:
        fast.optimize(sd, ("compile",))
    assert "\n" not in str(caught.value)
    assert "forward" not in sd.unet.__dict__
