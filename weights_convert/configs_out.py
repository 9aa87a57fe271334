"""Translation of minidiff's configs to a component's ``config.json`` of diffusers or transformers.

This is the inverse of ``configs_diffusers.py``, which also checks it: the result is read again, and a model that the
other library's config cannot express (for example with another number of heads in the middle) is refused instead of
being written as a different one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from minidiff.config import (
    Attention,
    CLIPTextConfig,
    ControlNetConfig,
    Level,
    T2IAdapterConfig,
    TAESDConfig,
    UNetConfig,
    VAEConfig,
)
from minidiff.errors import MinidiffError, UnsupportedError
from weights_convert import configs_diffusers as readers
from weights_convert.component import AnyConfig

CONDITIONAL: dict[Attention, str] = {"text": "CrossAttnDownBlock2D", "none": "DownBlock2D", "self": "AttnDownBlock2D"}


def config_json(config: AnyConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a component, with its class in ``_class_name`` (diffusers) or ``architectures``.

    Raises :class:`UnsupportedError` for a model that the reference's class cannot represent.
    """
    if isinstance(config, ControlNetConfig):
        unused = {name: getattr(ControlNetConfig, name) for name in ("out_channels", "sample_size", "sample_width")}
        config = dataclasses.replace(config, **unused)  # what a network without a way up has no use for
        return _checked(config, _controlnet(config), readers.controlnet)
    if isinstance(config, T2IAdapterConfig):
        return _checked(config, _t2i_adapter(config), readers.t2i_adapter)
    if isinstance(config, UNetConfig):
        found, read = (_text_unet if config.context_dim is not None else _plain_unet)(config), readers.unet
        return _checked(config, found, read)
    if isinstance(config, VAEConfig):
        return _checked(config, _vae(config), readers.vae)
    if isinstance(config, TAESDConfig):
        return _checked(config, _taesd(config), readers.taesd)
    return _checked(config, _clip(config), readers.clip)


def class_of(found: dict[str, Any]) -> str:
    """Return the class of a written config."""
    return str(found.get("_class_name") or found["architectures"][0])


def _checked(config: AnyConfig, found: dict[str, Any], read: Any) -> dict[str, Any]:
    kind = class_of(found)
    try:
        back = read(readers.Options({**found, "_class_name": kind}, kind))
    except MinidiffError as e:
        raise UnsupportedError(f"diffusers has no such model: {e}") from None
    lost = [f for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(back, f.name)]
    if lost:
        name, shown = lost[0].name, str(getattr(config, lost[0].name))
        raise UnsupportedError(f"a {kind} of diffusers cannot have {name}={shown[:120]}")
    return found


def _unet(c: UNetConfig) -> dict[str, Any]:
    """Return the fields common to the two classes of UNets."""
    down = [CONDITIONAL[level.attention] for level in c.levels]
    return {
        "act_fn": "silu",
        "block_out_channels": [level.channels for level in c.levels],
        "center_input_sample": False,
        "down_block_types": down,
        "downsample_padding": 0 if c.asymmetric_down else 1,
        "flip_sin_to_cos": not c.sin_first,
        "freq_shift": c.freq_shift,
        "in_channels": c.in_channels,
        "layers_per_block": c.layers,
        "mid_block_scale_factor": 1,
        "norm_eps": c.eps,
        "norm_num_groups": c.groups,
        "out_channels": c.out_channels,
        "sample_size": c.sample_size if c.sample_width is None else list(c.sides),
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
    }


