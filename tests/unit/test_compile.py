"""The UNet can be compiled: one graph without a break, that serves every timestep, and computes the same bits.

``backend="eager"`` traces as any backend does and then runs the graph operator by operator, so what is tested is the
tracing, in seconds and without a compiler. (Inductor fuses and differs by about 5e-6.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from minidiff.config import Level, text
from minidiff.models.unet import UNet
from tests.tolerances import assert_close
from tests.unit.tiny import UNET, redraw


@torch.no_grad()
def test_one_graph_serves_every_timestep() -> None:
    config = replace(UNET, levels=(Level(channels=16), Level(channels=16)), mid=text(16, 2))
    unet = UNet(config).eval()
    redraw(unet)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    compiled = torch.compile(unet, backend=backend, fullgraph=True, dynamic=False)
    x = torch.randn(2, config.in_channels, 8, 8)
    context = torch.randn(2, 5, 16)
    for t in torch.tensor([981, 501, 1]):
        assert_close(compiled(x, t, context), unet(x, t, context))
    assert len(graphs) == 1
