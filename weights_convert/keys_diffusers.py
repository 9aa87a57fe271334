"""Key maps of the UNets, the autoencoder and the text encoder of diffusers and transformers.

Each function walks one of minidiff's configs in the order in which the model is built, and pairs names with those of
``UNet2DConditionModel`` and ``UNet2DModel``, ``ControlNetModel``, ``AutoencoderKL`` (with the names of its attention
before and since early 2023) and ``CLIPTextModel``.
"""

from __future__ import annotations

from collections.abc import Iterator

from minidiff.config import CLIPTextConfig, ControlNetConfig, Level, UNetConfig, VAEConfig
from minidiff.models.unet import skip_widths
from weights_convert.engine import CONV1X1, Drop, Module, join

RES = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("time_emb_proj", "time"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "skip"),
)
TRANSFORMER = (("norm", "norm"), ("proj_in", "proj_in"), ("proj_out", "proj_out"))
BLOCK = (
    *((f"norm{i}", f"norm{i}") for i in (1, 2, 3)),
    *((f"attn{i}.to_{x}", f"attn{i}.{x}") for i in (1, 2) for x in "qkv"),
    *((f"attn{i}.to_out.0", f"attn{i}.out") for i in (1, 2)),
    ("ff.net.0.proj", "ff.gate"),
    ("ff.net.2", "ff.out"),
)
# Attention without text, by its names since early 2023 and before.
SELF = (
    ("group_norm", "norm"),
    ("to_q", "attn.q"),
    ("to_k", "attn.k"),
    ("to_v", "attn.v"),
    ("to_out.0", "attn.out"),
)
SELF_OLD = (
    ("group_norm", "norm"),
    ("query", "attn.q"),
    ("key", "attn.k"),
    ("value", "attn.v"),
    ("proj_attn", "attn.out"),
)
EMBEDDING = (("linear_1", "linear1"), ("linear_2", "linear2"), ("cond_proj", "condition"))
LAYER = (
    ("layer_norm1", "norm1"),
    *((f"self_attn.{x}_proj", f"attn.{x}") for x in ("q", "k", "v", "out")),
    ("layer_norm2", "norm2"),
    ("mlp.fc1", "fc1"),
    ("mlp.fc2", "fc2"),
)

CLIP_DROPS = (
    Drop("position ids", r"(.*\.)?position_ids", "0, 1, 2, ...: a constant that old versions of transformers stored"),
    Drop("contrastive scale", r"(.*\.)?logit_scale", "used only in training CLIP against pictures"),
    Drop(
        "unused projection", r"(.*\.)?text_projection(\.weight)?", "this text encoder's pooled output is not projected"
    ),
)


def unet(config: UNetConfig, *, old_names: bool = False) -> Iterator[Module]:
    """UNet2DConditionModel and UNet2DModel; ``old_names``: names of the self-attention before 2023."""
    yield from _way_down(config, old_names)
    last = len(config.levels) - 1
    for i, level in enumerate(reversed(config.levels)):
        for j in range(config.layers + 1):
            yield from join(f"up_blocks.{i}.resnets.{j}", RES, f"up.{i}.res.{j}")
            depth = config.up_depths(level)[j]
            yield from _attention(f"up_blocks.{i}.attentions.{j}", level, depth, f"up.{i}.attn.{j}", old_names)
        if i < last:
            yield Module(f"up_blocks.{i}.upsamplers.0.conv", f"up.{i}.up.conv")
    yield Module("conv_norm_out", "norm_out")
    yield Module("conv_out", "conv_out")


def controlnet(config: ControlNetConfig) -> Iterator[Module]:
    """ControlNetModel."""
    yield from _way_down(config, old_names=False)
    yield Module("controlnet_cond_embedding.conv_in", "hint.conv_in")
    for i in range(2 * (len(config.hint_widths) - 1)):
        yield Module(f"controlnet_cond_embedding.blocks.{i}", f"hint.convs.{i}")
    yield Module("controlnet_cond_embedding.conv_out", "hint.conv_out")
    for i in range(len(skip_widths(config))):
        yield Module(f"controlnet_down_blocks.{i}", f"zero.{i}")
    yield Module("controlnet_mid_block", "zero_mid")


