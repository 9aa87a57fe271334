"""Initial weights of training: residual branches start at zero, everything else as it was drawn."""

from __future__ import annotations

import torch

from minidiff.pipeline import random_model
from minidiff.training.zero_init import zero_residual_branches
from tests.support import tiny
from tests.tolerances import EXACT, assert_close


@torch.no_grad()
def test_quiet_blocks_pass_their_input_on() -> None:
    sd = tiny.tiny_sd()
    x, temb, context = torch.randn(2, 16, 8, 8), torch.randn(2, 64), torch.randn(2, 5, 16)
    res, transformer, text = sd.unet.down[0].res[0], sd.unet.down[0].attn[0], sd.text_encoder
    assert not torch.equal(res(x, temb), x)
    for part in sd.parts.values():
        zero_residual_branches(part)
    assert_close(res(x, temb), x, EXACT)
    assert_close(transformer(x, context), x, EXACT)
    assert_close(sd.vae.decoder.mid(x), x, EXACT)
    ids = torch.tensor([[49406, 320, 49407]])
    assert_close(text(ids).last, text.norm(text.token(ids) + text.position.weight[:3]), EXACT)


def test_a_quiet_network_learns_in_every_weight_that_can() -> None:
    """Silent is not dead: the zeros move at the first step, and what lies behind them at the second."""
    sd = random_model(tiny.SD, seed=0)
    unet = sd.unet.requires_grad_(True)
    zero_residual_branches(unet)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.5)
    wanted = torch.randn(2, 4, 8, 8)
    for _ in range(4):
        optimizer.zero_grad()
        out = unet(torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16))
        (out - wanted).square().mean().backward()
        optimizer.step()
    still = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
