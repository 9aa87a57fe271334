"""Detection of the layout and family of a checkpoint, with the evidence.

They are recognized by a few files and keys that only one layout or family has; nothing is loaded. Unsupported families
are recognized as well, to be refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minidiff.config import quote
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.storage.checkpoint import is_control, is_minidiff
from minidiff.storage.files import Lazy
from minidiff.storage.reading import read_object
from weights_convert.keys_original import CLIP, CONTROL, GUIDANCE, UNET
from weights_convert.report import page
from weights_convert.single_schedule import evidence as marked
from weights_convert.tensors import read_tensors

Layout = Literal["minidiff", "diffusers", "original"]
TEXT_PIPELINES = (
    *(f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")),
    *(f"LatentConsistencyModel{kind}Pipeline" for kind in ("", "Img2Img")),
)
XL_PIPELINES = tuple(f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
UNCONDITIONAL_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
FLOW_PIPELINES = ("Flux", "StableDiffusion3", "AuraFlow", "Sana", "Lumina", "HiDream", "QwenImage", "Chroma")
FLOW_KEYS = ("joint_blocks.", "double_blocks.", "single_blocks.")
FLOW = "a flow model (SD3, Flux and the like), which minidiff does not support: it has UNets trained on noise schedules"
INPUT_BLOCK = re.compile(rf"{re.escape(UNET)}\.input_blocks\.(\d{{1,4}})\.")
TEXT_FAMILIES = ("sd1", "sd2", "sdxl", "sdxl-refiner")
CONVERTED: dict[Layout, tuple[str, ...]] = {
    "diffusers": ("ddpm", *(f"{f}{kind}" for f in TEXT_FAMILIES for kind in ("", "-inpainting", "-lcm"))),
    "original": (
        *(f"{f}{kind}" for f in TEXT_FAMILIES for kind in ("", "-lcm")),
        *(f"{f}-inpainting" for f in TEXT_FAMILIES[:3]),
    ),
}


# Controls: the class in a folder's config.json, and a key that only such a file has.
CONTROLS = {"ControlNetModel": "controlnet", "T2IAdapter": "t2i-adapter"}
CONTROL_KEYS: dict[str, tuple[str, Layout, str]] = {  # -> what it is, its layout, the prefix of its keys
    f"{CONTROL}.input_hint_block.0.weight": ("controlnet", "original", CONTROL),
    "input_hint_block.0.weight": ("controlnet", "original", ""),
    "controlnet_cond_embedding.conv_in.weight": ("controlnet", "diffusers", ""),
    "body.0.block1.weight": ("t2i-adapter", "original", ""),
    "body.0.body.0.block1.weight": ("t2i-adapter", "original", ""),
    "adapter.body.0.resnets.0.block1.weight": ("t2i-adapter", "diffusers", "adapter"),
}


@dataclass
class Found:
    """Contents of a path; ``index`` is a folder's model_index.json, ``tensors`` a single file's."""

    path: Path
    layout: Layout
    family: str
    evidence: list[str]
    index: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Lazy] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)  # entries of a pickle that are not tensors
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors header

    @property
    def is_control(self) -> bool:
        """True for a ControlNet or a T2I-Adapter."""
        return self.family in CONTROLS.values()

    def __str__(self) -> str:
        lines = [("path", str(self.path)), ("layout", self.layout), ("family", self.family)]
        return page(lines + [("", f"because {e}") for e in self.evidence])


def detect(path: str | os.PathLike[str]) -> Found:
    """Detect the layout and family of ``path``.

    Raises :class:`CheckpointError` for a path that is missing, damaged or no known checkpoint, with its most
    significant keys, and :class:`UnsupportedError` for flow models and other kinds of pipelines, by name.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    raise CheckpointError(f"{path}: no such file or folder")


def _folder(path: Path) -> Found:
    if (path / "model_index.json").exists():
        index = read_object(path / "model_index.json")
        return Found(path, "diffusers", *_pipeline_family(path, index), index)
    if not (path / "config.json").exists():
        names = ", ".join(sorted(p.name for p in path.iterdir())[:4]) or "nothing"
        raise CheckpointError(f"{path}: a folder with {names}, but no model_index.json or config.json: not a model")
    kind = read_object(path / "config.json").get("_class_name")
    if kind in CONTROLS:
        return Found(path, "diffusers", CONTROLS[kind], [f"config.json is that of a {kind}"])
    if kind == "UNet2DModel":
        return Found(path, "diffusers", "ddpm", ["config.json is that of a UNet2DModel"], {"unet": ["diffusers", kind]})
    raise CheckpointError(
        f"{path}: a single component ({kind or 'of an unknown class'}); name the pipeline's folder around it"
    )


