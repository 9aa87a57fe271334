"""Key maps of the UNet, autoencoder and text encoder in Stable Diffusion's original single file.

These are the names of CompVis' latent-diffusion, in which a UNet consists of two flat lists of blocks: ``input_blocks``
has every ResBlock and every downsampling on the way down, ``output_blocks`` every ResBlock on the way up.
"""

from __future__ import annotations

from collections.abc import Iterator

from minidiff.config import CLIPTextConfig, ControlNetConfig, Level, UNetConfig, VAEConfig
from minidiff.models.unet import skip_widths
from weights_convert import keys_diffusers
from weights_convert.engine import CONV1X1, Drop, Module, join
from weights_convert.keys_diffusers import BLOCK, CLIP_DROPS, TRANSFORMER

CONTROL = "control_model"  # the prefix of a ControlNet, in most files
UNET, VAE, CLIP = "model.diffusion_model", "first_stage_model", "cond_stage_model.transformer"
EMA = "model_ema"
GUIDANCE = "time_embed.cond_proj"  # of a UNet that reads the guidance scale (LCM)

RES = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "skip"),
)
VAE_RES = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"), ("nin_shortcut", "skip"))
VAE_ATTENTION = (
    Module("norm", "norm"),
    Module("q", "attn.q", CONV1X1),
    Module("k", "attn.k", CONV1X1),
    Module("v", "attn.v", CONV1X1),
    Module("proj_out", "attn.out", CONV1X1),
)

EMA_COPY = Drop("EMA weights", rf"{EMA}\..*", "a running average of the UNet, kept beside it; --ema takes it instead")
EMA_COUNTERS = Drop("EMA settings", rf"{EMA}\.(decay|num_updates)", "how the running average was made")
DROPS = (
    EMA_COPY,
    Drop(
        "noise schedule",
        r"(betas|lvlb_weights|logvar|scale_factor|((sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?)"
        r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2))",
        "tables that follow from the schedule's settings",
    ),
    Drop("training loss", r"(first_stage_model\.|model\.)?loss\..*", "networks that only training uses"),
    Drop("training progress", r"(model_?)?(global_step|epoch)", "says how long it was trained"),
    *CLIP_DROPS,
)


def unet(config: UNetConfig) -> Iterator[Module]:
    """The diffusion model of SD1, SD2, SDXL and models distilled from them."""
    yield from _way_down(config, f"{UNET}.")
    last = len(config.levels) - 1
    for i, level in enumerate(reversed(config.levels)):
        for j in range(config.layers + 1):
            n = i * (config.layers + 1) + j
            yield from join(f"{UNET}.output_blocks.{n}.0", RES, f"up.{i}.res.{j}")
            yield from _attention(f"{UNET}.output_blocks.{n}.1", level, config.up_depths(level)[j], f"up.{i}.attn.{j}")
        if i < last:  # the last block of a level also holds the upsampling, after its attention
            yield Module(f"{UNET}.output_blocks.{n}.{1 if level.attention == 'none' else 2}.conv", f"up.{i}.up.conv")
    yield Module(f"{UNET}.out.0", "norm_out")
    yield Module(f"{UNET}.out.2", "conv_out")


def controlnet(config: ControlNetConfig, *, prefix: str = f"{CONTROL}.") -> Iterator[Module]:
    """ControlNets by their author's code (lllyasviel); some files have no ``prefix``."""
    yield from _way_down(config, prefix)
    convs = 2 * (len(config.hint_widths) - 1)
    yield Module(f"{prefix}input_hint_block.0", "hint.conv_in")  # a flat list, in which activations count
    for i in range(convs):
        yield Module(f"{prefix}input_hint_block.{2 * (i + 1)}", f"hint.convs.{i}")
    yield Module(f"{prefix}input_hint_block.{2 * (convs + 1)}", "hint.conv_out")
    for i in range(len(skip_widths(config))):
        yield Module(f"{prefix}zero_convs.{i}.0", f"zero.{i}")
    yield Module(f"{prefix}middle_block_out.0", "zero_mid")


def _way_down(config: UNetConfig, prefix: str) -> Iterator[Module]:
    yield Module(f"{prefix}time_embed.0", "time.linear1")
    yield Module(f"{prefix}time_embed.2", "time.linear2")
    yield Module(f"{prefix}{GUIDANCE}", "time.condition")
    yield Module(f"{prefix}label_emb.0.0", "added.linear1")
    yield Module(f"{prefix}label_emb.0.2", "added.linear2")
    yield Module(f"{prefix}input_blocks.0.0", "conv_in")
    last, n = len(config.levels) - 1, 1
    for i, level in enumerate(config.levels):
        for j in range(config.layers):
            yield from join(f"{prefix}input_blocks.{n}.0", RES, f"down.{i}.res.{j}")
            yield from _attention(
                f"{prefix}input_blocks.{n}.1", level, config.down_depths(level)[j], f"down.{i}.attn.{j}"
            )
            n += 1
        if i < last:
            yield Module(f"{prefix}input_blocks.{n}.0.op", f"down.{i}.down.conv")
            n += 1
    yield from join(f"{prefix}middle_block.0", RES, "mid.res1")
    yield from _attention(f"{prefix}middle_block.1", config.mid, config.mid.depth, "mid.attn.0")
    yield from join(f"{prefix}middle_block.2", RES, "mid.res2")


def _attention(theirs: str, level: Level, depth: int, ours: str) -> Iterator[Module]:
    if level.attention == "text":
        yield from join(theirs, TRANSFORMER, ours)
        for k in range(depth):
            yield from join(f"{theirs}.transformer_blocks.{k}", BLOCK, f"{ours}.blocks.{k}")


def vae(config: VAEConfig) -> Iterator[Module]:
    """The autoencoder; its decoder counts levels from the finest, as the encoder does."""
    last = len(config.channels) - 1
    for half in ("encoder", "decoder"):
        for name in ("conv_in", "norm_out", "conv_out"):
            yield Module(f"{VAE}.{half}.{name}", f"{half}.{name}")
        yield from join(f"{VAE}.{half}.mid.block_1", VAE_RES, f"{half}.mid.res1")
        yield from join(f"{VAE}.{half}.mid.attn_1", VAE_ATTENTION, f"{half}.mid.attn")
        yield from join(f"{VAE}.{half}.mid.block_2", VAE_RES, f"{half}.mid.res2")
    for i in range(last + 1):
        for j in range(config.layers):
            yield from join(f"{VAE}.encoder.down.{i}.block.{j}", VAE_RES, f"encoder.down.{i}.res.{j}")
        for j in range(config.layers + 1):
            yield from join(f"{VAE}.decoder.up.{last - i}.block.{j}", VAE_RES, f"decoder.up.{i}.res.{j}")
        if i < last:
            yield Module(f"{VAE}.encoder.down.{i}.downsample.conv", f"encoder.down.{i}.down.conv")
            yield Module(f"{VAE}.decoder.up.{last - i}.upsample.conv", f"decoder.up.{i}.up.conv")
    yield Module(f"{VAE}.quant_conv", "quant")
    yield Module(f"{VAE}.post_quant_conv", "post_quant")


def clip(config: CLIPTextConfig, *, prefix: str = "text_model.") -> Iterator[Module]:
    """SD1's text encoder, in transformers' names; some files have no ``prefix``."""
    return keys_diffusers.clip(config, prefix=f"{CLIP}.{prefix}")


def ema_key(key: str) -> str:
    """Return the key of a UNet tensor's running average: the same name without its dots."""
    return f"{EMA}." + key.removeprefix("model.").replace(".", "")