def _way_down(config: UNetConfig, old_names: bool) -> Iterator[Module]:
    yield from join("time_embedding", EMBEDDING, "time")
    yield from join("add_embedding", EMBEDDING, "added")
    yield Module("conv_in", "conv_in")
    last = len(config.levels) - 1
    for i, level in enumerate(config.levels):
        for j in range(config.layers):
            yield from join(f"down_blocks.{i}.resnets.{j}", RES, f"down.{i}.res.{j}")
            depth = config.down_depths(level)[j]
            yield from _attention(f"down_blocks.{i}.attentions.{j}", level, depth, f"down.{i}.attn.{j}", old_names)
        if i < last:
            yield Module(f"down_blocks.{i}.downsamplers.0.conv", f"down.{i}.down.conv")
    yield from join("mid_block.resnets.0", RES, "mid.res1")
    yield from _attention("mid_block.attentions.0", config.mid, config.mid.depth, "mid.attn.0", old_names)
    yield from join("mid_block.resnets.1", RES, "mid.res2")


def _attention(theirs: str, level: Level, depth: int, ours: str, old_names: bool) -> Iterator[Module]:
    if level.attention == "self":
        yield from join(theirs, SELF_OLD if old_names else SELF, ours)
    if level.attention == "text":
        yield from join(theirs, TRANSFORMER, ours)
        for k in range(depth):
            yield from join(f"{theirs}.transformer_blocks.{k}", BLOCK, f"{ours}.blocks.{k}")


def vae(config: VAEConfig, *, old_names: bool = False, conv_attention: bool = False) -> Iterator[Module]:
    """AutoencoderKL; ``conv_attention``: the attention's matrices are kept as 1x1 convolutions."""
    last = len(config.channels) - 1
    yield Module("encoder.conv_in", "encoder.conv_in")
    for i in range(last + 1):
        for j in range(config.layers):
            yield from join(f"encoder.down_blocks.{i}.resnets.{j}", RES, f"encoder.down.{i}.res.{j}")
        if i < last:
            yield Module(f"encoder.down_blocks.{i}.downsamplers.0.conv", f"encoder.down.{i}.down.conv")
    yield from _vae_mid("encoder", old_names, conv_attention)
    yield Module("decoder.conv_in", "decoder.conv_in")
    yield from _vae_mid("decoder", old_names, conv_attention)
    for i in range(last + 1):
        for j in range(config.layers + 1):
            yield from join(f"decoder.up_blocks.{i}.resnets.{j}", RES, f"decoder.up.{i}.res.{j}")
        if i < last:
            yield Module(f"decoder.up_blocks.{i}.upsamplers.0.conv", f"decoder.up.{i}.up.conv")
    for half in ("encoder", "decoder"):
        yield Module(f"{half}.conv_norm_out", f"{half}.norm_out")
        yield Module(f"{half}.conv_out", f"{half}.conv_out")
    yield Module("quant_conv", "quant")
    yield Module("post_quant_conv", "post_quant")


def _vae_mid(half: str, old_names: bool, conv: bool) -> Iterator[Module]:
    theirs, ours = f"{half}.mid_block", f"{half}.mid"
    yield from join(f"{theirs}.resnets.0", RES, f"{ours}.res1")
    for module in join(f"{theirs}.attentions.0", SELF_OLD if old_names else SELF, f"{ours}.attn"):
        yield module._replace(form=CONV1X1) if conv else module
    yield from join(f"{theirs}.resnets.1", RES, f"{ours}.res2")


def clip(config: CLIPTextConfig, *, prefix: str = "text_model.") -> Iterator[Module]:
    """CLIPTextModel and CLIPTextModelWithProjection; ``prefix`` is "" in files of transformers 5.6 and later."""
    yield Module(f"{prefix}embeddings.token_embedding", "token")
    yield Module(f"{prefix}embeddings.position_embedding", "position")
    for i in range(config.layers):
        yield from join(f"{prefix}encoder.layers.{i}", LAYER, f"layers.{i}")
    yield Module(f"{prefix}final_layer_norm", "norm")
    yield Module("text_projection", "projection")
