"""Adapters: every dialect finds its layer, the sum is what the paper says, and the model comes back bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.adapters import lora
from minidiff.adapters.lora import Adapter, Update
from minidiff.config import ModelConfig
from minidiff.errors import CheckpointError, ConfigError, MinidiffError, UnsupportedError
from minidiff.pipeline import StableDiffusion
from tests.support import tiny
from tests.tolerances import EXACT, Tolerance, assert_close
from weights_convert import read_lora

SPLIT = Tolerance(1e-5, 1e-5, "(W + u d) x against W x + u (d x): the same sum in another order")
QUIET: dict[str, Any] = {"steps": 2, "seed": 0, "progress": False, "output": "latent"}

Q = "unet.down.0.attn.0.blocks.0.attn1.q"
OUT = "unet.mid.attn.0.blocks.0.attn2.out"
TEXT = "text_encoder.layers.1.attn.v"
CONV = "unet.down.0.res.0.conv1"
PROJ = "unet.up.1.attn.1.proj_in"

# One layer in every spelling that files are seen to use; written down from such files' keys.
SPELLINGS = [
    ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_{}.weight", Q),
    ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_{}.weight", Q),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{AB}.weight", Q),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.{}.weight", Q),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight", Q),
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{}.weight", Q),
    ("base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{AB}.weight", Q),
    ("base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{AB}.default.weight", Q),
    ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_{}.weight", OUT),
    ("lora_unet_middle_block_1_transformer_blocks_0_attn2_to_out_0.lora_{}.weight", OUT),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora.{}.weight", OUT),
    ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_{AB}.weight", OUT),
    ("lora_te_text_model_encoder_layers_1_self_attn_v_proj.lora_{}.weight", TEXT),
    ("lora_te1_text_model_encoder_layers_1_self_attn_v_proj.lora_{}.weight", TEXT),
    ("text_encoder.text_model.encoder.layers.1.self_attn.v_proj.lora_{AB}.weight", TEXT),
    ("text_encoder.encoder.layers.1.self_attn.v_proj.lora_{AB}.weight", TEXT),
    ("text_encoder.text_model.encoder.layers.1.self_attn.v_proj.lora_linear_layer.{}.weight", TEXT),
    ("base_model.model.text_model.encoder.layers.1.self_attn.v_proj.lora_{AB}.weight", TEXT),
    ("lora_unet_down_blocks_0_resnets_0_conv1.lora_{}.weight", CONV),
    ("lora_unet_input_blocks_1_0_in_layers_2.lora_{}.weight", CONV),
    ("unet.down_blocks.0.resnets.0.conv1.lora_{AB}.weight", CONV),
    ("lora_unet_up_blocks_1_attentions_1_proj_in.lora_{}.weight", PROJ),
    ("lora_unet_output_blocks_3_1_proj_in.lora_{}.weight", PROJ),
    ("unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_{}.weight", Q),
    ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_{}.weight", Q),
    ("model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_out.0.lora_{}.weight", OUT),
    ("unet.base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_{AB}.default.weight", OUT),
    ("unet._orig_mod.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{AB}.weight", Q),
    ("lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_{}.weight", Q),
    ("clip_l.text_model.encoder.layers.1.self_attn.v_proj.lora_{}.weight", TEXT),
    ("text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.v_proj.lora_{}.weight", TEXT),
    ("text_encoder.text_model.encoder.layers.1.self_attn.to_v_lora.{}.weight", TEXT),
    ("text_encoder.text_model.encoder.layers.1.self_attn.processor.to_v_lora.{}.weight", TEXT),
    ("text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.{}.weight", "text_encoder.layers.1.attn.out"),
    ("text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_linear_layer.{}.weight", "text_encoder.layers.1.fc1"),
]


def drawn(sd: StableDiffusion, layer: str, rank: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The halves of an update for ``layer``, large enough to be seen."""
    g = torch.Generator().manual_seed(seed)
    weight = lora.find(sd.parts, layer).get_parameter("weight")
    down = torch.randn(rank, *weight.shape[1:], generator=g) * 0.3
    return down, torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=g) * 0.3


