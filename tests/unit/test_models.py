"""The networks: shapes, sizes, parameter names, and the places where other modules can be attached."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import config as c
from minidiff.errors import ConfigError
from minidiff.models import attention as attention_module
from minidiff.models.attention import Attention
from minidiff.models.blocks import sinusoid
from minidiff.models.clip import CLIPText
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE, DiagonalGaussian
from tests.support import tiny
from tests.tolerances import EXACT, Tolerance, assert_close

ROUNDING = Tolerance(1e-5, 1e-5, "the same sum written out in another order")

THREE = replace(
    tiny.UNET,
    levels=(c.text(16, 2), c.Level(channels=24, attention="self", heads=3), c.Level(channels=32)),
    mid=c.text(32, 4, depth=2),
)
UNETS = {
    "sd": tiny.UNET,
    "three levels": THREE,
    "linear": replace(THREE, linear_proj=True, layers=2),
    "ddpm": tiny.DDPM.unet,
    "inpainting": replace(tiny.UNET, in_channels=9),
    "one level": replace(tiny.UNET, levels=(c.text(16, 2),), mid=c.text(16, 4)),
    "added": replace(tiny.UNET, added_dim=6 * 8 + 5, added_sinusoid=8),
    "guidance": replace(tiny.UNET, guidance_dim=12),
    "no attention in the middle": replace(tiny.UNET, mid=c.Level(channels=24)),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet(config: c.UNetConfig = tiny.UNET) -> UNet:
    model = UNet(config).eval().requires_grad_(False)
    tiny.redraw(model)
    return model


def inputs(config: c.UNetConfig, batch: int = 2, height: int = 8, width: int = 8) -> dict[str, Any]:
    given: dict[str, Any] = {"x": random(batch, config.in_channels, height, width), "t": torch.arange(batch) * 99 + 1}
    if config.context_dim is not None:
        given["context"] = random(batch, 7, config.context_dim, seed=1)
    if config.added_dim is not None:
        given["added"] = random(batch, config.added_dim - 6 * config.added_sinusoid, seed=2), torch.ones(batch, 6) * 64
    if config.guidance_dim is not None:
        given["guidance"] = random(batch, config.guidance_dim, seed=3)
    return given


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "count"),
    [
        (UNet, c.SD15, 859_520_964),
        (UNet, c.SD21, 865_910_724),
        (UNet, c.SDXL, 2_567_463_684),
        (UNet, c.DDPM_CAT256, 113_673_219),
        (VAE, c.VAE_SD, 83_653_863),
        (VAE, c.VAE_SDXL, 83_653_863),
        (CLIPText, c.CLIP_L, 123_060_480),
        (CLIPText, c.OPENCLIP_H, 340_387_840),
        (CLIPText, c.OPENCLIP_BIGG, 694_659_840),
    ],
)
def test_the_presets_have_the_published_number_of_parameters(kind: Any, config: Any, count: int) -> None:
    with torch.device("meta"):
        model = kind(config)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 8, 8), (3, 5, 9), (1, 7, 2), (2, 13, 11)])
def test_unet_keeps_the_size_of_its_input(name: str, batch: int, height: int, width: int) -> None:
    config = UNETS[name]
    if config.asymmetric_down and min(height, width) < 3:
        width = 3
    found = unet(config)(**inputs(config, batch, height, width))
    assert found.shape == (batch, config.out_channels, height, width)
    assert found.isfinite().all()
    assert found.std() > 1e-3


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 2, 2), (2, 3, 5), (3, 1, 4)])
def test_vae_shapes(levels: int, batch: int, height: int, width: int) -> None:
    config = c.VAEConfig(channels=(8, 16, 16, 24)[:levels], layers=1, groups=8, latent_channels=3)
    vae = VAE(config).eval().requires_grad_(False)
    tiny.redraw(vae)
    f = config.factor
    assert f == 2 ** (levels - 1)
    pixels = vae.decode(random(batch, 3, height, width))
    assert pixels.shape == (batch, 3, height * f, width * f)
    gaussian = vae.encode(pixels)
    assert gaussian.mean.shape == gaussian.logvar.shape == (batch, 3, height, width)
    assert_close(vae(pixels), vae.decode(gaussian.mean))


def test_vae_without_attention_and_quant_convs() -> None:
    config = c.VAEConfig(channels=(8, 16), layers=1, groups=8, mid_attention=False, quant_convs=False)
    vae = VAE(config)
    assert not any("attn" in name or "quant" in name for name in vae.state_dict())
    assert vae(random(1, 3, 4, 4)).shape == (1, 3, 4, 4)


# --- UNet ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNETS)
def test_a_scalar_time_is_the_same_time_for_all(name: str) -> None:
    config, model = UNETS[name], unet(UNETS[name])
    given = inputs(config, batch=3)
    want = model(**given | {"t": torch.tensor([42, 42, 42])})
    for t in (42, 42.0, torch.tensor(42), torch.tensor(42.0), torch.tensor([42]), torch.tensor([42.0] * 3)):
        assert_close(model(**given | {"t": t}), want)
    assert not torch.equal(model(**given | {"t": 43}), want)


@pytest.mark.parametrize("name", UNETS)
def test_everything_that_a_unet_is_told_counts(name: str) -> None:
    config, model = UNETS[name], unet(UNETS[name])
    given = inputs(config)
    want = model(**given)
    for key, value in given.items():
        entries = value if isinstance(value, tuple) else (value,)
        for k, entry in enumerate(entries):
            changed: Any = entry.clone()
            changed[-1] += 1
            changed = tuple(changed if j == k else e for j, e in enumerate(entries)) if len(entries) > 1 else changed
            got = model(**given | {key: changed})
            assert not torch.allclose(got[1], want[1], atol=1e-5), key
            assert_close(got[0], want[0], ROUNDING, f"{key} of one picture reached another")


def test_every_parameter_counts() -> None:
    """A module that forward forgets has no gradient."""
    parts: list[tuple[nn.Module, tuple[Any, ...]]] = []
    for config in UNETS.values():
        model = unet(config).requires_grad_(True)
        given = inputs(config)
        parts.append((model, (model(**given),)))
    vae = VAE(tiny.SD.vae)  # type: ignore[arg-type]
    tiny.redraw(vae)
    gaussian = vae.encode(random(1, 3, 16, 16))
    parts.append((vae, (gaussian.logvar, vae.decode(gaussian.mean))))
    clip = CLIPText(replace(CLIP, projection=5))
    tiny.redraw(clip)
    parts.append((clip, tuple(clip(torch.tensor([[3, 1, 9, 9]])))))
    for model, outs in parts:
        # Plain means would hide what a norm takes out again.
        sum((o * random(*o.shape, seed=5)).sum() for o in outs).backward()  # type: ignore[union-attr]
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            if not name.endswith("attn.k.bias") and "attn.k.bias" not in name:  # a shift of all keys cancels out
                assert p.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["sd", "three levels", "ddpm"])
def test_residuals_are_added_to_every_skip_and_the_middle(name: str) -> None:
    """Residuals of a ControlNet, in the order of the way down."""
    config, model = UNETS[name], unet(UNETS[name])
    given = inputs(config)
    want = model(**given)
    shapes: list[torch.Size] = []
    handles = [
        m.register_forward_pre_hook(lambda _, args: shapes.extend(s.shape for s in args[3])) for m in model.up[:1]
    ]
    middle: list[torch.Size] = []
    handles.append(model.mid.register_forward_hook(lambda _, args, out: middle.append(out.shape)))
    model(**given)
    for handle in handles:
        handle.remove()
    expected = len(config.levels) * (config.layers + 1)
    assert len(shapes) == expected
    zeros = [torch.zeros(s) for s in shapes]
    zero = torch.zeros(middle[0])
    assert_close(model(**given, residuals=(zeros, zero)), want)
    assert_close(model(**given, residuals=(iter(zeros), zero)), want)
    for k in range(expected):
        changed = [z + (j == k) for j, z in enumerate(zeros)]
        assert not torch.equal(model(**given, residuals=(changed, zero)), want), f"residual {k} is ignored"
    assert not torch.equal(model(**given, residuals=(zeros, zero + 1)), want)
    for wrong in (zeros[:-1], [*zeros, zero], []):
        with pytest.raises(ValueError, match="zip"):
            model(**given, residuals=(wrong, zero))


def test_residuals_are_added_where_the_diagram_says() -> None:
    """Added by hand, through hooks on the way up, they give the same bits."""
    model, given = unet(), inputs(tiny.UNET)
    residuals = [random(2, 16, 8, 8, seed=s) for s in (1, 2)] + [random(2, n, 4, 4, seed=n) for n in (16, 24)]
    middle = random(2, 24, 4, 4, seed=9)
    want = model(**given, residuals=(residuals, middle))

    def add(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, temb, context, skips = args
        skips[:] = [s + r for s, r in zip(skips, residuals, strict=True)]
        return x + middle, temb, context, skips

    handle = model.up[0].register_forward_pre_hook(add)
    assert_close(model(**given), want)
    handle.remove()


def test_parameters_are_named_as_the_model_is_drawn() -> None:
    names = unet().state_dict().keys()
    for name in (
        "conv_in.weight",
        "time.linear1.weight",
        "down.0.res.0.conv2.weight",
        "down.0.attn.0.blocks.0.attn2.k.weight",
        "down.0.down.conv.weight",
        "mid.res1.time.bias",
        "up.1.res.1.skip.weight",
        "up.0.up.conv.bias",
        "norm_out.weight",
    ):
        assert name in names


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_state_dicts_hold_parameters_only(config: c.UNetConfig) -> None:
    model = UNet(config)
    assert list(model.buffers()) == []
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


# --- attention -------------------------------------------------------------------------------------------------------


def written_out(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_formula(causal: bool) -> None:
    q, k, v = (random(2, 3, 6, 4, seed=s) for s in range(3))
    assert_close(attention_module.attention(q, k, v, causal), written_out(q, k, v, causal), ROUNDING)


def test_the_kernel_of_every_attention_can_be_replaced() -> None:
    given = inputs(THREE)
    for model, call in (
        (unet(THREE), lambda m: m(**given)),
        (VAE(tiny.SD.vae).eval(), lambda m: m(random(1, 3, 16, 16))),  # type: ignore[arg-type]
        (CLIPText(CLIP).eval(), lambda m: m(torch.tensor([[3, 1, 9, 9]])).last),
    ):
        kernels = [m for m in model.modules() if isinstance(m, Attention)]
        assert kernels
        with torch.no_grad():
            want = call(model)
            calls: list[int] = []

            def equal(q: Tensor, k: Tensor, v: Tensor, causal: bool, calls: list[int] = calls) -> Tensor:
                calls.append(1)
                return attention_module.attention(q, k, v, causal)

            for m in kernels:
                m.kernel = equal
            assert_close(call(model), want)
            assert len(calls) % len(kernels) == 0
            assert calls  # every one of them went through it
            for m in kernels:
                m.kernel = written_out
            assert_close(call(model), want, ROUNDING)
            for m in kernels:
                m.kernel = lambda q, k, v, causal: torch.zeros_like(q)
            assert not torch.equal(call(model), want)
        assert not any("kernel" in name for name in model.state_dict())


def test_models_can_be_copied() -> None:
    model = unet()
    given = inputs(tiny.UNET)
    assert_close(copy.deepcopy(model)(**given), model(**given))


# --- the time --------------------------------------------------------------------------------------------------------


def test_sinusoid() -> None:
    t = torch.tensor([0.0, 1.0, 500.0])
    sd, ddpm = sinusoid(t, 8), sinusoid(t, 8, sin_first=True, freq_shift=1)
    assert sd.shape == ddpm.shape == (3, 8)
    assert_close(sd[0], torch.tensor([1.0] * 4 + [0.0] * 4))  # cosines first
    assert_close(ddpm[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    for k in range(4):
        angle = 500 * 10000 ** -(k / 4)
        assert_close(
            sd[2, [k, 4 + k]], torch.tensor([angle, angle - torch.pi / 2]).cos(), Tolerance(1e-4, 0, "float32")
        )
        angle = 500 * 10000 ** -(k / 3)  # one frequency short: the last one is exactly 1/10000
        assert_close(
            ddpm[2, [4 + k, k]], torch.tensor([angle, angle - torch.pi / 2]).cos(), Tolerance(1e-4, 0, "float32")
        )
    assert sinusoid(torch.tensor([3]), 8).dtype == torch.float32


# --- VAE -------------------------------------------------------------------------------------------------------------


def test_sampling_the_latents() -> None:
    mean, logvar = random(2, 4, 3, 3), random(2, 4, 3, 3, seed=1)
    gaussian = DiagonalGaussian(mean, logvar)
    g = torch.Generator().manual_seed(7)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    want = mean + torch.exp(0.5 * logvar) * noise
    assert_close(gaussian.sample(g), want)
    assert_close(gaussian.sample(noise=noise), want)
    assert not torch.equal(gaussian.sample(g), want)  # the stream goes on
    torch.manual_seed(7)
    assert_close(gaussian.sample(), want)


def test_logvar_is_clamped() -> None:
    vae = VAE(tiny.SD.vae)  # type: ignore[arg-type]
    with torch.no_grad():
        vae.quant.weight.mul_(1e6)  # type: ignore[operator, union-attr]
        gaussian = vae.encode(random(1, 3, 16, 16))
    assert gaussian.logvar.min() == -30
    assert gaussian.logvar.max() == 20
    assert gaussian.mean.abs().max() > 30


def test_asymmetric_padding_looks_right_and_down() -> None:
    """The VAE's steps down see no column left of the picture: a shift by a whole latent shifts the result."""
    from minidiff.models.blocks import Downsample

    down = Downsample(1, asymmetric=True)
    with torch.no_grad():
        down.conv.weight.fill_(0).view(-1)[0] = 1  # picks the upper left of every window
        down.conv.bias.fill_(0)  # type: ignore[union-attr]
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert_close(down(x), x[..., ::2, ::2])


