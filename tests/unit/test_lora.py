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

from minidiff import lora
from minidiff.config import ModelConfig
from minidiff.errors import CheckpointError, ConfigError, MinidiffError, UnsupportedError
from minidiff.lora import Adapter, Update
from minidiff.pipeline import StableDiffusion
from tests.tolerances import EXACT, Tolerance, assert_close
from tests.unit import tiny
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
]


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return tiny.tiny_sd()


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
    ],
    ids=str,
)
def test_alpha_from_pefts_settings(sd: StableDiffusion, tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    adapter = read_lora(write(tmp_path / "a.safetensors", keys(PEFT, *drawn(sd, Q, 4)), metadata), sd.config)
    assert adapter.updates[Q].factor(1.0) == scale


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
        "ranks": (keys(PEFT, down[:1], up), CheckpointError, "no product of two matrices"),
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
    with pytest.raises(ConfigError, match="finite"):
        lora.apply(sd.parts, [(Adapter("a", {Q: good}), float("nan"))])
    norm = {"unet.norm_out": Update(torch.ones(1, 16), torch.ones(16, 1))}
    with pytest.raises(CheckpointError, match="no layer that an adapter can bend"):
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
