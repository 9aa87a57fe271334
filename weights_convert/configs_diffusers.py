"""Translation of a component's ``config.json`` (diffusers, transformers) to one of minidiff's configs.

Every option is read. Most options of diffusers enable something that Stable Diffusion never used and minidiff's models
do not have, so a value other than the usual one is refused by name, never silently ignored. Missing options have the
default of the class that wrote the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from minidiff.config import (
    MOST_BLOCKS,
    Attention,
    CLIPTextConfig,
    ControlNetConfig,
    Level,
    T2IAdapterConfig,
    TAESDConfig,
    UNetConfig,
    VAEConfig,
    quote,
    within,
)
from minidiff.errors import CheckpointError, UnsupportedError

Found = Mapping[str, Any]
SILU = ("silu", "swish")

# Options of the UNets with the values that minidiff's UNet supports, the default first.
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
    "quantization_config": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upsample_type": ("conv",),
}
VAE_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": SILU,
    "latents_mean": (None,),
    "latents_std": (None,),
    "quantization_config": (None,),
    "shift_factor": (None, 0),
}
TAESD_ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "latent_magnitude": (3,),  # these two are for latents stored as bytes
    "latent_shift": (0.5,),
    "shift_factor": (0.0, 0),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
CLIP_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("clip_text_model",),  # "clip" is text and image encoder in one
    "quantization_config": (None,),
    "use_attention_mask": (None, False),  # the pipelines of SD1 and SD2 hide the padding then
}
# Options that do not change the computation of a trained model in a given precision, or that follow from others.
NO_EFFECT = {
    "addition_embed_type_num_heads",
    "dropout",
    "num_train_timesteps",
}
CONDITIONAL_DOWN: dict[str, Attention] = {"CrossAttnDownBlock2D": "text", "DownBlock2D": "none"}
# Number of ResBlocks in each kind of middle block, with attention between two. The first is the default.
CONDITIONAL_MID = {"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1, None: 0}
UNCONDITIONAL_MID = {"UNetMidBlock2D": 2, None: 0}
UNCONDITIONAL_DOWN: dict[str, Attention] = {"AttnDownBlock2D": "self", "DownBlock2D": "none"}


class Options:
    """Typed access to the options of one config file, which records those that were read, to name unknown ones.

    Every getter raises :class:`CheckpointError` for a value of another type, quoting it.
    """

    def __init__(self, found: Found, where: str) -> None:
        self.found, self.where = found, where
        self.known: set[str] = set(NO_EFFECT)

    def get(self, key: str, default: Any) -> Any:
        """Return the option's value, of any type, or the default of the class that wrote the file."""
        self.known.add(key)
        return self.found.get(key, default)

    def number(self, key: str, default: float) -> float:
        """Return a finite number."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**63:
            raise self._wrong(key, value, "a number")
        return float(value)

    def whole(self, key: str, default: int) -> int:
        """Return an integer."""
        return self._whole(key, self.get(key, default))

    def flag(self, key: str, default: bool) -> bool:
        """Return True or False."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def wholes(self, key: str, default: list[int]) -> list[int]:
        """Return a list of integers."""
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or not value:
            raise self._wrong(key, value, "a list of numbers")
        return [self._whole(key, v) for v in value]

    def names(self, key: str, default: list[str], count: int) -> list[str]:
        """Return a list of ``count`` names."""
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value) or len(value) != count:
            raise self._wrong(key, value, f"a list of {count} names, one for each level")
        return list(value)

    def each(self, key: str, default: Any, count: int) -> list[Any]:
        """Return one value per level, from a list of ``count`` or a single value for all."""
        value = self.get(key, default)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * count
        if len(values) != count:
            raise self._wrong(key, value, f"a list of {count} entries, one for each level")
        return values

    def one(self, key: str, default: int, count: int) -> int:
        """Return an integer that diffusers allows to differ between levels, and minidiff does not."""
        values = [self._whole(key, v) for v in self.each(key, default, count)]
        if any(v != values[0] for v in values):
            self.refuse(key, values)
        return values[0]

    def sides(self, key: str, default: int) -> tuple[int, int]:
        """Return height and width, from one number for both or a list of the two."""
        value = self.get(key, default)
        sides = [default if value is None else value] * 2 if not isinstance(value, (list, tuple)) else value
        if len(sides) != 2:
            raise self._wrong(key, value, "one number, or height and width")
        return self._whole(key, sides[0]), self._whole(key, sides[1])

    def only(self, allowed: Mapping[str, tuple[Any, ...]], count: int | None = None) -> None:
        """Refuse every option whose value is not among those allowed.

        For options that may differ between levels, a list of ``count`` equal values counts as the value.
        """
        for key, values in allowed.items():
            value = self.get(key, values[0])
            each = self.each(key, value, count) if count is not None and isinstance(value, (list, tuple)) else [value]
            if any(v not in values for v in each):
                self.refuse(key, value)

    def _whole(self, key: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
            value = int(value)  # 8.0: JSON has only one kind of number
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {key}={quote(value)} should be {wanted}")

    def refuse(self, key: str, value: Any) -> NoReturn:
        """Raise :class:`UnsupportedError` for this option."""
        raise UnsupportedError(f"{self.where}: {key}={quote(value)} is not supported by minidiff's models")

    def unknown(self) -> list[str]:
        """Return options of a diffusers config that are set and that no class has: ignored, as in diffusers.

        transformers' configs always have some, since they list options of all of its models.
        """
        if "_diffusers_version" not in self.found:
            return []
        return sorted(k for k, v in self.found.items() if k not in self.known and not k.startswith("_") and v)


def unet(options: Options) -> UNetConfig:
    """Translate the config of a UNet2DConditionModel or (by ``_class_name``) a UNet2DModel."""
    o = options
    conditional = o.get("_class_name", "UNet2DConditionModel") == "UNet2DConditionModel"
    return UNetConfig(**_unet(o, conditional, mirrored=True))


def controlnet(options: Options) -> ControlNetConfig:
    """Translate the config of a ControlNetModel."""
    o = options
    o.get("_class_name", None)
    order = o.get("controlnet_conditioning_channel_order", "rgb")
    if order not in ("rgb", "bgr"):
        o.refuse("controlnet_conditioning_channel_order", order)
    return ControlNetConfig(
        **_unet(o, conditional=True, mirrored=False),
        image_channels=o.whole("conditioning_channels", 3),
        hint_widths=tuple(o.wholes("conditioning_embedding_out_channels", [16, 32, 96, 256])),
        bgr=order == "bgr",
        pooled=o.flag("global_pool_conditions", False),
    )


ADAPTERS = {"full_adapter": "full", "full_adapter_xl": "xl", "light_adapter": "light"}


def t2i_adapter(options: Options) -> T2IAdapterConfig:
    """Translate the config of a T2IAdapter."""
    o = options
    o.get("_class_name", None)
    kind = o.get("adapter_type", "full_adapter")
    if not isinstance(kind, str) or kind not in ADAPTERS:
        o.refuse("adapter_type", kind)
    channels = o.wholes("channels", [320, 640, 1280, 1280])
    if kind == "light_adapter":  # its last level has the width of the one before, and is not listed
        channels = [*channels, channels[-1]]
    if kind == "full_adapter_xl" and any(channels[i] != channels[i - 1] for i in range(3, len(channels))):
        o.refuse("channels", channels)
    return T2IAdapterConfig(
        kind=ADAPTERS[kind],  # type: ignore[arg-type]
        channels=tuple(channels),
        layers=o.whole("num_res_blocks", 2),
        image_channels=o.whole("in_channels", 3),
        factor=o.whole("downscale_factor", 8),
    )


def _unet(o: Options, conditional: bool, mirrored: bool) -> dict[str, Any]:
    """Return the fields of a UNetConfig; ``mirrored``: there is a way up."""
    channels = o.wholes("block_out_channels", [320, 640, 1280, 1280] if conditional else [224, 448, 672, 896])
    o.only(UNET_ONLY)
    o.only({"only_cross_attention": (False,)}, len(channels))
    if o.get("time_embedding_dim", None) not in (None, 4 * channels[0]):
        o.refuse("time_embedding_dim", o.get("time_embedding_dim", None))
    layers = o.one("layers_per_block", 2, len(channels))
    within(1, MOST_BLOCKS, layers_per_block=layers)
    if conditional:
        levels, mid, mid_layers = _text_levels(o, channels, layers, mirrored)
    else:
        levels, mid, mid_layers = _self_levels(o, channels, layers)
    sin_first = not o.flag("flip_sin_to_cos", True)
    freq_shift = o.whole("freq_shift", 0)
    padding = o.whole("downsample_padding", 1)
    if padding not in (0, 1):
        o.refuse("downsample_padding", padding)
    height, width = o.sides("sample_size", 64)
    return {
        "levels": levels,
        "mid": mid,
        "in_channels": o.whole("in_channels", 4 if conditional else 3),
        "out_channels": o.whole("out_channels", 4 if conditional else 3),
        "layers": layers,
        "mid_layers": mid_layers,
        "sin_first": sin_first,
        "freq_shift": freq_shift,
        "asymmetric_down": padding == 0,
        "groups": o.whole("norm_num_groups", 32),
        "eps": o.number("norm_eps", 1e-5),
        "sample_size": height,
        "sample_width": None if width == height else width,
        "upcast_attention": o.flag("upcast_attention", False),
        **(_conditions(o, sin_first, freq_shift, len(channels)) if conditional else {}),
    }


Ladder = tuple[tuple[Level, ...], Level, int]  # the levels, the middle block, and its number of ResBlocks


def _text_levels(o: Options, channels: list[int], layers: int, mirrored: bool) -> Ladder:
    n = len(channels)
    kinds = _attention(o, CONDITIONAL_DOWN, ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], n, mirrored)
    # Both names mean a number of heads; the second one came too late to replace the first.
    sizes = o.each("attention_head_dim", 8, n)
    heads = sizes if o.get("num_attention_heads", None) is None else o.each("num_attention_heads", None, n)
    down, up, turn = _depths(o, n, layers)
    levels = tuple(
        _text_level(o, c, h, down[i], up[n - 1 - i]) if kind == "text" else Level(channels=c)
        for i, (c, kind, h) in enumerate(zip(channels, kinds, heads, strict=True))
    )
    mid_layers = _mid_layers(o, CONDITIONAL_MID)
    if mid_layers < 2:
        return levels, Level(channels=channels[-1]), mid_layers
    return levels, _text_level(o, channels[-1], heads[-1], [turn], [turn]), mid_layers