# --- CLIP ------------------------------------------------------------------------------------------------------------

CLIP = c.CLIPTextConfig(width=16, layers=3, heads=2, mlp=32, vocab=10, positions=6, end_token=9)


def clip(config: c.CLIPTextConfig = CLIP) -> CLIPText:
    model = CLIPText(config).eval().requires_grad_(False)
    tiny.redraw(model)
    return model


def test_clip_outputs() -> None:
    model = clip()
    ids = torch.tensor([[8, 1, 9, 9, 9, 9], [8, 1, 2, 3, 4, 9]])
    out = model(ids)
    assert out.last.shape == out.penultimate.shape == (2, 6, 16)
    assert_close(out.pooled, torch.stack([out.last[0, 2], out.last[1, 5]]))  # the first end token
    assert_close(out.last, model.norm(model.layers[-1](out.penultimate)))
    projected = clip(replace(CLIP, projection=5))
    pooled = projected(ids)
    assert pooled.pooled.shape == (2, 5)
    assert_close(pooled.pooled, projected.projection(torch.stack([pooled.last[0, 2], pooled.last[1, 5]])))


def test_clip_is_causal() -> None:
    model = clip()
    one, other = model(torch.tensor([[8, 1, 2, 3, 4, 9]])), model(torch.tensor([[8, 1, 2, 7, 4, 9]]))
    assert_close(one.last[:, :3], other.last[:, :3], EXACT)
    assert not torch.allclose(one.last[:, 3:], other.last[:, 3:], atol=1e-4)