def keys(spelling: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """An update under the keys of one dialect."""
    first, second = ("{AB}", ("A", "B")) if "{AB}" in spelling else ("{}", ("down", "up"))
    return {spelling.replace(first, second[0]): down, spelling.replace(first, second[1]): up}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(
        {k: t.clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}, path, metadata
    )
    return path


def weights(sd: StableDiffusion) -> dict[str, Tensor]:
    return {f"{n}.{k}": t.clone() for n, part in sd.parts.items() for k, t in part.state_dict().items()}


@pytest.mark.parametrize(("spelling", "layer"), SPELLINGS, ids=[s for s, _ in SPELLINGS])
def test_every_dialect_finds_its_layer(sd: StableDiffusion, tmp_path: Path, spelling: str, layer: str) -> None:
    down, up = drawn(sd, layer)
    adapter = read_lora(write(tmp_path / "a.safetensors", keys(spelling, down, up)), sd.config)
    assert list(adapter.updates) == [layer]
    assert_close(adapter.updates[layer].down, down, EXACT)
    assert_close(adapter.updates[layer].up, up, EXACT)
    assert adapter.updates[layer].factor(1.0) == 1
    assert str(adapter) == "a.safetensors: 1 of 1 modules"


@pytest.mark.parametrize("layer", [Q, TEXT, PROJ, CONV])
def test_the_sum_is_that_of_the_paper(sd: StableDiffusion, layer: str) -> None:
    """W + strength * alpha / rank * up down, and live the same output; then everything is as it was."""
    down, up = drawn(sd, layer)
    adapter = Adapter("a", {layer: Update(down, up, 1.5)})
    module, before = lora.find(sd.parts, layer), weights(sd)
    weight: Any = module.weight
    x = torch.randn(2, weight.shape[1], *([5, 7] if weight.ndim == 4 else []))
    with torch.no_grad():
        plain = module(x)
        live = lora.apply(sd.parts, [(adapter, 0.8)], live=True)
        lived = module(x)
        live.remove()
        fused = lora.apply(sd.parts, [(adapter, 0.8)])
        product = torch.einsum("or,r...->o...", up.flatten(1), down).reshape(weight.shape)
        assert_close(module.weight, weight + 0.4 * product, SPLIT)
        assert_close(module(x), lived, SPLIT)
        assert not torch.allclose(lived, plain, atol=1e-2)
        fused.remove()
        fused.remove()
        assert_close(module(x), plain, EXACT)
    assert module.weight is weight
    assert all(torch.equal(t, before[name]) for name, t in weights(sd).items())


def test_an_odd_kernel_keeps_stride_and_padding() -> None:
    layer = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)
    update = Update(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1))
    parts, x = {"unet": torch.nn.ModuleDict({"down": layer})}, torch.randn(1, 4, 9, 8)
    delta = torch.einsum("or,rikl->oikl", update.up[:, :, 0, 0], update.down)
    wanted = layer(x) + F.conv2d(x, delta, None, 2, 1)
    lora.apply(parts, [(Adapter("a", {"unet.down": update}), 1.0)], live=True)
    assert_close(layer(x), wanted, SPLIT)


def test_the_hash_of_an_adapter_knows_every_value(sd: StableDiffusion) -> None:
    down, up = drawn(sd, Q)
    updates = [Update(down, up), Update(down + 1, up), Update(down, up + 1), Update(down, up, alpha=2.0)]
    hashes = {Adapter("a", {Q: update}).hash for update in updates}
    assert len(hashes) == 4
    assert {len(told) for told in hashes} == {16}


