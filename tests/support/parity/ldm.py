"""The original Stable Diffusion 1 layout, written down from its own definition, independent of ``weights_convert``.

It follows the constructors of CompVis' latent-diffusion: ``UNetModel`` (openaimodel.py: input_blocks, middle_block and
output_blocks are flat lists, numbered in the order of construction), ``Encoder`` and ``Decoder`` (model.py) and the
text encoder of ``FrozenCLIPEmbedder``. Beside each name stands what diffusers calls the same tensor, so that a model
written by diffusers can be laid out as an original single file, which diffusers' own ``from_single_file`` then judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

Pair = tuple[str, str]  # original name, diffusers name; both without ".weight" or ".bias"

RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _res(old: str, new: str) -> Iterator[Pair]:
    return ((f"{old}.{a}", f"{new}.{b}") for a, b in RES.items())


def unet_pairs(levels: int = 4, attention: Sequence[bool] = (True, True, True, False), blocks: int = 2) -> list[Pair]:
    """Every submodule of ``UNetModel``; a transformer has the same inner names in both layouts, so only its root."""
    pairs: list[Pair] = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
    ]
    n = 1
    for level in range(levels):
        for i in range(blocks):
            pairs += _res(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}")
            if attention[level]:
                pairs.append((f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{i}"))
            n += 1
        if level < levels - 1:
            pairs.append((f"input_blocks.{n}.0.op", f"down_blocks.{level}.downsamplers.0.conv"))
            n += 1
    pairs += _res("middle_block.0", "mid_block.resnets.0")
    pairs.append(("middle_block.1", "mid_block.attentions.0"))
    pairs += _res("middle_block.2", "mid_block.resnets.1")
    n = 0
    for up, level in enumerate(reversed(range(levels))):
        for i in range(blocks + 1):
            pairs += _res(f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{i}")
            place = 1
            if attention[level]:
                pairs.append((f"output_blocks.{n}.1", f"up_blocks.{up}.attentions.{i}"))
                place = 2
            if level > 0 and i == blocks:
                pairs.append((f"output_blocks.{n}.{place}.conv", f"up_blocks.{up}.upsamplers.0.conv"))
            n += 1
    return [*pairs, ("out.0", "conv_norm_out"), ("out.2", "conv_out")]


def vae_pairs(levels: int = 4, blocks: int = 2) -> list[Pair]:
    """Every submodule of ``AutoencoderKL``; the original numbers the decoder's levels from the finest."""
    pairs: list[Pair] = []
    names = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
    for side in ("encoder", "decoder"):
        pairs.append((f"{side}.conv_in", f"{side}.conv_in"))
        for level in range(levels):
            new = f"encoder.down_blocks.{level}" if side == "encoder" else f"decoder.up_blocks.{levels - 1 - level}"
            old = f"encoder.down.{level}" if side == "encoder" else f"decoder.up.{level}"
            for i in range(blocks if side == "encoder" else blocks + 1):
                pairs += [(f"{old}.block.{i}.{a}", f"{new}.resnets.{i}.{b}") for a, b in names.items()]
            pairs.append(
                (f"{old}.downsample.conv", f"{new}.downsamplers.0.conv")
                if side == "encoder"
                else (f"{old}.upsample.conv", f"{new}.upsamplers.0.conv")
            )
        for old_block, new_block in (("block_1", "resnets.0"), ("block_2", "resnets.1")):
            pairs += [(f"{side}.mid.{old_block}.{a}", f"{side}.mid_block.{new_block}.{b}") for a, b in names.items()]
        heads = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        pairs += [(f"{side}.mid.attn_1.{a}", f"{side}.mid_block.attentions.0.{b}") for a, b in heads.items()]
        pairs += [(f"{side}.norm_out", f"{side}.conv_norm_out"), (f"{side}.conv_out", f"{side}.conv_out")]
    return [*pairs, ("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]


def _rename(state: Mapping[str, Tensor], pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """``state`` under its original names; fails if a tensor has none."""
    left = dict(state)
    out = {}
    for old, new in pairs:
        for key in [k for k in left if k.startswith(new + ".")]:
            out[old + key[len(new) :]] = left.pop(key)
    assert not left, f"no original name for {sorted(left)[:3]}"
    return out


def original_sd1(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor], *, levels: int = 4
) -> dict[str, Tensor]:
    """The whole of a CompVis checkpoint's ``state_dict`` from the three state dicts of diffusers and transformers."""
    attention = [any(k.startswith(f"down_blocks.{i}.attentions.") for k in unet) for i in range(levels)]
    out = {f"model.diffusion_model.{k}": t for k, t in _rename(unet, unet_pairs(levels, attention)).items()}
    for key, t in _rename(vae, vae_pairs(1 + max(int(k.split(".")[2]) for k in vae if ".down_blocks." in k))).items():
        square = ".attn_1." in key and t.ndim == 2  # the original's attention is made of 1x1 convolutions
        out[f"first_stage_model.{key}"] = t[:, :, None, None] if square else t
    for key, t in text.items():
        inner = key if key.startswith("text_model.") else f"text_model.{key}"
        out[f"cond_stage_model.transformer.{inner}"] = t
    positions = next(len(t) for k, t in text.items() if k.endswith("position_embedding.weight"))
    out["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    out |= {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}
    return {k: t.clone().contiguous() for k, t in out.items()}
