"""A graph of ComfyUI, text to picture, as its API format has it."""

from __future__ import annotations

from typing import Any


def text_to_picture(text: str, width: int, height: int, **sampler: Any) -> dict[str, Any]:
    """Return nodes "3" to "8" of a graph, with "fog" as the negative text and ``sampler`` as further inputs of the
    KSampler. Its model comes from node "10" and the encoder of its texts from node "11", which the caller adds."""
    links = {"model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    inputs: dict[str, dict[str, Any]] = {
        "KSampler": {"denoise": 1, **sampler, **links},
        "CheckpointLoaderSimple": {"ckpt_name": "v1-5.safetensors"},
        "EmptyLatentImage": {"batch_size": 1, "height": height, "width": width},
        "CLIPTextEncode": {"clip": ["11", 0], "text": text},
        "VAEDecode": {"samples": ["3", 0], "vae": ["4", 2]},
    }
    kinds = ("KSampler", "CheckpointLoaderSimple", "EmptyLatentImage", "CLIPTextEncode", "CLIPTextEncode", "VAEDecode")
    graph = {str(n): {"class_type": kind, "inputs": dict(inputs[kind])} for n, kind in enumerate(kinds, start=3)}
    graph["7"]["inputs"]["text"] = "fog"
    return graph
