"""The UNet can be compiled: one graph without a break, that serves every timestep, and computes the same bits.

``backend="eager"`` traces as any backend does and then runs the graph operator by operator, so what is tested is the
tracing, in seconds and without a compiler. (Inductor fuses and differs by about 5e-6.)
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minidiff.models.unet import UNet
from tests.tolerances import assert_close
from tests.unit.test_fake_cuda import UNETS
from tests.unit.tiny import redraw


@pytest.mark.parametrize("kind", ["sd1", "ddpm"])
@torch.no_grad()
def test_one_graph_serves_every_timestep(kind: str) -> None:
    config = UNETS[kind]
    unet = UNet(config).eval()
    redraw(unet)
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(len(graph.graph.nodes))
        return graph

    compiled = torch.compile(unet, backend=backend, fullgraph=True, dynamic=False)
    x = torch.randn(2, config.in_channels, 8, 8)
    context = torch.randn(2, 5, config.context_dim) if config.context_dim else None
    for t in torch.tensor([981, 501, 1]):
        assert_close(compiled(x, t, context), unet(x, t, context))
    assert len(graphs) == 1
