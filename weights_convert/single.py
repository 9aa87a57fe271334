"""The original single file of Stable Diffusion 1 (CompVis' layout, ``.safetensors`` or ``.ckpt``), translated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from minidiff.checkpoint import build
from minidiff.config import ModelConfig, VAEConfig, from_json
from minidiff.errors import CheckpointError, ConfigError
from minidiff.files import Lazy
from minidiff.samplers import sampler_from_diffusers, sampler_to_config, schedule_from_diffusers
from minidiff.schedule import NoiseSchedule
from weights_convert import keys_original as keys
from weights_convert import shapes_original as shapes
from weights_convert.engine import Drop, Pair, expand, translate
from weights_convert.overlay import merge
from weights_convert.report import Report, Source

# A single file says nothing of its scheduler; this is the one that Stable Diffusion 1 was published with.
SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SCHEDULE_ROUNDING = 5e-3  # a table in bfloat16 is up to 2e-3 from ours, a zero-SNR one 3.5e-2
LAST_STEP = Drop("last training step", rf"{keys.UNET}\..*", "the running average was asked for, and taken instead")


def read_original(
    tensors: Mapping[str, Lazy], report: Report, *, ema: bool = False, override: Mapping[str, Any] | None = None
) -> Source:
    """A single file of family SD1 as minidiff's config and tensors; every key of it is accounted for.

    ``ema`` takes the running average of the UNet instead of the weights of the last training step. Raises
    :class:`CheckpointError` for keys or shapes that do not fit and for ``ema`` where the file has no average.
    """
    where = report.source
    prefix = "text_model." if f"{keys.CLIP}.text_model.final_layer_norm.weight" in tensors else ""
    config = _config(tensors, where, prefix, override or {})
    if not isinstance(config.vae, VAEConfig) or config.text_encoder is None:
        raise ConfigError("config: a text-to-image model needs vae and text_encoder, and one of them is null")
    _check_schedule(tensors, config, where)
    modules = {
        "unet": keys.unet(config.unet),
        "vae": keys.vae(config.vae),
        "text_encoder": keys.clip(config.text_encoder, prefix=prefix),
    }
    parts = build(config)
    model = nn.ModuleDict(parts)
    pairs = expand([m._replace(ours=f"{part}.{m.ours}") for part, ms in modules.items() for m in ms], model)
    pairs, drops = _choose_weights(pairs, tensors, report, ema)
    part = translate(pairs, tensors, model, where=where, drops=drops)
    report.mapped = {name: sum(k.startswith(f"{name}.") for k in part.tensors) for name in parts}
    report.drop(part.dropped)
    report.notes += [
        "noise schedule and sampler (PNDM), heads and norm groups follow the family's rule, as a single file has none",
        "tokenizer: the public CLIP table, which minidiff ships",
    ]
    return Source(config, part.tensors, report)


def _config(tensors: Mapping[str, Lazy], where: str, prefix: str, override: Mapping[str, Any]) -> ModelConfig:
    """What the shapes tell, what the family's rule adds, and what the user corrects."""
    fields = {
        "family": "sd1",
        "unet": shapes.unet(tensors, where),
        "vae": shapes.vae(tensors, where),
        "text_encoder": shapes.clip(tensors, where, prefix),
        "tokenizer": {},
        "schedule": asdict(schedule_from_diffusers(SD1_SCHEDULER)),
        "sampler": sampler_to_config(sampler_from_diffusers(SD1_SCHEDULER)),
    }
    try:
        return from_json(ModelConfig, merge(fields, override))
    except ConfigError as e:
        if override:
            raise
        raise CheckpointError(
            f"{where}: {e}; if it is a relative of SD1, config= says what shapes can't tell"
        ) from None


def _check_schedule(tensors: Mapping[str, Lazy], config: ModelConfig, where: str) -> None:
    """A file that carries the noise table of its training must not be run with another one."""
    stored = tensors.get("alphas_cumprod")
    if stored is None:
        return
    ours = NoiseSchedule.from_config(config.schedule).alphas_cumprod
    gap = float((stored.load().float() - ours).abs().max()) if stored.shape == ours.shape else float("inf")
    if not gap <= SCHEDULE_ROUNDING:
        raise CheckpointError(
            f"{where}: its noise table (alphas_cumprod) differs from the schedule's by {gap:.3g}; say what it was "
            'trained with, such as config={"schedule": {"zero_snr": true, "prediction": "v_prediction"}}'
        )


def _choose_weights(
    pairs: list[Pair], tensors: Mapping[str, Lazy], report: Report, ema: bool
) -> tuple[list[Pair], tuple[Drop, ...]]:
    """The plain weights or the running average; says which, and that there was a choice."""
    averaged = any(k.startswith(f"{keys.EMA}.") for k in tensors)
    if ema and not averaged:
        raise CheckpointError(f"{report.source}: has no EMA weights ({keys.EMA}.*); convert it without --ema")
    if not ema:
        if averaged:
            report.notes.append("UNet: the weights of the last training step; EMA weights are there too (--ema)")
        return pairs, keys.DROPS
    report.notes.append("UNet: the EMA weights, as asked")
    chosen = [p._replace(theirs=keys.ema_key(p.theirs)) if p.ours.startswith("unet.") else p for p in pairs]
    return chosen, (LAST_STEP, keys.EMA_COUNTERS, *(d for d in keys.DROPS if d is not keys.EMA_COPY))