def _text_unet(c: UNetConfig) -> dict[str, Any]:
    # The class uses the last level's numbers for the middle as well, and ignores those of a level without attention.
    attends = [level.attention == "text" for level in c.levels]
    turn = [c.levels[0], *(level for level in (*c.levels, c.mid) if level.attention == "text")][-1]
    width = turn.channels // turn.heads
    heads = [level.heads if a else max(1, level.channels // width) for level, a in zip(c.levels, attends, strict=True)]
    used = {level.heads for level in (*c.levels, c.mid) if level.attention == "text"}
    varied = any(level.down_depths or level.up_depths for level in c.levels)

    def depth(level: Level, each: tuple[int, ...]) -> int | list[int]:
        return 1 if level.attention == "none" else list(each) if varied else level.depth

    depths = [depth(level, c.down_depths(level)) for level in c.levels]
    if not attends[-1]:
        depths[-1] = turn.depth
    added: dict[str, Any] = {}
    if c.added_dim is not None:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": c.added_sinusoid}
        added["projection_class_embeddings_input_dim"] = c.added_dim
    return {
        "_class_name": "UNet2DConditionModel",
        **_unet(c),
        **added,
        "attention_head_dim": heads if len(used) > 1 else turn.heads,
        "cross_attention_dim": c.context_dim,
        "mid_block_type": {2: "UNetMidBlock2DCrossAttn", 1: "UNetMidBlock2D", 0: None}[c.mid_layers],
        "reverse_transformer_layers_per_block": (
            [depth(level, c.up_depths(level)) for level in reversed(c.levels)] if varied else None
        ),
        "time_cond_proj_dim": c.guidance_dim,
        "transformer_layers_per_block": 1 if all(d == 1 for d in depths) else depths,
        "upcast_attention": c.upcast_attention,
        "use_linear_projection": c.linear_proj,
    }


NO_CONTROLNET = (  # options of UNets alone
    "center_input_sample",
    "out_channels",
    "reverse_transformer_layers_per_block",
    "sample_size",
    "time_cond_proj_dim",
    "up_block_types",
)


def _controlnet(c: ControlNetConfig) -> dict[str, Any]:
    return {
        **{key: value for key, value in _text_unet(c).items() if key not in NO_CONTROLNET},
        "_class_name": "ControlNetModel",
        "conditioning_channels": c.image_channels,
        "conditioning_embedding_out_channels": list(c.hint_widths),
        "controlnet_conditioning_channel_order": "bgr" if c.bgr else "rgb",
        "global_pool_conditions": c.pooled,
    }


def _t2i_adapter(c: T2IAdapterConfig) -> dict[str, Any]:
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": next(name for name, kind in readers.ADAPTERS.items() if kind == c.kind),
        "channels": list(c.channels[:-1] if c.kind == "light" else c.channels),
        "downscale_factor": c.factor,
        "in_channels": c.image_channels,
        "num_res_blocks": c.layers,
    }


def _plain_unet(c: UNetConfig) -> dict[str, Any]:
    """Return the fields of a UNet2DModel, which has one size of head everywhere; None means a single head."""
    attending = [level for level in (*c.levels, c.mid) if level.attention == "self"]
    single = all(level.heads == 1 for level in attending)
    return {
        "_class_name": "UNet2DModel",
        **_unet(c),
        "add_attention": c.mid.attention == "self",
        "attention_head_dim": None if single else attending[0].channels // attending[0].heads,
        "mid_block_type": "UNetMidBlock2D" if c.mid_layers else None,
        "time_embedding_type": "positional",
    }


def _vae(c: VAEConfig) -> dict[str, Any]:
    levels = len(c.channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(c.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": c.upcast,
        "in_channels": c.image_channels,
        "latent_channels": c.latent_channels,
        "layers_per_block": c.layers,
        "mid_block_add_attention": c.mid_attention,
        "norm_num_groups": c.groups,
        "out_channels": c.image_channels,
        "sample_size": c.sample_size,
        "scaling_factor": c.scaling_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": c.quant_convs,
        "use_quant_conv": c.quant_convs,
    }


def _taesd(c: TAESDConfig) -> dict[str, Any]:
    widths = [c.width] * len(c.blocks)
    return {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
        "in_channels": c.image_channels,
        "latent_channels": c.latent_channels,
        "num_decoder_blocks": list(c.blocks[::-1]),
        "num_encoder_blocks": list(c.blocks),
        "out_channels": c.image_channels,
        "scaling_factor": c.scaling_factor,
    }


def _clip(c: CLIPTextConfig) -> dict[str, Any]:
    projected = c.projection is not None
    end = min(49407, c.vocab - 1) if c.end_token is None else c.end_token
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "bos_token_id": max(0, end - 1),
        "eos_token_id": 2 if c.end_token is None else end,
        "hidden_act": c.activation,
        "hidden_size": c.width,
        "intermediate_size": c.mlp,
        "layer_norm_eps": c.eps,
        "max_position_embeddings": c.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "pad_token_id": 1,
        "projection_dim": c.projection if projected else c.width,
        "vocab_size": c.vocab,
    }