def test_several_add_up_and_a_picture_changes_and_comes_back(sd: StableDiffusion) -> None:
    one = Adapter("one", {Q: Update(*drawn(sd, Q, seed=1)), TEXT: Update(*drawn(sd, TEXT, seed=2))})
    two = Adapter("two", {Q: Update(*drawn(sd, Q, 2, seed=3)), CONV: Update(*drawn(sd, CONV, seed=4))})
    plain = sd.generate("a cat", **QUIET)
    results = []
    for live in (False, True):
        applied = lora.apply(sd.parts, [(one, 0.7), (two, -0.3)], live=live)
        results.append(sd.generate("a cat", **QUIET))
        applied.remove()
        assert_close(sd.generate("a cat", **QUIET), plain, EXACT)
    assert not torch.allclose(results[0], plain, atol=1e-3)
    assert_close(results[0], results[1], Tolerance(1e-3, 1e-3, "the same sums in another order, through two steps"))
    inner = lora.apply(sd.parts, [(one, 1.0)])
    outer = lora.apply(sd.parts, [(two, 1.0)])
    outer.remove()
    inner.remove()
    assert_close(sd.generate("a cat", **QUIET), plain, EXACT)


def test_alpha_and_rank_of_each_module(sd: StableDiffusion, tmp_path: Path) -> None:
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    text = "lora_te_text_model_encoder_layers_1_self_attn_v_proj"
    tensors = keys(kohya + ".lora_{}.weight", *drawn(sd, Q, 4)) | {kohya + ".alpha": torch.tensor(1.0)}
    tensors |= keys(text + ".lora_{}.weight", *drawn(sd, TEXT, 2)) | {text + ".alpha": torch.tensor([8.0])}
    adapter = read_lora(write(tmp_path / "a.safetensors", tensors), sd.config)
    assert {name: u.factor(1.0) for name, u in adapter.updates.items()} == {Q: 0.25, TEXT: 4.0}


