"""Stability's single files, SD2 and SDXL, written down from their own definition, independent of ``weights_convert``.

UNet and autoencoder are those of ``ldm.py``, with ``label_emb`` for SDXL's sizes (openaimodel.py of generative-models).
The text encoders are ``FrozenOpenCLIPEmbedder``'s (SD2: its ``model`` is open_clip's ``TextTransformer``, which has one
layer more than is read) and those of SDXL's ``GeneralConditioner``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.support.parity.ldm import _rename, unet_pairs, vae_pairs

State = Mapping[str, Tensor]
LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def bare(text: State) -> dict[str, Tensor]:
    """Names without transformers' prefix."""
    return {k.removeprefix("text_model."): t for k, t in text.items()}


def open_clip(text: State, root: str, *, extra_layer: bool) -> dict[str, Tensor]:
    """A text encoder of transformers in open_clip's names: fused q, k, v, the projection from the other side."""
    text = bare(text)
    width = text["embeddings.token_embedding.weight"].shape[1]
    out = {
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "logit_scale": torch.tensor(4.6),
        "text_projection": torch.randn(width, 7),
    }
    if "text_projection.weight" in text:
        out["text_projection"] = text["text_projection.weight"].T
    layers = 1 + max(int(k.split(".")[2]) for k in text if k.startswith("encoder.layers."))
    for i in range(layers):
        for leaf in ("weight", "bias"):
            fused = [text[f"encoder.layers.{i}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            out[f"transformer.resblocks.{i}.attn.in_proj_{leaf}"] = torch.cat(fused)
            for theirs, name in LAYER.items():
                out[f"transformer.resblocks.{i}.{name}.{leaf}"] = text[f"encoder.layers.{i}.{theirs}.{leaf}"]
    if extra_layer:
        last = {k: t for k, t in out.items() if f".resblocks.{layers - 1}." in k}
        out |= {k.replace(f".{layers - 1}.", f".{layers}."): torch.randn_like(t) for k, t in last.items()}
    return {f"{root}.{k}": t for k, t in out.items()}


def original(unet: State, vae: State, texts: Mapping[str, Tensor], *, levels: int = 3) -> dict[str, Tensor]:
    """A whole ``state_dict``; ``texts`` under their original names already."""
    attention = [any(k.startswith(f"down_blocks.{i}.attentions.") for k in unet) for i in range(levels)]
    pairs = [
        *unet_pairs(levels, attention),
        ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
    ]
    out = {f"model.diffusion_model.{k}": t for k, t in _rename(unet, pairs).items()}
    for key, t in _rename(vae, vae_pairs(levels)).items():
        square = ".attn_1." in key and t.ndim == 2
        out[f"first_stage_model.{key}"] = t[:, :, None, None] if square else t
    return {k: t.clone().contiguous() for k, t in (out | dict(texts)).items()}
