"""Switches that trade time for memory: smaller batches, tiles and offloading, as far as a CPU can test them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import cli, fast, read_recipe
from minidiff.config import TAESDConfig, VAEConfig
from minidiff.errors import ConfigError
from minidiff.fast.graphs import Graphs
from minidiff.fast.halves import SplitUNet, cut
from minidiff.fast.switch import put_on
from minidiff.fast.vae_tiles import VaeTiles
from minidiff.models.taesd import TAESD
from minidiff.models.vae import VAE
from minidiff.pipeline import StableDiffusion
from tests.support.tiny import redraw, tiny_ddpm, tiny_sd, tiny_xl
from tests.tolerances import BATCH, BLENDED, TILED, assert_close


@pytest.fixture
def sd() -> Iterator[StableDiffusion]:
    pipe = tiny_sd()
    yield pipe
    fast.restore(pipe)


def drawn(pipe: StableDiffusion, prompts: Any = "a horse", **options: Any) -> Tensor:
    found: Tensor = pipe.generate(prompts, **{"seed": 1, "steps": 3, "output": "tensor", "progress": False, **options})
    return found


# --- one picture at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vae", "taesd"])
@torch.no_grad()
def test_slices_have_the_bits_of_one_alone(sd: StableDiffusion, kind: str) -> None:
    if kind == "taesd":
        sd.vae = TAESD(TAESDConfig()).eval()  # type: ignore[assignment]
        sd.parts["vae"] = sd.vae
        redraw(sd.vae)
    z = torch.randn(3, 4, 5, 6)
    alone = torch.cat([sd.vae.decode(one) for one in z.split(1)])
    together = sd.vae.decode(z)
    assert fast.optimize(sd, ("vae_slices",)) == {"vae_slices": 1}
    assert torch.equal(sd.vae.decode(z), alone)
    fast.restore(sd)
    assert "decode" not in sd.vae.__dict__
    assert torch.equal(sd.vae.decode(z), together)


# --- guidance, one half after the other -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_sd, tiny_xl])
def test_guidance_in_halves(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of each half are those of a batch of its size, so pictures differ as pictures of other batches do."""
    pipe = make()
    plain = drawn(pipe, ["a horse", "a cow"], output="latent")
    batches: list[int] = []
    forward = type(pipe.unet).forward

    def watched(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batches.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "forward", watched)
    fast.optimize(pipe, ("halves",))
    assert_close(drawn(pipe, ["a horse", "a cow"], output="latent"), plain, BATCH)
    assert set(batches) == {2}
    batches.clear()
    drawn(pipe, "a horse", guidance_scale=1)
    assert set(batches) == {1}, "nothing to halve"
    fast.restore(pipe)
    assert torch.equal(drawn(pipe, ["a horse", "a cow"], output="latent"), plain)


@torch.no_grad()
def test_all_that_belongs_to_a_picture_is_cut(sd: StableDiffusion) -> None:
    x, context = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16)
    t, skips = torch.tensor([1, 400, 700, 981]), [torch.randn(4, *shape) for shape in ((16, 8, 8), (24, 4, 4))]
    residuals = [skips[0], skips[0], torch.randn(4, 16, 4, 4), skips[1]], skips[1]
    wanted = [
        sd.unet(x[r], t[r], context[r], residuals=([s[r] for s in residuals[0]], residuals[1][r]))
        for r in (slice(0, 2), slice(2, 4))
    ]
    fast.optimize(sd, ("halves",))
    assert torch.equal(sd.unet(x, t, context, residuals=residuals), torch.cat(wanted))
    assert cut((torch.tensor(3.0), 5, None), slice(0, 2), 4) == (torch.tensor(3.0), 5, None)