PEFT = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{AB}.weight"


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0),
        ({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 1}, 2.0),
        ({"text_encoder.lora_alpha": 1}, 1.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2, "attn1.to_k": 32}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.r": 4}, 2.0),  # peft's default is 8
        ({"r": 9, "lora_alpha": 8, "rank_pattern": {"^down_blocks.*.to_q$": 4}}, 2.0),
        ({"lora_alpha": 8, "alpha_pattern": {"^attn1.to_q": 1, "mid.*": 1, "o_q": 1, "to_q$|x": 6.0}}, 1.5),
        ({"lora_alpha": 8, "init_lora_weights": "gaussian", "target_modules": ["to_k", "to_q"], "bias": "none"}, 2.0),
        ({"lora_alpha": 8, "target_modules": "(a+)+b", "a_new_one": None, "lora_dropout": 0.1}, 2.0),
    ],
    ids=str,
)
def test_alpha_from_pefts_settings(sd: StableDiffusion, tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    adapter = read_lora(write(tmp_path / "a.safetensors", keys(PEFT, *drawn(sd, Q, 4)), metadata), sd.config)
    assert adapter.updates[Q].factor(1.0) == scale


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"alpha_pattern": {"(a+)+b": 2}}, UnsupportedError, "alpha_pattern: '\\(a\\+\\)\\+b' is an expression"),
        ({"rank_pattern": {"to_[qk]": 2}}, UnsupportedError, "rank_pattern: .* is an expression"),
        ({"alpha_pattern": {"a" * 2000: 2}}, UnsupportedError, "2000 characters"),
        ({"alpha_pattern": {"to_q": "8"}}, CheckpointError, "alpha_pattern.'to_q'.='8'; it must be a finite number"),
        ({"alpha_pattern": [1]}, CheckpointError, "alpha_pattern=.1.; it must be an object"),
        ({"lora_alpha": None, "r": {"a": 1}}, CheckpointError, "r={'a': 1}; it must be a whole number"),
        ({"lora_alpha": [8]}, CheckpointError, "lora_alpha=.8.; it must be a finite number"),
        ({"lora_alpha": True}, CheckpointError, "lora_alpha=True"),
        ({"lora_alpha": 10**400}, CheckpointError, "lora_alpha=10.*; it must be a finite number"),
        ({"lora_alpha": float("nan")}, CheckpointError, "lora_alpha=nan"),
        ({"use_rslora": "no"}, CheckpointError, "use_rslora='no'; it is true or false"),
        ({"r": 8}, CheckpointError, "says that down_blocks.*to_q has rank 8, and its matrices have 4"),
        ({"target_modules": ["to_k"]}, CheckpointError, "target_modules leaves out down_blocks"),
        ({"target_modules": 7}, CheckpointError, "target_modules=7; it must be a list of names"),
        ({"exclude_modules": ["attn1.to_q"]}, CheckpointError, "exclude_modules names down_blocks"),
        ({"exclude_modules": ".*attn1.to_."}, CheckpointError, "exclude_modules names down_blocks"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, UnsupportedError, "init_lora_weights='olora'"),
        ({"use_dora": True}, UnsupportedError, "use_dora=True"),
        ({"lora_bias": True}, UnsupportedError, "lora_bias=True"),
        ({"bias": "all"}, UnsupportedError, "bias='all'"),
        ({"peft_type": "LOHA"}, UnsupportedError, "peft_type='LOHA'"),
        ({"modules_to_save": ["conv_in"]}, UnsupportedError, "modules_to_save"),
        ({"layers_to_transform": [0]}, UnsupportedError, "layers_to_transform"),
        ({"a_new_one": 3}, UnsupportedError, "has 'a_new_one'=3, a setting that minidiff does not know"),
    ],
    ids=str,
)
def test_settings_that_are_refused(
    sd: StableDiffusion, tmp_path: Path, settings: dict[str, Any], error: type[MinidiffError], words: str
) -> None:
    path = write(
        tmp_path / "a.safetensors", keys(PEFT, *drawn(sd, Q, 4)), {"lora_adapter_metadata": json.dumps(settings)}
    )
    with pytest.raises(error, match=words) as caught:
        read_lora(path, sd.config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_pattern_of_many_stars_takes_no_time(sd: StableDiffusion, tmp_path: Path) -> None:
    """Python's own engine would be busy with it for years."""
    settings = {"lora_alpha": 8, "alpha_pattern": {".*_" * 200 + "x": 1, ".*b.*.*s.*q": 2}}
    path = write(
        tmp_path / "a.safetensors", keys(PEFT, *drawn(sd, Q, 4)), {"lora_adapter_metadata": json.dumps(settings)}
    )
    assert read_lora(path, sd.config).updates[Q].factor(1.0) == 0.5


def test_a_folder_of_diffusers_and_folders_that_hold_none_or_several(sd: StableDiffusion, tmp_path: Path) -> None:
    tensors = keys(PEFT, *drawn(sd, Q, 4))
    with pytest.raises(CheckpointError, match=r"a folder without pytorch_lora_weights\.safetensors"):
        read_lora(tmp_path, sd.config)
    write(tmp_path / "ink.safetensors", tensors)
    assert read_lora(tmp_path, sd.config).name == tmp_path.name
    write(tmp_path / "other.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"a folder of several \('ink.safetensors', 'other.safetensors'\)"):
        read_lora(tmp_path, sd.config)
    torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
    assert list(read_lora(tmp_path, sd.config).updates) == [Q]
    write(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    assert list(read_lora(tmp_path, sd.config).updates) == [Q]
    write(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(CheckpointError, match="a folder of several"):
        read_lora(tmp_path, sd.config)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": 4}))
    assert read_lora(tmp_path / "adapter_model.safetensors", sd.config).updates[Q].factor(1.0) == 3
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_lora(tmp_path / "adapter_model.safetensors", sd.config)


def test_what_a_file_holds_is_told_by_its_content(sd: StableDiffusion, tmp_path: Path) -> None:
    tensors = keys(PEFT, *drawn(sd, Q))
    write(tmp_path / "a.pt", tensors)
    torch.save(tensors, tmp_path / "pickle.safetensors")
    torch.save(tensors, tmp_path / "no suffix")
    for name in ("a.pt", "pickle.safetensors", "no suffix"):
        assert list(read_lora(tmp_path / name, sd.config).updates) == [Q]
    for name, data, words in (
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer"),
        ("b.safetensors", b"<!DOCTYPE html><html></html>", "is a web page"),
        ("c.pt", b"", "is empty"),
        ("d.bin", bytes(range(255, 0, -1)), "neither a safetensors file nor a pickle"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=words):
            read_lora(tmp_path / name, sd.config)


@pytest.mark.parametrize(
    ("alpha", "factor"),
    [
        (torch.tensor(0.0), 0.0),
        (torch.tensor(-2.0), -0.5),
        (torch.tensor([[4.0]], dtype=torch.float16), 1.0),
        (torch.tensor(4), 1.0),
        (torch.tensor(float("nan")), None),
        (torch.tensor(float("-inf")), None),
        (torch.tensor(1e300, dtype=torch.float64), None),
        (torch.zeros(0), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("end", [".alpha", ".lora.alpha", "_lora.alpha"])
def test_odd_alphas(sd: StableDiffusion, tmp_path: Path, alpha: Tensor, factor: float | None, end: str) -> None:
    tensors = keys(PEFT, *drawn(sd, Q, 4)) | {PEFT.replace(".lora_{AB}.weight", end): alpha}
    path = write(tmp_path / "a.safetensors", tensors)
    if factor is None:
        with pytest.raises(CheckpointError, match=r"alpha of unet\.down\.0\.attn\.0\.blocks\.0\.attn1\.q"):
            read_lora(path, sd.config)
        return
    update = read_lora(path, sd.config).updates[Q]
    assert update.factor(1.0) == factor
    weight = lora.find(sd.parts, Q).get_parameter("weight").detach()
    assert_close(update.delta(weight, 1.0), factor * (update.up @ update.down), SPLIT)


def test_kernels_of_either_half(sd: StableDiffusion, tmp_path: Path) -> None:
    """A kernel in the second half is refused by name; kernels of one pixel may come or be left out."""
    down, up = drawn(sd, CONV)
    spelling = "unet.down_blocks.0.resnets.0.conv1.lora_{AB}.weight"
    path = write(tmp_path / "a.safetensors", keys(spelling, down, up.expand(-1, -1, 3, 3)))
    with pytest.raises(CheckpointError, match=r"unet.down.0.res.0.conv1 .*its up matrix has a kernel of 3x3"):
        read_lora(path, sd.config)
    with pytest.raises(CheckpointError, match="its up matrix has a kernel of 3x3"):
        lora.apply(sd.parts, [(Adapter("a", {CONV: Update(down, up.expand(-1, -1, 3, 3))}), 1.0)])
    for layer in (Q, PROJ, CONV):
        module: Any = lora.find(sd.parts, layer)
        down, up = drawn(sd, layer)
        x = torch.randn(2, module.weight.shape[1], *([5, 7] if module.weight.ndim == 4 else []))
        down = down if layer == CONV else down.flatten(1)
        deltas = []
        for d, u in ((down, up.flatten(1)), (down, up.flatten(1)[..., None, None]), (down[..., None, None], up)):
            if d.ndim in (2, 4):
                update = Update(d, u)
                assert update.problem() is None
                applied = lora.apply(sd.parts, [(Adapter("a", {layer: update}), 0.5)], live=True)
                lived = module(x)
                applied.remove()
                applied = lora.apply(sd.parts, [(Adapter("a", {layer: update}), 0.5)])
                assert_close(module(x), lived, SPLIT)
                applied.remove()
                deltas.append(update.delta(module.weight, 0.5))
        assert all(torch.equal(deltas[0], d) for d in deltas)
    with pytest.raises(CheckpointError, match="do not fit"):  # a kernel of one pixel is not one of nine
        lora.apply(sd.parts, [(Adapter("a", {CONV: Update(torch.ones(2, 16), torch.ones(16, 2))}), 1.0)])


@pytest.mark.parametrize("live", [True, False])
def test_what_exceeds_the_dtype_is_refused_by_the_layers_name(live: bool) -> None:
    sd = tiny.tiny_sd()
    before = weights(sd)
    down, up = drawn(sd, Q)
    for update, strength in (
        (Update(down, up, 3e38), 3e3),
        (Update(down, up, 10**400), 1.0),
        (Update(down.double() * 1e200, up), 1.0),
    ):
        with pytest.raises(CheckpointError, match=r"a: .*unet\.down\.0\.attn\.0\.blocks\.0\.attn1\.q"):
            lora.apply(sd.parts, [(Adapter("a", {TEXT: Update(*drawn(sd, TEXT)), Q: update}), strength)], live=live)
        assert all(torch.equal(t, before[name]) for name, t in weights(sd).items())
    sd.unet.half()
    with pytest.raises(CheckpointError, match=rf"a: {Q}: is not finite in torch.float16"):
        lora.apply(sd.parts, [(Adapter("a", {Q: Update(down * 1e5, up * 1e5)}), 1.0)], live=live)


def test_keys_of_a_layer_that_is_known_are_never_left_out(sd: StableDiffusion, tmp_path: Path) -> None:
    """Whatever else a file does to a layer of this model is refused, also where unmatched layers are let pass."""
    name = PEFT.replace(".lora_{AB}.weight", "")
    for end, words in (
        ("scalar", f"changes {Q} by its 'scalar'"),
        ("base_layer.weight", f"changes {Q} by its 'base_layer.weight'"),
        ("lora_B.bias", "LoRA with a bias"),
        ("lora_mid.weight", "LoCon in Tucker form"),
    ):
        path = write(tmp_path / "a.safetensors", keys(PEFT, *drawn(sd, Q)) | {f"{name}.{end}": torch.ones(2)})
        with pytest.raises(UnsupportedError, match=words):
            read_lora(path, sd.config, allow_unmatched=True)


def test_a_folder_that_peft_wrote(sd: StableDiffusion, tmp_path: Path) -> None:
    spelling = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{AB}.weight"
    write(tmp_path / "adapter_model.safetensors", keys(spelling, *drawn(sd, Q, 4)))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "r": 4}))
    assert read_lora(tmp_path, sd.config).updates[Q].factor(1.0) == 3


def test_a_pickle(sd: StableDiffusion, tmp_path: Path) -> None:
    torch.save(keys(PEFT, *drawn(sd, Q)), tmp_path / "a.bin")
    assert list(read_lora(tmp_path / "a.bin", sd.config).updates) == [Q]


def test_a_key_of_no_layer_is_an_error_unless_allowed(sd: StableDiffusion, tmp_path: Path) -> None:
    strange = {"lora_unet_down_blocks_7_attentions_0_proj_in.lora_down.weight": torch.ones(2, 2)}
    strange |= {"lora_unet_down_blocks_7_attentions_0_proj_in.lora_up.weight": torch.ones(2, 2)}
    path = write(tmp_path / "a.safetensors", keys(PEFT, *drawn(sd, Q)) | strange)
    with pytest.raises(CheckpointError, match=r"down_blocks_7.* and 1 more belong to no layer.*--allow-unmatched"):
        read_lora(path, sd.config)
    adapter = read_lora(path, sd.config, allow_unmatched=True)
    assert str(adapter).startswith("a.safetensors: 1 of 2 modules; 2 keys were left out, 'lora_unet_down_blocks_7")
    nothing = read_lora(write(tmp_path / "b.safetensors", strange), sd.config, allow_unmatched=True)
    with pytest.raises(CheckpointError, match="no update for any layer"):
        lora.apply(sd.parts, [(nothing, 1.0)])


def bad_files(sd: StableDiffusion) -> dict[str, tuple[dict[str, Tensor], type[MinidiffError], str]]:
    down, up = drawn(sd, Q)
    name = PEFT.replace(".lora_{AB}.weight", "")
    lokr = {f"{name}.lokr_w1": torch.ones(2, 2)}
    dora = keys(PEFT, down, up) | {f"{name}.dora_scale": torch.ones(2)}
    return {
        "half": ({PEFT.replace("{AB}", "A"): down}, CheckpointError, "no 'up' half"),
        "ranks": (keys(PEFT, down[:1], up), CheckpointError, "not a product of two matrices"),
        "nan": (keys(PEFT, down * torch.nan, up), CheckpointError, "NaN"),
        "whole numbers": (keys(PEFT, down.int(), up.int()), CheckpointError, "int32; it must be floating point"),
        "lokr": (lokr, UnsupportedError, "LoKr"),
        "dora": (dora, UnsupportedError, "DoRA"),
        "alpha": (keys(PEFT, down, up) | {f"{name}.alpha": torch.ones(3)}, CheckpointError, "alpha"),
        "twice": (
            keys(PEFT, down, up) | keys(SPELLINGS[0][0], down, up),
            CheckpointError,
            "mixes two adapters",
        ),
    }


@pytest.mark.parametrize("which", ["half", "ranks", "nan", "whole numbers", "lokr", "dora", "alpha", "twice"])
def test_files_that_cannot_be_used(sd: StableDiffusion, tmp_path: Path, which: str) -> None:
    tensors, error, words = bad_files(sd)[which]
    with pytest.raises(error, match=words) as caught:
        read_lora(write(tmp_path / "a.safetensors", tensors), sd.config)
    assert "\n" not in str(caught.value)


def test_missing_files_and_settings_that_are_no_json(sd: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_lora(tmp_path / "none.safetensors", sd.config)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        read_lora(tmp_path, sd.config)
    path = write(tmp_path / "a.safetensors", keys(PEFT, *drawn(sd, Q)), {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="no JSON"):
        read_lora(path, sd.config)


def test_nothing_is_changed_by_an_adapter_that_does_not_fit(sd: StableDiffusion) -> None:
    before = weights(sd)
    good, wrong = Update(*drawn(sd, Q)), Update(torch.ones(2, 5), torch.ones(6, 2))
    for updates, words in (({Q: good, TEXT: wrong}, "do not fit"), ({Q: good, "unet.no.such": good}, "no layer")):
        with pytest.raises(CheckpointError, match=words):
            lora.apply(sd.parts, [(Adapter("a", updates), 1.0)])
    for strength in (float("nan"), float("inf"), 10**400):
        with pytest.raises(ConfigError, match="finite"):
            lora.apply(sd.parts, [(Adapter("a", {Q: good}), strength)])
    for strength in (lora.LARGEST, -lora.LARGEST):  # which float32 holds
        nothing = Update(*map(torch.zeros_like, drawn(sd, Q)))
        lora.apply(sd.parts, [(Adapter("a", {Q: nothing}), strength)]).remove()
    norm = {"unet.norm_out": Update(torch.ones(1, 16), torch.ones(16, 1))}
    with pytest.raises(CheckpointError, match="not a layer that an adapter can change"):
        lora.apply(sd.parts, [(Adapter("a", norm), 1.0)])
    assert all(torch.equal(t, before[name]) for name, t in weights(sd).items())


def test_the_sdxl_names_of_two_encoders(tmp_path: Path) -> None:
    """The second encoder's prefix begins like the first one's."""
    config = copy.deepcopy(tiny.SD)
    fake: Any = ModelConfig.__new__(ModelConfig)
    fake.__dict__.update(config.__dict__ | {"text_encoder_2": config.text_encoder, "tokenizer_2": config.tokenizer})
    tensors: dict[str, Tensor] = {}
    for prefix in ("lora_te1_", "lora_te2_"):
        spelling = prefix + "text_model_encoder_layers_0_mlp_fc1.lora_{}.weight"
        tensors |= keys(spelling, torch.ones(2, 16), torch.ones(32, 2))
    found = read_lora(write(tmp_path / "a.safetensors", tensors), fake)
    assert sorted(found.updates) == ["text_encoder.layers.0.fc1", "text_encoder_2.layers.0.fc1"]
