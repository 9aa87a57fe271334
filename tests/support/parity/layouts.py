"""The public layouts of Stable Diffusion at full size: every key and shape, written down from the models' definitions.

Independent of ``weights_convert``: these follow the constructors of the original code and the configs that were
published with the weights. ``UNetModel`` (openaimodel.py of CompVis' latent-diffusion and Stability's
generative-models) makes ``input_blocks``, ``middle_block`` and ``output_blocks`` as flat lists, keeping a stack of the
channels that the way up will concatenate; ``Encoder`` and ``Decoder`` (diffusionmodules/model.py) are the first stage;
the text encoders are transformers' CLIPTextModel (SD1, and SDXL's first) and OpenCLIP's (SD2, SDXL's second).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]
Keys = Iterator[tuple[str, Shape]]


@dataclass(frozen=True)
class UNetYaml:
    """The options of ``UNetModel`` as the published yaml files have them; attention by downsampling factor."""

    in_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    transformer_depth: tuple[int, ...] = (1, 1, 1, 1)
    context_dim: int = 768
    use_linear: bool = False
    adm_in_channels: int | None = None


# v1-inference.yaml, v1-inpainting-inference.yaml, v2-inference-v.yaml, v2-inpainting-inference.yaml, sd_xl_base.yaml,
# sd_xl_refiner.yaml
SD15 = UNetYaml()
SD15_INPAINTING = UNetYaml(in_channels=9)
SD21 = UNetYaml(context_dim=1024, use_linear=True)
SD2_INPAINTING = UNetYaml(context_dim=1024, use_linear=True, in_channels=9)
SDXL = UNetYaml(
    channel_mult=(1, 2, 4),
    attention_resolutions=(4, 2),
    transformer_depth=(1, 2, 10),
    context_dim=2048,
    use_linear=True,
    adm_in_channels=2816,
)
REFINER = UNetYaml(
    model_channels=384,
    channel_mult=(1, 2, 4, 4),
    attention_resolutions=(4, 2),
    transformer_depth=(4, 4, 4, 4),
    context_dim=1280,
    use_linear=True,
    adm_in_channels=2560,
)


def _linear(name: str, out: int, inside: int, bias: bool = True) -> Keys:
    yield f"{name}.weight", (out, inside)
    if bias:
        yield f"{name}.bias", (out,)


def _conv(name: str, out: int, inside: int, kernel: int) -> Keys:
    yield f"{name}.weight", (out, inside, kernel, kernel)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Keys:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _res_block(name: str, inside: int, out: int, time: int) -> Keys:
    yield from _norm(f"{name}.in_layers.0", inside)
    yield from _conv(f"{name}.in_layers.2", out, inside, 3)
    yield from _linear(f"{name}.emb_layers.1", out, time)
    yield from _norm(f"{name}.out_layers.0", out)
    yield from _conv(f"{name}.out_layers.3", out, out, 3)
    if inside != out:
        yield from _conv(f"{name}.skip_connection", out, inside, 1)


def _spatial_transformer(name: str, width: int, depth: int, y: UNetYaml) -> Keys:
    yield from _norm(f"{name}.norm", width)
    projection = _linear if y.use_linear else lambda n, a, b: _conv(n, a, b, 1)
    yield from projection(f"{name}.proj_in", width, width)
    for k in range(depth):
        block = f"{name}.transformer_blocks.{k}"
        for attention, context in (("attn1", width), ("attn2", y.context_dim)):
            yield from _linear(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from _linear(f"{block}.{attention}.to_k", width, context, bias=False)
            yield from _linear(f"{block}.{attention}.to_v", width, context, bias=False)
            yield from _linear(f"{block}.{attention}.to_out.0", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", 8 * width, width)  # GEGLU: two of four times the width
        yield from _linear(f"{block}.ff.net.2", width, 4 * width)
        for n in (1, 2, 3):
            yield from _norm(f"{block}.norm{n}", width)
    yield from projection(f"{name}.proj_out", width, width)


def unet(y: UNetYaml, prefix: str = "model.diffusion_model.") -> dict[str, Shape]:
    """``UNetModel`` in the order of its constructor."""
    first, time = y.model_channels, 4 * y.model_channels

    def keys() -> Keys:
        yield from _linear("time_embed.0", time, first)
        yield from _linear("time_embed.2", time, time)
        if y.adm_in_channels is not None:
            yield from _linear("label_emb.0.0", time, y.adm_in_channels)
            yield from _linear("label_emb.0.2", time, time)
        yield from _conv("input_blocks.0.0", first, y.in_channels, 3)
        stack, width, factor, n = [first], first, 1, 1
        for level, mult in enumerate(y.channel_mult):
            for _ in range(y.num_res_blocks):
                yield from _res_block(f"input_blocks.{n}.0", width, mult * first, time)
                width = mult * first
                if factor in y.attention_resolutions:
                    yield from _spatial_transformer(f"input_blocks.{n}.1", width, y.transformer_depth[level], y)
                stack.append(width)
                n += 1
            if level != len(y.channel_mult) - 1:
                yield from _conv(f"input_blocks.{n}.0.op", width, width, 3)
                stack.append(width)
                n += 1
                factor *= 2
        yield from _res_block("middle_block.0", width, width, time)
        yield from _spatial_transformer("middle_block.1", width, y.transformer_depth[-1], y)
        yield from _res_block("middle_block.2", width, width, time)
        n = 0
        for level, mult in reversed(list(enumerate(y.channel_mult))):
            for i in range(y.num_res_blocks + 1):
                yield from _res_block(f"output_blocks.{n}.0", width + stack.pop(), mult * first, time)
                width, place = mult * first, 1
                if factor in y.attention_resolutions:
                    yield from _spatial_transformer(f"output_blocks.{n}.1", width, y.transformer_depth[level], y)
                    place = 2
                if level and i == y.num_res_blocks:
                    yield from _conv(f"output_blocks.{n}.{place}.conv", width, width, 3)
                    factor //= 2
                n += 1
        yield from _norm("out.0", width)
        yield from _conv("out.2", 4, first, 3)

    return {prefix + key: shape for key, shape in keys()}


def _vae_block(name: str, inside: int, out: int) -> Keys:
    yield from _norm(f"{name}.norm1", inside)
    yield from _conv(f"{name}.conv1", out, inside, 3)
    yield from _norm(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out, 3)
    if inside != out:
        yield from _conv(f"{name}.nin_shortcut", out, inside, 1)


def _vae_middle(name: str, width: int) -> Keys:
    yield from _vae_block(f"{name}.block_1", width, width)
    yield from _norm(f"{name}.attn_1.norm", width)
    for x in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.attn_1.{x}", width, width, 1)
    yield from _vae_block(f"{name}.block_2", width, width)


def vae(prefix: str = "first_stage_model.") -> dict[str, Shape]:
    """``AutoencoderKL`` with ch 128, ch_mult 1, 2, 4, 4, z_channels 4: the same in every family."""
    widths, blocks, z = (128, 256, 512, 512), 2, 4

    def keys() -> Keys:
        yield from _conv("encoder.conv_in", widths[0], 3, 3)
        width = widths[0]
        for level, out in enumerate(widths):
            for i in range(blocks):
                yield from _vae_block(f"encoder.down.{level}.block.{i}", width, out)
                width = out
            if level != len(widths) - 1:
                yield from _conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
        yield from _vae_middle("encoder.mid", width)
        yield from _norm("encoder.norm_out", width)
        yield from _conv("encoder.conv_out", 2 * z, width, 3)
        yield from _conv("decoder.conv_in", width, z, 3)
        yield from _vae_middle("decoder.mid", width)
        for level in reversed(range(len(widths))):
            for i in range(blocks + 1):
                yield from _vae_block(f"decoder.up.{level}.block.{i}", width, widths[level])
                width = widths[level]
            if level != 0:
                yield from _conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
        yield from _norm("decoder.norm_out", width)
        yield from _conv("decoder.conv_out", 3, width, 3)
        yield from _conv("quant_conv", 2 * z, 2 * z, 1)
        yield from _conv("post_quant_conv", z, z, 1)

    return {prefix + key: shape for key, shape in keys()}


def clip_l(prefix: str = "cond_stage_model.transformer.text_model.") -> dict[str, Shape]:
    """openai/clip-vit-large-patch14's text model, without the constant ``position_ids``."""
    width, mlp, layers = 768, 3072, 12

    def keys() -> Keys:
        yield "embeddings.token_embedding.weight", (49408, width)
        yield "embeddings.position_embedding.weight", (77, width)
        for i in range(layers):
            layer = f"encoder.layers.{i}"
            for x in ("k", "v", "q", "out"):
                yield from _linear(f"{layer}.self_attn.{x}_proj", width, width)
            yield from _norm(f"{layer}.layer_norm1", width)
            yield from _linear(f"{layer}.mlp.fc1", mlp, width)
            yield from _linear(f"{layer}.mlp.fc2", width, mlp)
            yield from _norm(f"{layer}.layer_norm2", width)
        yield from _norm("final_layer_norm", width)

    return {prefix + key: shape for key, shape in keys()}


def open_clip(prefix: str, width: int, layers: int) -> dict[str, Shape]:
    """OpenCLIP's text transformer: ViT-H-14 has width 1024 and 24 layers, ViT-bigG-14 1280 and 32."""

    def keys() -> Keys:
        yield "positional_embedding", (77, width)
        yield "text_projection", (width, width)
        yield "logit_scale", ()
        for i in range(layers):
            block = f"transformer.resblocks.{i}"
            yield from _norm(f"{block}.ln_1", width)
            yield f"{block}.attn.in_proj_weight", (3 * width, width)
            yield f"{block}.attn.in_proj_bias", (3 * width,)
            yield from _linear(f"{block}.attn.out_proj", width, width)
            yield from _norm(f"{block}.ln_2", width)
            yield from _linear(f"{block}.mlp.c_fc", 4 * width, width)
            yield from _linear(f"{block}.mlp.c_proj", width, 4 * width)
        yield "token_embedding.weight", (49408, width)
        yield from _norm("ln_final", width)

    return {prefix + key: shape for key, shape in keys()}