def test_on_a_card_halves_wait_until_the_whole_does_not_fit() -> None:
    """A card of so much memory that two pictures fit, and four do not."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tried: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.tried.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("no more")
            return x

    class OnACard(Tensor):
        is_cuda = True  # type: ignore[assignment]

    small = Small()
    SplitUNet(small)
    two, four = (torch.ones(n, 1).as_subclass(OnACard) for n in (2, 4))
    small(two)
    assert small.tried == [2], "whole"
    assert small(four).shape == (4, 1)
    assert small.tried == [2, 4, 2, 2]
    small(four)
    assert small.tried == [2, 4, 2, 2, 2, 2], "not tried again"


# --- tiles ------------------------------------------------------------------------------------------------------------


class Enlarging(nn.Module):
    """A decoder that looks at nothing but the latent itself: in tiles it has to give the same picture."""

    def decode(self, z: Tensor) -> Tensor:
        return F.interpolate(z[:, :3], scale_factor=8.0, mode="nearest")


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 17), (23, 11), (31, 64), (3, 40)])
@pytest.mark.parametrize(("side", "overlap"), [(8, 1), (8, 4), (8, 3)])
def test_every_pixel_of_every_size_has_its_place(size: tuple[int, int], side: int, overlap: int) -> None:
    vae = Enlarging()
    z = torch.randn(2, 4, *size)
    whole = vae.decode(z)
    tiles = VaeTiles(vae, side, overlap)
    assert_close(vae.decode(z), whole, BLENDED)
    starts = tiles.starts(size[1])
    assert all(b - a <= side - overlap for a, b in pairwise(starts))
    assert max(starts[-1] + side, size[1]) == max(size[1], side)


def vae_pair(config: VAEConfig, z: Tensor, **how: int) -> tuple[Tensor, Tensor]:
    """(whole, tiled)"""
    torch.manual_seed(0)
    vae = VAE(config).eval()
    redraw(vae)
    with torch.no_grad():
        whole = vae.decode(z)
        VaeTiles(vae, **how)
        return whole, vae.decode(z)


@pytest.mark.parametrize("channels", [(8, 8, 8, 16), (32, 64, 64, 64)], ids=["tiny", "middling"])
def test_tiles_are_near_the_whole(channels: tuple[int, ...]) -> None:
    """In units of the picture's spread, on noise, which random weights do not make smooth."""
    z = torch.randn(1, 4, 24, 20, generator=torch.Generator().manual_seed(0))
    whole, tiled = vae_pair(VAEConfig(channels=channels, layers=1, groups=8), z, side=16, overlap=4)
    error = (tiled - whole).std() / whole.std()
    assert 0 < error < TILED.absolute


def test_small_pictures_are_decoded_whole(sd: StableDiffusion) -> None:
    plain = drawn(sd)
    fast.tiled(sd)
    assert torch.equal(drawn(sd), plain)


def test_tiles_are_in_the_recipe_and_come_off(sd: StableDiffusion) -> None:
    plain = drawn(sd)
    fast.tiled(sd, side=4)
    fast.tiled(sd, side=6)
    run = sd.steps("a horse", steps=1, seed=1)
    assert run.recipes[0]["approximate"] == {"vae_tiles": 6}
    assert not torch.equal(drawn(sd), plain)
    fast.restore(sd)
    assert "approximate" not in sd.steps("a horse", steps=1, seed=1).recipes[0]
    assert "decode" not in sd.vae.__dict__
    assert torch.equal(drawn(sd), plain)


@pytest.mark.parametrize("tiles_first", [True, False])
@torch.no_grad()
def test_tiles_and_slices_together(sd: StableDiffusion, tiles_first: bool) -> None:
    """In either order, and either is taken off without the other."""
    z = torch.randn(2, 4, 8, 8)
    plain = sd.vae.decode(z)
    fast.tiled(sd, side=6)
    wanted = torch.cat([sd.vae.decode(one) for one in z.split(1)])
    if not tiles_first:
        fast.restore(sd)
        fast.optimize(sd, ("vae_slices",))
        fast.tiled(sd, side=5)
        fast.tiled(sd, side=6)
    fast.optimize(sd, ("vae_slices",))
    assert torch.equal(sd.vae.decode(z), wanted)
    fast.restore(sd)
    assert "decode" not in sd.vae.__dict__
    assert torch.equal(sd.vae.decode(z), plain)


