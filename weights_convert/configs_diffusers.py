"""A component's ``config.json`` in diffusers' or transformers' words, as one of minidiff's configs.

Every option is read. Most of diffusers' options switch on something that Stable Diffusion never used; minidiff's models
do not have it, so a value other than the usual one is refused here, quoted, instead of being passed over in silence.
An option that the file leaves out has the default of the class that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minidiff.config import Attention, CLIPTextConfig, Level, TAESDConfig, UNetConfig, VAEConfig
from minidiff.errors import CheckpointError, UnsupportedError

Found = Mapping[str, Any]
SILU = ("silu", "swish")

# Options of the UNets with the values that minidiff's UNet honours. The first is the default.
UNET_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": SILU,
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_type": ("conv",),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upsample_type": ("conv",),
}
VAE_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": SILU,
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0),
}
TAESD_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "latent_magnitude": (3,),  # these two are for storing latents as bytes
    "latent_shift": (0.5,),
    "shift_factor": (0.0, 0),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
# Options that change nothing in what a trained model computes in one given precision, or that others already tell.
NO_EFFECT = {
    "addition_embed_type_num_heads",
    "dropout",
    "num_train_timesteps",
}
CONDITIONAL_DOWN: dict[str, Attention] = {"CrossAttnDownBlock2D": "text", "DownBlock2D": "none"}
UNCONDITIONAL_DOWN: dict[str, Attention] = {"AttnDownBlock2D": "self", "DownBlock2D": "none"}


class Options:
    """The options of one config file; remembers which were asked for, to name those that nobody knows."""

    def __init__(self, found: Found, where: str) -> None:
        self.found, self.where = found, where
        self.known: set[str] = set(NO_EFFECT)

    def get(self, key: str, default: Any) -> Any:
        """The option's value, or the default of the class that wrote the file."""
        self.known.add(key)
        return self.found.get(key, default)

    def number(self, key: str, default: Any) -> Any:
        """An option that must be a number of the kind of ``default`` (a float may be written as an int)."""
        value = self.get(key, default)
        kinds = (int, float) if isinstance(default, float) else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key}={value!r} should be a number")
        return value

    def each(self, key: str, default: Any, count: int) -> list[Any]:
        """One value a level: a list of ``count``, or a single value that holds for all."""
        value = self.get(key, default)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(values) != count:
            raise CheckpointError(f"{self.where}: {key}={value!r} should have {count} entries, one for each level")
        return values

    def one(self, key: str, default: Any, count: int) -> Any:
        """An option that may differ between levels, in a model where it may not."""
        values = self.each(key, default, count)
        if any(v != values[0] for v in values):
            self.refuse(key, values)
        return values[0]

    def only(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuse every option whose value is not among those allowed."""
        for key, values in allowed.items():
            value = self.get(key, values[0])
            same = [value] if not isinstance(value, (list, tuple)) else value
            if any(v not in values for v in same):
                self.refuse(key, value)

    def refuse(self, key: str, value: Any) -> None:
        """Raise :class:`UnsupportedError` for this option."""
        raise UnsupportedError(f"{self.where}: {key}={value!r} is not supported by minidiff's models")

    def unknown(self) -> list[str]:
        """Options of a diffusers config that no class has and that are switched on: passed over, as diffusers does.

        Transformers' configs always have such, since they list what all of its models share.
        """
        if "_diffusers_version" not in self.found:
            return []
        return sorted(k for k, v in self.found.items() if k not in self.known and not k.startswith("_") and v)


def unet(options: Options) -> UNetConfig:
    """The config of a UNet2DConditionModel or (told by ``_class_name``) a UNet2DModel."""
    o = options
    conditional = o.get("_class_name", "UNet2DConditionModel") == "UNet2DConditionModel"
    o.only(UNET_ONLY)
    channels = o.get("block_out_channels", [320, 640, 1280, 1280] if conditional else [224, 448, 672, 896])
    if (
        not isinstance(channels, (list, tuple))
        or not all(isinstance(c, int) and c > 0 for c in channels)
        or not channels
    ):
        raise CheckpointError(f"{o.where}: block_out_channels={channels!r} should be a list of widths")
    if o.get("time_embedding_dim", None) not in (None, 4 * channels[0]):
        o.refuse("time_embedding_dim", o.get("time_embedding_dim", None))
    levels, mid = (_text_levels if conditional else _self_levels)(o, list(channels))
    sin_first = not o.get("flip_sin_to_cos", True)
    freq_shift = o.number("freq_shift", 0)
    padding = o.number("downsample_padding", 1)
    if padding not in (0, 1):
        o.refuse("downsample_padding", padding)
    return UNetConfig(
        levels=levels,
        mid=mid,
        in_channels=o.number("in_channels", 4 if conditional else 3),
        out_channels=o.number("out_channels", 4 if conditional else 3),
        layers=o.one("layers_per_block", 2, len(channels)),
        sin_first=sin_first,
        freq_shift=freq_shift,
        asymmetric_down=padding == 0,
        groups=o.number("norm_num_groups", 32),
        eps=float(o.number("norm_eps", 1e-5)),
        sample_size=_side(o, 64),
        upcast_attention=bool(o.get("upcast_attention", False)),
        **(_conditions(o, sin_first, freq_shift, len(channels)) if conditional else {}),
    )


def _text_levels(o: Options, channels: list[int]) -> tuple[tuple[Level, ...], Level]:
    n = len(channels)
    kinds = _attention(o, CONDITIONAL_DOWN, ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], n)
    if o.get("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2DCrossAttn":
        o.refuse("mid_block_type", o.get("mid_block_type", None))
    # Under both names this is a number of heads; the second one came too late to replace the first.
    sizes = o.each("attention_head_dim", 8, n)
    heads = sizes if o.get("num_attention_heads", None) is None else o.each("num_attention_heads", None, n)
    depths = o.each("transformer_layers_per_block", 1, n)
    if not all(isinstance(v, int) for v in (*heads, *depths)):  # SDXL variants nest one list for each layer
        o.refuse("transformer_layers_per_block / attention_head_dim", [*depths, *heads])
    levels = tuple(
        Level(channels=c, attention=kind, depth=d, heads=h) if kind == "text" else Level(channels=c)
        for c, kind, d, h in zip(channels, kinds, depths, heads, strict=True)
    )
    return levels, Level(channels=channels[-1], attention="text", depth=depths[-1], heads=heads[-1])


def _self_levels(o: Options, channels: list[int]) -> tuple[tuple[Level, ...], Level]:
    kinds = _attention(o, UNCONDITIONAL_DOWN, ["DownBlock2D"] + ["AttnDownBlock2D"] * 3, len(channels))
    if o.get("mid_block_type", "UNetMidBlock2D") != "UNetMidBlock2D":
        o.refuse("mid_block_type", o.get("mid_block_type", None))
    groups = o.get("attn_norm_num_groups", None)
    if groups not in (None, o.get("norm_num_groups", 32)):
        o.refuse("attn_norm_num_groups", groups)
    size = o.get("attention_head_dim", 8)  # here it is what its name says; None: a single head over all channels
    if size is not None and (not isinstance(size, int) or size <= 0):
        raise CheckpointError(f"{o.where}: attention_head_dim={size!r} should be a positive number or null")
    attends: list[Attention] = [*kinds, "self" if o.get("add_attention", True) else "none"]
    for c, kind in zip([*channels, channels[-1]], attends, strict=True):
        if kind == "self" and size is not None and c % size:
            o.refuse("attention_head_dim", size)
    levels = [
        Level(channels=c, attention=kind, heads=c // (size or c)) if kind == "self" else Level(channels=c)
        for c, kind in zip([*channels, channels[-1]], attends, strict=True)
    ]
    return tuple(levels[:-1]), levels[-1]


def _attention(o: Options, names: Mapping[str, Attention], default: list[str], count: int) -> list[Attention]:
    """The levels' kind of attention from the names of their blocks; the way up must mirror the way down."""
    mirror = [n.replace("Down", "Up") for n in reversed(default)]
    down, up = o.get("down_block_types", default), o.get("up_block_types", mirror)
    for kind in down:
        if kind not in names:
            o.refuse("down_block_types", kind)
    if [n.replace("Down", "Up") for n in reversed(down)] != list(up):
        o.refuse("up_block_types", up)
    if len(down) != count:
        raise CheckpointError(f"{o.where}: {len(down)} down_block_types for {count} block_out_channels")
    return [names[kind] for kind in down]


def _conditions(o: Options, sin_first: bool, freq_shift: int, count: int) -> dict[str, Any]:
    """What a text-to-image UNet is told beside the time."""
    out: dict[str, Any] = {
        "context_dim": o.one("cross_attention_dim", 1280, count),
        "linear_proj": bool(o.get("use_linear_projection", False)),
        "guidance_dim": o.get("time_cond_proj_dim", None),
    }
    kind = o.get("addition_embed_type", None)
    added, width = o.get("projection_class_embeddings_input_dim", None), o.get("addition_time_embed_dim", None)
    if kind == "text_time" and isinstance(added, int) and isinstance(width, int) and not (sin_first or freq_shift):
        out |= {"added_dim": added, "added_sinusoid": width}
    elif kind is not None:
        o.refuse("addition_embed_type", kind)
    return out


def vae(options: Options) -> VAEConfig:
    """The config of an AutoencoderKL."""
    o = options
    o.get("_class_name", None)
    o.only(VAE_ONLY)
    channels = o.get("block_out_channels", [64])
    n = len(channels)
    o.only({"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)})
    image = o.number("in_channels", 3)
    if o.number("out_channels", 3) != image:
        o.refuse("out_channels", o.get("out_channels", 3))
    quant = o.get("use_quant_conv", True)
    if o.get("use_post_quant_conv", True) != quant:
        o.refuse("use_post_quant_conv", not quant)
    return VAEConfig(
        channels=tuple(channels),
        image_channels=image,
        latent_channels=o.number("latent_channels", 4),
        layers=o.one("layers_per_block", 1, n),
        groups=o.number("norm_num_groups", 32),
        mid_attention=bool(o.get("mid_block_add_attention", True)),
        quant_convs=bool(quant),
        scaling_factor=float(o.number("scaling_factor", 0.18215)),
        sample_size=_side(o, 512),
        # On by default over there, but configs that leave it out are older than SDXL, whose autoencoder needs it.
        upcast=bool(o.get("force_upcast", False)),
    )


def taesd(options: Options) -> TAESDConfig:
    """The config of an AutoencoderTiny."""
    o = options
    o.get("_class_name", None)
    o.only(TAESD_ONLY)
    blocks = list(o.get("num_encoder_blocks", [1, 3, 3, 3]))
    if list(o.get("num_decoder_blocks", [3, 3, 3, 1])) != blocks[::-1]:
        o.refuse("num_decoder_blocks", o.get("num_decoder_blocks", None))
    width = o.one("encoder_block_out_channels", 64, len(blocks))
    for key in ("decoder_block_out_channels", "block_out_channels"):  # the second repeats the first
        if o.one(key, width, len(blocks)) != width:
            o.refuse(key, o.get(key, None))
    image = o.number("in_channels", 3)
    if o.number("out_channels", 3) != image:
        o.refuse("out_channels", o.get("out_channels", 3))
    return TAESDConfig(
        width=width,
        blocks=tuple(blocks),
        image_channels=image,
        latent_channels=o.number("latent_channels", 4),
        scaling_factor=float(o.number("scaling_factor", 1.0)),
    )


def _side(o: Options, default: int) -> int:
    value = o.get("sample_size", None)
    sides = [default] if value is None else value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(s, int) and s == sides[0] for s in sides):
        o.refuse("sample_size", value)
    return int(sides[0])


def clip(options: Options) -> CLIPTextConfig:
    """The config of a CLIPTextModel or (told by ``_class_name``) a CLIPTextModelWithProjection."""
    o = options
    projected = o.get("_class_name", "CLIPTextModel") == "CLIPTextModelWithProjection"
    activation = o.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        o.refuse("hidden_act", activation)
    vocab, end = o.number("vocab_size", 49408), o.number("eos_token_id", 49407)
    if end == 2:
        # Configs of before mid-2023 have a wrong id there; the reference then pools where the largest id stands,
        # and in CLIP's table that is the end token.
        end = min(49407, vocab - 1)
    return CLIPTextConfig(
        width=o.number("hidden_size", 512),
        layers=o.number("num_hidden_layers", 12),
        heads=o.number("num_attention_heads", 8),
        mlp=o.number("intermediate_size", 2048),
        activation=activation,
        projection=o.number("projection_dim", 512) if projected else None,
        vocab=vocab,
        positions=o.number("max_position_embeddings", 77),
        end_token=end,
        eps=float(o.number("layer_norm_eps", 1e-5)),
    )