def test_clip_without_an_end_token_and_shorter_than_its_positions() -> None:
    out = clip()(torch.tensor([[8, 1, 2]]))
    assert_close(out.pooled, out.last[:, 0])


def test_the_two_activations_differ() -> None:
    ids = torch.tensor([[8, 1, 9]])
    gap = (clip()(ids).last - clip(replace(CLIP, activation="gelu"))(ids).last).abs().max()
    assert 1e-4 < gap < 1


def test_clip_with_rows_for_the_kept_ids_alone() -> None:
    """Kept ids have vectors of their own, all others read row 0; nothing else differs from the whole table."""
    small = clip(replace(CLIP, kept=(1, 4, 9)))
    assert small.token.weight.shape == (4, 16)
    whole = clip()
    state = small.state_dict()
    state["token.weight"] = small.token.weight[[0, 1, 0, 0, 2, 0, 0, 0, 0, 3]]
    whole.load_state_dict(state)
    ids = torch.tensor([[8, 1, 2, 4, 9, 9], [1, 1, 4, 0, 9, 9]])
    for here, there in zip(small(ids), whole(ids), strict=True):
        assert_close(here, there, EXACT)
    assert "token.row_of" not in state
    fresh = CLIPText(replace(CLIP, kept=(1, 4, 9)))
    assert not fresh.token.weight[0].any()
    assert fresh.token.weight[1:].all()


@pytest.mark.parametrize("kept", [(3, 1), (1, 1), (-1, 2), (4, 10)])
def test_clip_refuses_kept_ids_that_are_no_ascending_ids(kept: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="ascending"):
        replace(CLIP, kept=kept)
