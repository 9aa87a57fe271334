"""Controls on both sides of a comparison: the same networks, pictures and settings, here and in diffusers.

Their layers are stages of scopes of their own, ``control.0/LAYER`` for the first control, in the first call only: at
every step a control is called before the UNet, whose call begins the step.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minidiff.adapters.control import Control, ControlModel
from minidiff.config import UNetConfig
from minidiff.errors import CheckpointError, UnsupportedError
from minidiff.models.t2i_adapter import T2IAdapter
from minidiff.parity import start_images, theirs
from minidiff.pipeline import StableDiffusion

Open = Callable[[str, StableDiffusion], ControlModel]


def asked(named: Sequence[Any], pipe: StableDiffusion, open_control: Open, width: int, height: int) -> list[Control]:
    """Return the controls of a run. ``named``: path, picture and settings of each; the pictures get the run's size."""
    return [
        Control(open_control(path, pipe), start_images.image(picture, width, height), **settings)
        for path, picture, settings in named
    ]


def folders(named: Sequence[Any], beside: Path, write_folder: Callable[[str, str], object]) -> list[str]:
    """Return each control as a folder that diffusers opens: itself, or one that is written to ``beside``."""
    found = []
    for k, (path, _, _) in enumerate(named):
        found.append(path if os.path.isdir(path) else str(beside / f"control{k}"))
        if found[-1] != path:
            write_folder(path, found[-1])
    return found


def steered(pipe: Any, controls: Sequence[Control], folders: Sequence[str], dtype: torch.dtype, device: Any) -> Any:
    """Return diffusers' pipeline of the kind of ``pipe``, with the controls in ``folders``.

    Raises :class:`UnsupportedError` for what none of its pipelines does, and :class:`CheckpointError` for a folder that
    it cannot open.
    """
    diffusers = theirs.import_diffusers()
    adapters = [_is_adapter(control) for control in controls]
    _check(controls, adapters)
    cls = diffusers.T2IAdapter if adapters[0] else diffusers.ControlNetModel
    nets = []
    for folder in folders:
        try:
            net = cls.from_pretrained(folder, torch_dtype=dtype, local_files_only=True).to(device)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            raise CheckpointError(f"{folder}: diffusers cannot open it ({e})") from None
        nets.append(theirs.aligned(net))
    kind = type(pipe).__name__
    try:
        if adapters[0]:
            xl = "XL" if "XL" in kind else ""
            several = nets[0] if len(nets) == 1 else diffusers.MultiAdapter(nets)
            found = getattr(diffusers, f"StableDiffusion{xl}AdapterPipeline").from_pipe(pipe, adapter=several)
        else:
            ways = {"Inpaint": "Inpainting", "Img2Img": "Image2Image"}
            way = next((name for part, name in ways.items() if part in kind), "Text2Image")
            auto = getattr(diffusers, f"AutoPipelineFor{way}")
            found = auto.from_pipe(pipe, controlnet=nets[0] if len(nets) == 1 else nets)
    except (ValueError, AttributeError) as e:
        raise UnsupportedError(f"diffusers has no pipeline for {kind} with these controls ({e})") from None
    found.set_progress_bar_config(disable=True)
    return found


def _check(controls: Sequence[Control], adapters: Sequence[bool]) -> None:
    """Raise :class:`UnsupportedError` for settings that diffusers does not have."""
    problem = None
    if len({*adapters}) > 1:
        problem = "ControlNets and T2I-Adapters in one run"
    if any(control.soft != 1 for control in controls):
        problem = "weights by depth (soft)"
    if len({control.guess for control in controls}) > 1 or (any(adapters) and any(c.guess for c in controls)):
        problem = "guess mode for a part of the controls, or for T2I-Adapters"
    if any(adapters) and any((control.low, control.high) != (0, 1) for control in controls):
        problem = "T2I-Adapters on a part of the way"
    if problem is not None:
        raise UnsupportedError(f"diffusers cannot run {problem}; compare recordings of two programs that can")


def _is_adapter(control: Control) -> bool:
    return isinstance(control.model.parts["control"], T2IAdapter)


def apart(controls: Sequence[Control], unet: UNetConfig) -> set[str]:
    """Return the UNet's blocks that cannot be compared: diffusers adds the feature of a level without attention to what
    its block returns, minidiff within the block."""
    if not any(map(_is_adapter, controls)):
        return set()
    return {f"down.{i}" for i, level in enumerate(unet.levels) if level.attention == "none"}


def options(controls: Sequence[Control], pipe: Any) -> dict[str, Any]:
    """Return the arguments for diffusers' ``pipe`` that say what ``controls`` do."""
    if not controls:
        return {}
    taken = inspect.signature(pipe.__call__).parameters

    def each(name: str) -> Any:
        values = [getattr(control, name) for control in controls]
        return values if len(values) > 1 else values[0]

    pictures = {"control_image" if "control_image" in taken else "image": each("picture")}
    if "adapter_conditioning_scale" in taken:
        return {**pictures, "adapter_conditioning_scale": each("weight")}
    return {
        **pictures,
        "controlnet_conditioning_scale": each("weight"),
        "control_guidance_start": each("low"),
        "control_guidance_end": each("high"),
        "guess_mode": controls[0].guess,
    }
