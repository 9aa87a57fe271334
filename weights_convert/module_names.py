"""Which module of minidiff is which of diffusers and transformers: the key maps, read as pairs of modules."""

from __future__ import annotations

from minidiff.config import ModelConfig
from weights_convert import keys_diffusers as keys


def module_names(config: ModelConfig) -> dict[str, dict[str, str]]:
    """part -> {minidiff's name: the reference's}, for every module that may hold weights.

    The names are those that the installed diffusers and transformers give their modules, whatever the checkpoint's
    keys look like. A map also names what a model may lack, such as the ``skip`` of a ResBlock of one width.
    """
    maps = {"unet": keys.unet(config.unet)}
    if config.vae is not None:
        maps["vae"] = keys.vae(config.vae)
    if config.text_encoder is not None:
        maps["text_encoder"] = keys.clip(config.text_encoder, prefix="")
    return {part: {m.ours: m.theirs for m in modules} for part, modules in maps.items()}
