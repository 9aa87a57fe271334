"""Translation of an original single file (the layout of CompVis and Stability, ``.safetensors`` or ``.ckpt``).

The numbers of heads and norm groups, which a file does not contain, follow the rule of its family (for scheduler and
prediction type see ``single_schedule.py``).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from minidiff.config import VAE_SDXL, ModelConfig, VAEConfig, from_json
from minidiff.errors import CheckpointError, ConfigError
from minidiff.samplers import sampler_from_diffusers, sampler_to_config, schedule_from_diffusers
from minidiff.storage.checkpoint import build
from minidiff.storage.files import Lazy
from weights_convert import keys_diffusers, openclip, single_schedule
from weights_convert import keys_original as keys
from weights_convert import shapes_original as shapes
from weights_convert.engine import Drop, Pair, expand, translate
from weights_convert.overlay import merge
from weights_convert.report import Report, Source
from weights_convert.swap import Swaps, config_of


@dataclass(frozen=True)
class Text:
    """Text encoder inside a single file: its prefix, whether it is OpenCLIP's, and whether its pooled output is read.

    ``tokenizer``: fields of its TokenizerConfig.
    """

    root: str
    open_clip: bool = False
    pooled: bool = False
    tokenizer: dict[str, Any] = field(default_factory=dict)


EMBEDDERS = "conditioner.embedders"
# The text encoders of a family, by part.
TEXTS: dict[str, dict[str, Text]] = {
    "sd1": {"text_encoder": Text(keys.CLIP)},
    "sd2": {"text_encoder": Text("cond_stage_model.model", open_clip=True, tokenizer={"pad": 0})},
    "sdxl": {
        "text_encoder": Text(f"{EMBEDDERS}.0.transformer"),
        "text_encoder_2": Text(f"{EMBEDDERS}.1.model", open_clip=True, pooled=True, tokenizer={"pad": 0}),
    },
    "sdxl-refiner": {
        "text_encoder_2": Text(f"{EMBEDDERS}.0.model", open_clip=True, pooled=True, tokenizer={"pad": 0}),
    },
}
TURBO = {"text_encoder": Text(f"{EMBEDDERS}.0.model", open_clip=True, tokenizer={"pad": 0})}  # as in SD2
HEAD = 64  # channels per head in SD2 and SDXL; SD1 has eight heads everywhere
LEVELS = Drop("noise levels", r"denoiser\.sigmas", "a table that follows from the schedule's settings")
LAST_STEP = Drop("last training step", rf"{keys.UNET}\..*", "the running average was requested, and is used instead")


def read_original(
    tensors: Mapping[str, Lazy],
    report: Report,
    *,
    ema: bool = False,
    override: Mapping[str, Any] | None = None,
    given: Swaps | None = None,
) -> Source:
    """Read a single file of any family as minidiff's config and tensors; every key is accounted for.

    ``ema`` takes the running average of the UNet instead of the weights of the last training step. For a part that the
    file lacks, the config is taken from ``given`` here, and the tensors when parts are replaced. Raises
    :class:`CheckpointError` for keys or shapes that do not fit, for a part that is missing everywhere, and for ``ema``
    if the file has no average, and :class:`ConfigError` for settings in neither the file nor ``override``.
    """
    where, family = report.source, report.family.removesuffix("-inpainting").removesuffix("-lcm")
    texts = TURBO if single_schedule.is_turbo(tensors, family) else TEXTS[family]
    roots = {"vae": keys.VAE, **{name: text.root for name, text in texts.items()}}
    absent = [name for name, root in roots.items() if not any(k.startswith(f"{root}.") for k in tensors)]
    sources = {name: Path(path) for name in absent if (path := (given or {}).get(name)) is not None}
    _require(absent, sources, where)
    config = _config(tensors, report, texts, override or {}, sources)
    lacking = config.vae is None or any(getattr(config, name) is None for name in texts)
    if lacking or ("vae" not in absent and not isinstance(config.vae, VAEConfig)):
        raise ConfigError(f"config: a text-to-image model needs vae and {', '.join(texts)}, and one of them is null")
    single_schedule.check_table(tensors, config.schedule, where)
    parts = build(config)
    model = nn.ModuleDict(parts)
    here = {name: text for name, text in texts.items() if name not in absent}
    prefixes = {name: _prefix(tensors, text) for name, text in here.items()}
    pairs = key_pairs(config, here, prefixes, vae="vae" not in absent)
    drops: tuple[Drop, ...] = (*keys.DROPS, LEVELS, single_schedule.MARKERS_DROP)
    for name, text in here.items():
        if text.open_clip:
            drops += openclip.drops(text.root, getattr(config, name).layers)
    pairs, drops = _choose_weights(pairs, drops, tensors, report, ema)
    part = translate(pairs, tensors, model, where=where, drops=drops)
    report.mapped = {name: sum(k.startswith(f"{name}.") for k in part.tensors) for name in parts}
    report.drop(part.dropped)
    report.notes += [
        f"noise schedule and sampler ({config.sampler['name']}), heads and norm groups follow the family's rule, as a "
        "single file has none",
        "tokenizer: the public CLIP table, which ships with minidiff",
    ]
    for name, text in here.items():
        layers = getattr(config, name).layers
        unread = f"{text.root}.transformer.resblocks.{layers}."
        if text.open_clip and not text.pooled and not any(k.startswith(unread) for k in tensors):
            report.notes.append(f"{name}: all {layers} layers are read; the last of OpenCLIP's is not in the file")
    if texts is TURBO and "sampler" not in (override or {}):
        name = config.sampler["name"]
        report.notes.append(
            f"sampler: {name} as SD-Turbo needs it, the only known model with this layout; --sampler chooses another"
        )
    return Source(config, part.tensors, report)


def _require(absent: Iterable[str], given: Container[str], where: str) -> None:
    """Raise :class:`CheckpointError` for parts that are neither in the file nor given."""
    missing = [name for name in absent if name not in given]
    if missing:
        words = " and the ".join("VAE" if name == "vae" else name.replace("_", " ") for name in missing)
        options = " ".join(f"--{name.replace('_', '-')} PATH" for name in missing)
        python = ", ".join(f"{name!r}: PATH" for name in missing)
        raise CheckpointError(
            f"{where}: the {words} {'is' if len(missing) == 1 else 'are'} missing; name where to take what is missing "
            f"from with {options} (swap={{{python}}} in Python)"
        )


def key_pairs(
    config: ModelConfig, texts: Mapping[str, Text], prefixes: Mapping[str, str], *, vae: bool = True
) -> list[Pair]:
    """Return the map of a whole file; ``prefixes`` of transformers' encoders, "text_model." by default.

    ``vae`` False: for a file without the autoencoder.
    """
    modules = {"unet": keys.unet(config.unet)}
    if vae:
        assert isinstance(config.vae, VAEConfig)
        modules["vae"] = keys.vae(config.vae)
    pairs: list[Pair] = []
    for name, text in texts.items():
        encoder = getattr(config, name)
        if text.open_clip:
            pairs += openclip.pairs(encoder, text.root, name)
        else:
            modules[name] = keys_diffusers.clip(encoder, prefix=f"{text.root}.{prefixes.get(name, 'text_model.')}")
    parts = build(config)
    named = nn.ModuleDict({name: parts[name] for name in modules})
    return pairs + expand([m._replace(ours=f"{part}.{m.ours}") for part, ms in modules.items() for m in ms], named)


def _prefix(tensors: Mapping[str, Lazy], text: Text) -> str:
    """Return the prefix of a transformers encoder: "text_model." in most files, but not in all."""
    return "text_model." if f"{text.root}.text_model.final_layer_norm.weight" in tensors else ""


def _config(
    tensors: Mapping[str, Lazy],
    report: Report,
    texts: Mapping[str, Text],
    override: Mapping[str, Any],
    sources: Mapping[str, Path],
) -> ModelConfig:
    """Return the config from shapes, the family's rule, the user's corrections, and ``sources`` of absent parts."""
    where, family = report.source, report.family
    xl, first = family.startswith("sdxl"), family.startswith("sd1")
    scheduler = single_schedule.scheduler(tensors, family, override, where)
    unet = shapes.unet(tensors, where, None if first else HEAD)
    rule: dict[str, Any] = {}
    if xl:
        unet["sample_size"] = 128
        rule = {"scaling_factor": VAE_SDXL.scaling_factor, "sample_size": VAE_SDXL.sample_size, "upcast": True}
    elif not first and scheduler["prediction_type"] == "v_prediction":
        unet |= {"sample_size": 96, "upcast_attention": True}
        rule = {"sample_size": 768}
    fields: dict[str, Any] = {
        "family": family,
        "unet": unet,
        "vae": config_of(sources["vae"], "vae", rule) if "vae" in sources else shapes.vae(tensors, where) | rule,
        "schedule": asdict(schedule_from_diffusers(scheduler)),
        "sampler": sampler_to_config(sampler_from_diffusers(scheduler)),
        "text_layer": "penultimate" if xl else "last",
        "zero_empty": xl and family != "sdxl-refiner",
    }
    for name, text in texts.items():
        fields[name.replace("text_encoder", "tokenizer")] = text.tokenizer
        if name in sources:
            of_family = {"activation": "gelu"} if text.open_clip else {}
            fields[name] = config_of(sources[name], name, of_family, open_clip=text.open_clip)
        elif text.open_clip:
            fields[name] = openclip.shapes(tensors, text.root, where, pooled=text.pooled)
        else:
            fields[name] = shapes.clip(tensors, where, _prefix(tensors, text), text.root)
    try:
        return from_json(ModelConfig, merge(fields, override))
    except ConfigError as e:
        if override:
            raise
        raise CheckpointError(
            f"{where}: {e}; if it is a relative of {family}, config= says what shapes can't tell"
        ) from None


def _choose_weights(
    pairs: list[Pair], drops: tuple[Drop, ...], tensors: Mapping[str, Lazy], report: Report, ema: bool
) -> tuple[list[Pair], tuple[Drop, ...]]:
    """Choose the plain weights or the running average, and report the choice."""
    averaged = any(k.startswith(f"{keys.EMA}.") for k in tensors)
    if ema and not averaged:
        raise CheckpointError(f"{report.source}: has no EMA weights ({keys.EMA}.*); convert it without --ema")
    if not ema:
        if averaged:
            report.notes.append("UNet: the weights of the last training step; EMA weights are there too (--ema)")
        return pairs, drops
    report.notes.append("UNet: the EMA weights, as requested")
    chosen = [p._replace(theirs=keys.ema_key(p.theirs)) if p.ours.startswith("unet.") else p for p in pairs]
    return chosen, (LAST_STEP, keys.EMA_COUNTERS, *(d for d in drops if d is not keys.EMA_COPY))