def _pipeline_family(path: Path, index: Mapping[str, Any]) -> tuple[str, list[str]]:
    pipeline = str(index.get("_class_name"))[:100]
    evidence = [f"model_index.json names {pipeline}"]
    if pipeline in UNCONDITIONAL_PIPELINES:
        return "ddpm", evidence
    if pipeline.startswith(FLOW_PIPELINES) or index.get("transformer") is not None:
        raise UnsupportedError(f"{path}: {pipeline} is {FLOW}")
    if pipeline not in (*TEXT_PIPELINES, *XL_PIPELINES):
        raise UnsupportedError(f"{path}: model_index.json names {pipeline}, which minidiff does not convert")
    unet = read_object(path / "unet" / "config.json")
    channels, linear = unet.get("in_channels", 4), unet.get("use_linear_projection", False)
    guidance = unet.get("time_cond_proj_dim")
    if pipeline in XL_PIPELINES:
        alone = index.get("text_encoder") in (None, [None, None])
        evidence.append(f"it has {'no first' if alone else 'a first'} text encoder; in_channels={channels} in its UNet")
        family = "sdxl-refiner" if alone else "sdxl"
    else:
        evidence.append(f"unet/config.json has use_linear_projection={linear}, in_channels={channels}")
        family = "sd2" if linear else "sd1"
    if guidance is not None:
        evidence.append(f"its UNet reads the guidance scale: time_cond_proj_dim={guidance}")
    # The reader of the config reports anything that is not a number.
    return _variant(family, channels if isinstance(channels, int) else 4, guidance is not None), evidence


def _variant(family: str, channels: int, guidance: bool = False) -> str:
    """Return the variant of a family by its input channels.

    A UNet of 9 channels also reads a mask and the masked picture, one of 8 a second picture. ``guidance``: a distilled
    UNet that reads the guidance scale (LCM).
    """
    kind = {4: family, 9: f"{family}-inpainting"}.get(channels, f"{family} with {channels} channels")
    return f"{kind}-lcm" if guidance else kind


def _file(path: Path) -> Found:
    tensors, metadata, others = read_tensors(path)
    if is_minidiff(metadata):
        family = CONTROLS["ControlNetModel"] if is_control(metadata) else "minidiff"
        return Found(path, "minidiff", family, ["its header is minidiff's"], metadata=metadata)
    if "lora_controlnet" in tensors:
        raise UnsupportedError(f"{path}: a Control-LoRA, the difference of a ControlNet from its model; it is not read")
    control = next((key for key in CONTROL_KEYS if key in tensors), None)
    if control is not None:
        family, layout, _ = CONTROL_KEYS[control]
        evidence = [f"has {quote(control)}"]
        return Found(path, layout, family, evidence, tensors=tensors, others=others, metadata=metadata)
    family, evidence = _key_family(path, tensors)
    return Found(path, "original", family, evidence, tensors=tensors, others=others, metadata=metadata)


def family_of_control(tensors: Mapping[str, Lazy]) -> tuple[str, str] | None:
    """Return what kind of control these tensors are, and the prefix of its keys; None for no control."""
    return next(((what, root) for key, (what, _, root) in CONTROL_KEYS.items() if key in tensors), None)


def _key_family(path: Path, tensors: Mapping[str, Lazy]) -> tuple[str, list[str]]:
    """Return the family of a single file, by keys that no other family has."""

    def first(*prefixes: str) -> str | None:
        return next((k for k in tensors if k.startswith(prefixes)), None)

    flow = next((k for k in tensors if any(f in k for f in FLOW_KEYS)), None)
    if flow:
        raise UnsupportedError(f"{path}: has {quote(flow)}, so it is {FLOW}")
    unet, sizes = tensors.get(f"{UNET}.input_blocks.0.0.weight"), first(f"{UNET}.label_emb.")
    alone = first("conditioner.embedders.0.model.")  # OpenCLIP first: SDXL's refiner, else SD-Turbo
    clues = {
        "sdxl": first("conditioner.embedders.1."),
        "sdxl-refiner": alone if sizes else None,
        "sd2": alone or first("cond_stage_model.model."),
        "sd1": first(f"{CLIP}."),
    }
    family = next((f for f, key in clues.items() if key), None)
    if unet is None or len(unet.shape) != 4:
        shown = ", ".join(map(quote, sorted(tensors)[:4])) or "none"
        raise CheckpointError(
            f"{path}: unknown family; its {len(tensors)} keys begin with {shown}. Known: Stable Diffusion "
            f"1 with {UNET}.*, first_stage_model.* and {CLIP}.*; for other layouts convert a diffusers folder"
        )
    evidence = [f"its UNet takes {unet.shape[1]} channels"]
    if family is None:
        family, why = _unet_family(tensors, sized=sizes is not None)
        evidence.insert(0, f"its UNet {why}; it has no text encoder")
    else:
        evidence.insert(0, f"has {quote(clues[family])}")
    if family == "sd2" and alone is not None:
        evidence.append("its UNet reads no sizes, so it is a relative of SD-Turbo, not of SDXL's refiner")
    guidance = first(f"{UNET}.{GUIDANCE}.")
    if guidance is not None:
        evidence.append(f"its UNet reads the guidance scale: has {quote(guidance)}")
    return _variant(family, unet.shape[1], guidance is not None), evidence + marked(tensors)


def _unet_family(tensors: Mapping[str, Lazy], *, sized: bool) -> tuple[str, str]:
    """Return the family of a UNet without its text encoder, with the evidence; ``sized``: it reads sizes."""
    last = max(int(m[1]) for k in tensors if (m := INPUT_BLOCK.match(k)))
    attends = f"{UNET}.input_blocks.{last}.1.proj_in.weight" in tensors
    if sized:
        if attends:
            return "sdxl", "reads sizes, and text at its coarsest level"
        return "sdxl-refiner", "reads sizes, and no text at its coarsest level"
    projections = (t for k, t in tensors.items() if k.startswith(f"{UNET}.") and k.endswith(".proj_in.weight"))
    linear = any(len(t.shape) == 2 for t in projections)
    return ("sd2", "has linear projections") if linear else ("sd1", "has convolutions as projections")
