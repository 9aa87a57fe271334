"""Twins of controls: tiny random ControlNets and T2I-Adapters of the reference, and ours by way of the converter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ControlNetModel, T2IAdapter
from torch import Tensor

import weights_convert
from minidiff import ControlModel
from tests.support.parity import ldm, twins

HINT = (8, 12, 16)  # two of its convolutions halve the side: the VAE of the twins has a factor of 4
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {"adapter_type": "full_adapter", "channels": [32, 48, 64]},
    "light": {"adapter_type": "light_adapter", "channels": [32, 48]},
    # level by level 1/2, 1/2 and 1/4 of the latents' side, and one more for the middle
    "xl": {"adapter_type": "full_adapter_xl", "channels": [32, 48, 64, 64], "downscale_factor": 8},
}


def controlnet_twin(kind: str = "sd1", seed: int = 7, unet: Any = None, **options: Any) -> Any:
    """A tiny ControlNet of the reference for a kind of ``twins.UNETS``, or for ``unet``."""
    unet = twins.unet_twin(kind) if unet is None else unet
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT, load_weights_from_unet=False)
    own = {name: value for name, value in made.config.items() if not name.startswith("_")}
    return twins.redraw(ControlNetModel(**own | options), seed)


def t2i_twin(kind: str = "full", seed: int = 8, **options: Any) -> Any:
    """A tiny T2I-Adapter of the reference."""
    found: dict[str, Any] = {"downscale_factor": 4, "num_res_blocks": 2} | ADAPTERS[kind]
    return twins.redraw(T2IAdapter(**found | options), seed)


def loaded(reference: Any, folder: Path) -> ControlModel:
    """Our control with the reference's weights, by way of a folder, a minidiff file and the production converter."""
    reference.save_pretrained(str(folder / "theirs"))
    weights_convert.convert(folder / "theirs", folder / "ours.safetensors")
    return ControlModel.load(folder / "ours.safetensors", "cpu")


def original(reference: Any, prefix: str = "control_model.") -> dict[str, Tensor]:
    """A ControlNet by the names of its author's code, written down from the constructor of ``ControlNet`` (cldm.py)."""
    state: Mapping[str, Tensor] = reference.state_dict()
    attention = ["CrossAttn" in kind for kind in reference.config.down_block_types]
    both = ldm.unet_pairs(len(attention), attention, reference.config.layers_per_block)
    pairs = [p for p in both if not p[0].startswith(("output_blocks", "out."))]
    pairs += [("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")]
    hint = 2 * len(reference.config.conditioning_embedding_out_channels)
    convs = ["conv_in", *(f"blocks.{i}" for i in range(hint - 2)), "conv_out"]
    pairs += [(f"input_hint_block.{2 * k}", f"controlnet_cond_embedding.{conv}") for k, conv in enumerate(convs)]
    zeros = sum(key.startswith("controlnet_down_blocks.") and key.endswith(".weight") for key in state)
    pairs += [(f"zero_convs.{i}.0", f"controlnet_down_blocks.{i}") for i in range(zeros)]
    pairs += [("middle_block_out.0", "controlnet_mid_block")]
    return {prefix + key: t.clone() for key, t in ldm._rename(state, pairs).items()}


def original_t2i(reference: Any) -> dict[str, Tensor]:
    """A T2I-Adapter by the names of its authors' code (``Adapter`` and ``Adapter_light``)."""
    light, blocks = reference.config.adapter_type == "light_adapter", reference.config.num_res_blocks
    out = {}
    for key, tensor in reference.state_dict().items():
        name = key.removeprefix("adapter.").split(".")
        if name[0] == "body" and light:
            name = ["body" if part == "resnets" else part for part in name]
        elif name[0] == "body":
            level = int(name[1])
            block = int(name[3]) if name[2] == "resnets" else 0
            name = ["body", str(level * blocks + block), *(name[4:] if name[2] == "resnets" else name[2:])]
        out[".".join(name)] = tensor.clone()
    return out