def _text_level(o: Options, channels: int, heads: Any, down: list[int], up: list[int]) -> Level:
    if not isinstance(heads, int) or isinstance(heads, bool):
        o.refuse("attention_head_dim", heads)
    varied = None if {*down, *up} == {down[0]} else (tuple(down), tuple(up))
    down_depths, up_depths = varied or (None, None)
    return Level(
        channels=channels,
        attention="text",
        depth=down[0],
        heads=heads,
        down_depths=down_depths,
        up_depths=up_depths,
    )


def _depths(o: Options, count: int, layers: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Return the depths of the transformers after every ResBlock of every level, on the way down and up (coarsest
    level first), and in the middle. A level has one number, or a list with one for each ResBlock."""
    key, other = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down = o.each(key, 1, count)
    back = o.get(other, None)
    if back is None and any(isinstance(d, (list, tuple)) for d in down):
        raise CheckpointError(f"{o.where}: {key}={quote(down)} does not determine the way up; {other} is needed")
    up = down[::-1] if back is None else o.each(other, None, count)

    def listed(key: str, value: Any, length: int) -> list[int]:
        values = list(value) if isinstance(value, (list, tuple)) else [value] * length
        if len(values) < length:
            raise CheckpointError(f"{o.where}: {key}={quote(value)} has {len(values)} depths, {length} are needed")
        return [o._whole(key, v) for v in values[:length]]  # longer lists: diffusers ignores the rest, too

    turn = listed(key, down[-1], 1)[0]
    return [listed(key, d, layers) for d in down], [listed(other, u, layers + 1) for u in up], turn


def _mid_layers(o: Options, known: Mapping[Any, int]) -> int:
    kind = o.get("mid_block_type", next(iter(known)))
    if not isinstance(kind, (str, type(None))) or kind not in known:
        o.refuse("mid_block_type", kind)
    return known[kind]


def _self_levels(o: Options, channels: list[int], layers: int) -> Ladder:
    kinds = _attention(o, UNCONDITIONAL_DOWN, ["DownBlock2D"] + ["AttnDownBlock2D"] * 3, len(channels))
    mid_layers = _mid_layers(o, UNCONDITIONAL_MID)
    groups = o.get("attn_norm_num_groups", None)
    if groups not in (None, o.get("norm_num_groups", 32)):
        o.refuse("attn_norm_num_groups", groups)
    # Here it is what its name says, the size of a head; None: a single head over all channels.
    size = None if o.get("attention_head_dim", 8) is None else o.whole("attention_head_dim", 8)
    if size is not None and size <= 0:
        o.refuse("attention_head_dim", size)
    middle = o.flag("add_attention", True) and mid_layers == 2
    attends: list[Attention] = [*kinds, "self" if middle else "none"]
    for c, kind in zip([*channels, channels[-1]], attends, strict=True):
        if kind == "self" and size is not None and c % size:
            o.refuse("attention_head_dim", size)
    levels = [
        Level(channels=c, attention=kind, heads=c // (size or c)) if kind == "self" else Level(channels=c)
        for c, kind in zip([*channels, channels[-1]], attends, strict=True)
    ]
    return tuple(levels[:-1]), levels[-1], mid_layers


def _attention(
    o: Options, names: Mapping[str, Attention], default: list[str], count: int, mirrored: bool = True
) -> list[Attention]:
    """Return each level's kind of attention from the names of its blocks; a way up must mirror the way down."""
    down = o.names("down_block_types", default, count)
    for kind in down:
        if kind not in names:
            o.refuse("down_block_types", kind)
    if mirrored:
        up = o.names("up_block_types", [n.replace("Down", "Up") for n in reversed(default)], count)
        if [n.replace("Down", "Up") for n in reversed(down)] != up:
            o.refuse("up_block_types", up)
    return [names[kind] for kind in down]


def _conditions(o: Options, sin_first: bool, freq_shift: int, count: int) -> dict[str, Any]:
    """Return the conditions of a text-to-image UNet besides the timestep."""
    guidance = o.get("time_cond_proj_dim", None)
    out: dict[str, Any] = {
        "context_dim": o.one("cross_attention_dim", 1280, count),
        "linear_proj": o.flag("use_linear_projection", False),
        "guidance_dim": None if guidance is None else o.whole("time_cond_proj_dim", 0),
    }
    kind = o.get("addition_embed_type", None)
    told = ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    added, width = (o.get(key, None) for key in told)
    if kind == "text_time":
        if sin_first or freq_shift:
            o.refuse("flip_sin_to_cos / freq_shift", [not sin_first, freq_shift])
        out |= {"added_dim": o.whole(told[0], added), "added_sinusoid": o.whole(told[1], width)}
    elif kind is not None:
        o.refuse("addition_embed_type", kind)
    return out


def vae(options: Options) -> VAEConfig:
    """Translate the config of an AutoencoderKL."""
    o = options
    o.get("_class_name", None)
    o.only(VAE_ONLY)
    channels = o.wholes("block_out_channels", [64])
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        kinds = o.names(key, [kind], len(channels))
        if any(k != kind for k in kinds):
            o.refuse(key, kinds)
    image = o.whole("in_channels", 3)
    if o.whole("out_channels", 3) != image:
        o.refuse("out_channels", o.get("out_channels", 3))
    quant = o.flag("use_quant_conv", True)
    if o.flag("use_post_quant_conv", True) != quant:
        o.refuse("use_post_quant_conv", not quant)
    height, width = o.sides("sample_size", 512)
    return VAEConfig(
        channels=tuple(channels),
        image_channels=image,
        latent_channels=o.whole("latent_channels", 4),
        layers=o.whole("layers_per_block", 1),
        groups=o.whole("norm_num_groups", 32),
        mid_attention=o.flag("mid_block_add_attention", True),
        quant_convs=quant,
        scaling_factor=o.number("scaling_factor", 0.18215),
        sample_size=max(height, width),  # only the size of tiles
        # True by default in diffusers, but configs without it are older than SDXL, whose autoencoder needs it.
        upcast=o.flag("force_upcast", False),
    )


def taesd(options: Options) -> TAESDConfig:
    """Translate the config of an AutoencoderTiny."""
    o = options
    o.get("_class_name", None)
    o.only(TAESD_ONLY)
    blocks = o.wholes("num_encoder_blocks", [1, 3, 3, 3])
    if o.wholes("num_decoder_blocks", [3, 3, 3, 1]) != blocks[::-1]:
        o.refuse("num_decoder_blocks", o.get("num_decoder_blocks", None))
    width = o.one("encoder_block_out_channels", 64, len(blocks))
    for key in ("decoder_block_out_channels", "block_out_channels"):  # the second repeats the first
        if o.one(key, width, len(blocks)) != width:
            o.refuse(key, o.get(key, None))
    image = o.whole("in_channels", 3)
    if o.whole("out_channels", 3) != image:
        o.refuse("out_channels", o.get("out_channels", 3))
    return TAESDConfig(
        width=width,
        blocks=tuple(blocks),
        image_channels=image,
        latent_channels=o.whole("latent_channels", 4),
        scaling_factor=o.number("scaling_factor", 1.0),
    )


def clip(options: Options) -> CLIPTextConfig:
    """Translate the config of a CLIPTextModel or (by ``_class_name``) a CLIPTextModelWithProjection."""
    o = options
    projected = o.get("_class_name", "CLIPTextModel") == "CLIPTextModelWithProjection"
    o.only(CLIP_ONLY)
    activation = o.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        o.refuse("hidden_act", activation)
    end = o.whole("eos_token_id", 49407)
    return CLIPTextConfig(
        width=o.whole("hidden_size", 512),
        layers=o.whole("num_hidden_layers", 12),
        heads=o.whole("num_attention_heads", 8),
        mlp=o.whole("intermediate_size", 2048),
        activation=activation,
        projection=o.whole("projection_dim", 512) if projected else None,
        vocab=o.whole("vocab_size", 49408),
        positions=o.whole("max_position_embeddings", 77),
        # Configs before mid-2023 have a wrong id, 2; the reference then pools at the largest id.
        end_token=None if end == 2 else end,
        eps=o.number("layer_norm_eps", 1e-5),
    )
