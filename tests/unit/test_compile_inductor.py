"""The UNet compiled for real, by inductor, with frozen weights: about a minute on one core."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidiff.config import Level, text
from minidiff.fast.compile import Compile
from minidiff.models.unet import UNet
from tests.support.tiny import UNET, redraw
from tests.tolerances import COMPILED, assert_close


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@torch.no_grad()
def test_compiled_is_equal_and_goes_away_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    unet = UNet(replace(UNET, levels=(Level(channels=16),), mid=text(16, 2))).eval()
    redraw(unet)
    weights = {name: p.clone() for name, p in unet.state_dict().items()}
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    times = (981, 1)
    plain = [unet(x, t, context) for t in times]
    switch = Compile()
    switch.put_on(unet)
    for t, want in zip(times, plain, strict=True):
        assert_close(unet(x, t, context), want, COMPILED)
    assert any(tmp_path.iterdir()), "kept for the next process"
    switch.take_off(unet)
    assert all(torch.equal(p, weights[name]) for name, p in unet.state_dict().items())
    for t, want in zip(times, plain, strict=True):
        assert_close(unet(x, t, context), want)
