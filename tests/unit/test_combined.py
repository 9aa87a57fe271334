"""Controls, dialects and batches at once: under switches, in threads, and with parts that take turns in memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import Control, ControlModel, StableDiffusion, fast
from minidiff.adapters import lora
from minidiff.adapters.lora import Adapter, Update
from minidiff.pipeline import group_sizes
from minidiff.pipeline.dialects import DIALECTS
from tests.support.tiny import tiny_adapter, tiny_controlnet, tiny_sd
from tests.tolerances import BATCH, assert_close

EDGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # one for each prompt
SHORT, LONG = "a (red:1.3) cat", "a [cat:dog:0.5] and snow, " * 12
SAME = ("blocks", "inplace", "memory")  # switches that keep every bit
Models = tuple[StableDiffusion, ControlModel, ControlModel]


@pytest.fixture(autouse=True)
def pack_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches leave small layers alone, and tiny models have no others."""
    monkeypatch.setattr("minidiff.fast.packed.SMALLEST", 1)
    monkeypatch.setattr("minidiff.fast.linear.SMALLEST", 1)


def models() -> Models:
    return tiny_sd(), tiny_controlnet(), tiny_adapter()


def made(own: Models, style: str | None, *, control: bool = True) -> Tensor:
    """Four pictures of two prompts under two controls, of which one works only at first."""
    sd, net, adapter = own
    controls = [Control(net, EDGES), Control(adapter, EDGES.flip(0), 0.5, high=0.6)] if control else []
    options: dict[str, Any] = {"steps": 4, "seed": 3, "sampler": "euler", "guidance_scale": 5.0, "num_images": 2}
    options["guidance_interval"] = (0.0, 0.8)  # the last step predicts with the prompt alone
    prompts = [SHORT, LONG]
    found: Tensor = sd.generate(
        prompts, "blue", prompt_style=style, controls=controls, output="latent", progress=False, **options
    )
    assert len(found) == 4
    return found


@pytest.fixture(params=[False, True], ids=["together", "one by one"])
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that the switch `groups` leaves together, or takes for so large that each is computed alone."""
    if request.param:
        monkeypatch.setattr(group_sizes, "LARGEST", 1)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("style", [None, *DIALECTS])
def test_switches(style: str | None) -> None:
    """Those that add in the same order give the same bits; all of them stay near; none is left behind."""
    own = models()
    plain = made(own, style)
    assert not torch.equal(plain, made(own, style, control=False))
    for model in own[:2]:
        assert sum(fast.optimize(model, SAME).values()) > 0
    assert torch.equal(made(own, style), plain)
    for model in own:
        fast.optimize(model, (*fast.SWITCHES, "halves"))
    assert "packed" in own[0].fast
    near(made(own, style), plain)
    for model in own:
        fast.restore(model)
    assert torch.equal(made(own, style), plain)


@pytest.mark.usefixtures("apart")
def test_threads_under_switches() -> None:
    """Each gets the bits that it would get alone, whatever the others ask of the same models, from their first call on,
    when weights are packed."""
    ways = [(style, control) for style in (None, *DIALECTS) for control in (True, False)]
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        own, shared = models(), models()
        for model in (*own, *shared):
            fast.optimize(model)
        alone = [pool.submit(made, own, style, control=control).result() for style, control in ways]
        together = [pool.submit(made, shared, style, control=control) for style, control in ways * 2]
        for found, wanted in zip(together, alone * 2, strict=True):
            assert torch.equal(found.result(), wanted)


@pytest.mark.parametrize("style", [None, *DIALECTS])
def test_low_memory(style: str | None, tmp_path: Path) -> None:
    """The same bits, with switches too; the weights of all are given back after the run."""
    own = models()
    names = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for model, name in zip(own, names, strict=True):
        model.save(name)
    low = (
        StableDiffusion.load(names[0], "cpu", low_memory=True),
        *(ControlModel.load(name, "cpu", low_memory=True) for name in names[1:]),
    )
    assert len(low) == 3
    for switches in ((), tuple(fast.SWITCHES)):
        for model in (*own, *low):
            fast.optimize(model, switches)
        assert torch.equal(made(low, style), made(own, style))
    held = [p.untyped_storage().nbytes() for model in low[1:] for p in model.net.parameters()]
    assert sum(held) < 1000


@pytest.mark.parametrize("first", ["the adapter", "the switches"])
@pytest.mark.parametrize("live", [True, False], ids=["live", "fused"])
def test_an_adapter_of_every_layer_under_switches(live: bool, first: str) -> None:
    """No switch goes round a layer's update, whichever is put on first, and taking both off gives the model back."""
    own = models()
    sd = own[0]
    before = made(own, "a1111")
    applied = lora.apply(sd.parts, [(everywhere(sd), 0.7)], live=live)
    plain = made(own, "a1111")
    assert (plain - before).abs().max() > 0.1 * before.std()
    for switches, compare in ((SAME, torch.equal), (tuple(fast.SWITCHES), near)):
        if first == "the switches":
            applied.remove()
        for model in own:
            fast.optimize(model, switches)
        if first == "the switches":
            applied = lora.apply(sd.parts, [(everywhere(sd), 0.7)], live=live)
        assert compare(made(own, "a1111"), plain) in (True, None)
    if first == "the switches":
        applied.remove()
    for model in own:
        fast.restore(model)
    applied.remove()
    assert torch.equal(made(own, "a1111"), before)


def everywhere(sd: StableDiffusion) -> Adapter:
    """An adapter that changes every linear layer and convolution of UNet and text encoder a little."""
    g = torch.Generator().manual_seed(0)
    updates = {}
    for part in ("unet", "text_encoder"):
        for name, layer in sd.parts[part].named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                out, *rest = layer.weight.shape
                down, up = torch.randn(2, *rest, generator=g), torch.randn(out, 2, *[1] * len(rest[1:]), generator=g)
                updates[f"{part}.{name}"] = Update(down / down[0].numel() ** 0.5 / 4, up / 4)
    return Adapter("everywhere", updates)


def near(a: Tensor, b: Tensor) -> None:
    """Equal but for the kernels that a batch size, or a packed weight, picks."""
    assert_close(a / b.std(), b / b.std(), BATCH)