@pytest.mark.parametrize("side", [3, 0, 64.0])
def test_tiles_that_cannot_be(sd: StableDiffusion, side: Any) -> None:
    with pytest.raises(ConfigError, match=f"side={side} of a tile must be a whole number"):
        fast.tiled(sd, side)
    with pytest.raises(ConfigError, match="has no VAE"):
        fast.tiled(tiny_ddpm())


def test_options_of_the_command_line(sd: StableDiffusion, tmp_path: Path) -> None:
    """They reach the model, and a recipe repeats the one that changes the picture."""
    sd.save(tmp_path / "model.safetensors")
    how = ["--model", str(tmp_path / "model.safetensors"), "--device", "cpu", "--quiet"]
    made = ["a horse", "a cow", "--seed", "1", "--steps", "1", "--size", "576x64"]
    memory = ["--vae-slices", "--vae-tiles", "--split-guidance"]
    assert cli.main(["generate", *how, *made, *memory, "--out", str(tmp_path)]) == 0
    pictures = sorted(tmp_path.glob("*.png"))
    assert [read_recipe(p)["approximate"] for p in pictures] == [{"vae_tiles": 64}] * 2
    out = tmp_path / "again.png"
    assert cli.main(["generate", *how, "--recipe", str(pictures[0]), "--vae-slices", "--out", str(out)]) == 0
    assert read_recipe(out)["approximate"] == {"vae_tiles": 64}


# --- switches for cards -----------------------------------------------------------------------------------------------


def test_switches_for_cards_do_nothing_on_a_cpu(sd: StableDiffusion) -> None:
    plain = drawn(sd)
    for names in (("channels_last",), ("graphs",)):
        assert fast.optimize(sd, names) == dict.fromkeys(names, 0)
        assert torch.equal(drawn(sd), plain)
        fast.restore(sd)


def test_offloading_to_where_a_model_is_changes_nothing(sd: StableDiffusion) -> None:
    plain, parameters = drawn(sd), list(sd.unet.parameters())
    fast.offload(sd, "cpu")
    fast.offload(sd, "cpu")
    with pytest.raises(ConfigError, match="take turns on cpu already"):
        fast.offload(sd, "meta")
    fast.optimize(sd, ("inplace", "memory"))
    assert torch.equal(drawn(sd), plain)
    fast.restore(sd)
    assert torch.equal(drawn(sd), plain)
    assert all(a is b for a, b in zip(sd.unet.parameters(), parameters, strict=True))
    fast.optimize(sd)
    with pytest.raises(ConfigError, match="offload first"):
        fast.offload(sd, "cpu")


def test_a_setting_of_the_process_is_left_to_it(sd: StableDiffusion) -> None:
    with pytest.raises(ConfigError, match=r"'tf32' is a setting of the whole process.*set_float32_matmul_precision"):
        fast.optimize(sd, ("channels_last", "tf32"))
    assert sd.fast == ()


def test_what_a_graph_answers_is_kept(sd: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph writes every answer to one place; PNDM looks back at the last four."""
    plain = drawn(sd, steps=6)
    asked: dict[str, Any] = {}

    def compiled(f: Any, **options: Any) -> Any:
        asked.update(options)
        place: list[Tensor] = []

        def call(*args: Any, **kwargs: Any) -> Tensor:
            out = f(*args, **kwargs)
            place.append(out) if not place else place[0].copy_(out)
            return place[0]

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    (layer,) = put_on(Graphs(), [sd.unet])
    assert asked == {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
    assert torch.equal(drawn(sd, steps=6), plain)
    Graphs().take_off(layer)
    assert torch.equal(drawn(sd, steps=6), plain)
