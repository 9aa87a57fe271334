"""The run of the installed diffusers, stage by stage, under the names of ``ours.py``.

Its own pipeline runs from prompt to pixels, as a user would start it; the networks are observed by hooks, and the
scheduler by wrapping its methods. diffusers is imported here, only when the comparison is requested.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.errors import CheckpointError, MinidiffError, UnsupportedError
from minidiff.parity.ours import Asked
from minidiff.parity.stages import Deep, Names, first_step_only, show_noising, show_plan, watched
from minidiff.parity.taps import Probe, Tap, in_float64, swap_first
from minidiff.samplers import SAMPLERS, check_name
from minidiff.samplers.diffusers.classes import READERS

PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")
# Samplers that share a diffusers class with another, and the option that selects them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {"noise_sampler_seed": 0}),  # without a seed it takes a random one
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
}


def import_diffusers() -> Any:
    """Import diffusers, silenced. Raises :class:`UnsupportedError` if it or a dependency is not installed."""
    try:
        import diffusers
        import transformers
    except ImportError as e:
        raise UnsupportedError(
            f"the comparison needs diffusers and transformers, and {e.name or e} is not installed: pip install "
            "'minidiff[parity]'; without them, compare two recordings (`minidiff parity compare --help`)"
        ) from None
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers


def open_pipeline(folder: str | os.PathLike[str], dtype: torch.dtype, device: torch.device | str) -> Any:
    """Open a diffusers folder without downloads. Raises :class:`CheckpointError` if diffusers cannot open it."""
    diffusers = import_diffusers()
    options = {"dtype": dtype, "local_files_only": True}
    try:
        if (Path(folder) / "model_index.json").is_file():
            index = diffusers.DiffusionPipeline.load_config(folder, local_files_only=True)
            safety = {"safety_checker": None} if "safety_checker" in index else {}
            pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options, **safety)
        else:  # the published ddpm-* checkpoints have no index
            unet = diffusers.UNet2DModel.from_pretrained(folder, **options)
            file = Path(folder) / "scheduler_config.json"
            scheduler = diffusers.DDPMScheduler.from_pretrained(folder) if file.is_file() else diffusers.DDPMScheduler()
            pipe = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as e:
        raise CheckpointError(f"{folder}: diffusers cannot open it ({e})") from None
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    for part in parts_of(pipe).values():
        aligned(part)
    return pipe


def aligned(part: Any) -> Any:
    """Return ``part`` with its weights copied.

    A matrix that is mapped from a file may not be aligned to a cache line, and then its product with a vector is summed
    in another order. A copy is aligned as in any program that allocates its weights.
    """
    for parameter in part.parameters():
        parameter.data = parameter.data.clone()
    return part


def change_scheduler(pipe: Any, name: str) -> tuple[Any, dict[str, Any]]:
    """Set diffusers' scheduler for minidiff's sampler ``name``; return ``pipe`` and the config of the sampler.

    Raises :class:`ConfigError` for a name that is not known.
    """
    check_name(name, settable=False)
    found = (cls for cls, reader in READERS.items() if reader.sampler is SAMPLERS[name])
    cls, options = VARIANTS.get(name) or (next(found), {})
    scheduler = getattr(import_diffusers(), cls)
    try:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    except (ValueError, TypeError, NotImplementedError, ImportError) as e:
        raise UnsupportedError(f"diffusers cannot run {name} ({cls}) with this checkpoint's schedule ({e})") from None
    config = {**pipe.scheduler.config, "_class_name": cls}
    if name == "pndm" and not hasattr(pipe, "text_encoder"):  # DDPMPipeline hands its steps what PNDM does not take
        pipe = import_diffusers().PNDMPipeline(unet=pipe.unet, scheduler=pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
    return pipe, config


def taking_a_picture(pipe: Any, *, masked: bool) -> Any:
    """Return ``pipe``, or the pipeline of its kind that starts from a picture (``masked`` or whole), sharing its parts.

    Raises :class:`UnsupportedError` if there is none.
    """
    if ("mask_image" if masked else "image") in inspect.signature(pipe.__call__).parameters:
        return pipe
    diffusers = import_diffusers()
    kind = diffusers.AutoPipelineForInpainting if masked else diffusers.AutoPipelineForImage2Image
    try:
        found = kind.from_pipe(pipe)
    except ValueError as e:
        raise UnsupportedError(f"diffusers cannot begin from a picture with this checkpoint ({e})") from None
    found.set_progress_bar_config(disable=True)
    return found


@dataclass
class Theirs:
    """diffusers as a side: ``pipe`` runs ``request``. ``names``: {part: {module's name there: the stage's}}."""

    pipe: Any
    request: Asked
    names: Names
    deep: Deep = first_step_only
    title: str = "diffusers"
    steering: Mapping[str, Any] = field(default_factory=dict)  # what the pipeline is told about controls

    def run(self, tap: Tap) -> None:
        """Run from prompt to pixels."""
        try:
            self._run(Probe(tap, self.deep))
        except MinidiffError:
            raise
        except Exception as e:  # another project's code may raise anything
            raise UnsupportedError(f"diffusers cannot run this ({type(e).__name__}: {e})") from e

    def _run(self, probe: Probe) -> None:
        pipe, r = self.pipe, self.request
        generator = torch.Generator().manual_seed(int(str(r.seed)))
        with torch.no_grad(), watched(probe, parts_of(pipe), self.names), shown(pipe.scheduler, probe):
            taken = inspect.signature(pipe.__call__).parameters
            options: dict[str, Any] = {"num_inference_steps": r.steps, "generator": generator}
            options |= {"eta": r.eta} if "eta" in taken else {}
            if hasattr(pipe, "text_encoder"):
                size = {"height": r.height, "width": r.width} if "height" in taken else {}  # else the picture's
                picture = {"image": r.image, "strength": r.taken_strength} if r.image is not None else {}
                options |= size | picture | ({"mask_image": r.mask} if r.mask is not None else {})
                options |= self.steering
                texts: dict[str, Any] = {
                    "prompt": r.prompt,
                    "negative_prompt": r.negative_prompt,
                    "guidance_scale": r.guidance_scale,
                }
                pixels = picture_of(pipe, {**texts, **options})
            else:
                images = pipe(batch_size=1, **options, output_type="np").images
                pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        probe.scope = "decode"
        probe.show("pixels", pixels)

    @contextmanager
    def wide(self) -> Iterator[None]:
        """Return a context with every part in float64, also the VAE, which SDXL's pipelines move to float32."""
        vae: Any = getattr(self.pipe, "vae", None)
        upcast = getattr(vae, "config", {}).get("force_upcast", False)
        with in_float64(parts_of(self.pipe).values()):
            if upcast:
                vae.register_to_config(force_upcast=False)
            try:
                yield
            finally:
                if upcast:
                    vae.register_to_config(force_upcast=True)


def picture_of(pipe: Any, options: Mapping[str, Any]) -> Tensor:
    """Return what a pipeline makes, (B, 3, H, W) in [0, 1].

    That for T2I-Adapters of Stable Diffusion decodes in a way of its own, with the reciprocal of the VAE's factor; its
    latents are decoded as by all others.
    """
    if type(pipe).__name__ != "StableDiffusionAdapterPipeline":
        pixels: Tensor = pipe(**options, output_type="pt").images
        return pixels
    latents = pipe(**options, output_type="latent").images
    raw: Tensor = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return (raw * 0.5 + 0.5).clamp(0, 1)


def parts_of(pipe: Any) -> dict[str, Any]:
    """Return the networks of a pipeline by name, with its controls."""
    found = {name: getattr(pipe, name) for name in PARTS if getattr(pipe, name, None) is not None}
    beside: Any = getattr(pipe, "controlnet", None) or getattr(pipe, "adapter", None)
    several = getattr(beside, "nets", None) or getattr(beside, "adapters", None) or [beside] * (beside is not None)
    return found | {f"control.{k}": net for k, net in enumerate(several)}


@contextmanager
def shown(scheduler: Any, probe: Probe) -> Iterator[None]:
    """Show a scheduler's plan and steps by wrapping its methods, with the signatures that the pipeline inspects."""
    calls = itertools.count()

    def set_timesteps(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        call(*args, **kwargs)
        show_plan(probe, _Plan(scheduler))

    def add_noise(call: Callable[..., Tensor], latents: Tensor, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return show_noising(probe, lambda latents, noise: call(latents, noise, *args, **kwargs), latents, noise)

    def step(call: Callable[..., Any], out: Tensor, t: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:  # the pipeline has not shown the first sample before
            x = probe.show("x", x, "start")
        result = call(probe.show("out", out), t, x, *args, **kwargs)
        return swap_first(result, lambda new: probe.show("x", new))[0]

    observers: dict[str, Callable[..., Any]] = {"set_timesteps": set_timesteps, "add_noise": add_noise, "step": step}
    for name, observer in observers.items():
        setattr(scheduler, name, _observed(getattr(scheduler, name), observer))
    try:
        yield
    finally:
        for name in observers:
            delattr(scheduler, name)  # restores the method of the class


class _Plan:
    """View of a scheduler's plan under minidiff's names."""

    def __init__(self, scheduler: Any) -> None:
        self.timesteps = scheduler.timesteps
        self.init_noise_sigma = torch.as_tensor(scheduler.init_noise_sigma)
        self.sigmas = getattr(scheduler, "sigmas", None)


def _observed(method: Callable[..., Any], observer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(method).bind(*args, **kwargs)
        return observer(method, *bound.args, **bound.kwargs)

    return call


def renamed(names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Invert {part: {minidiff's name: the reference's}}: return the stage of each module of the reference."""
    return {part: {theirs: ours for ours, theirs in pairs.items()} for part, pairs in names.items()}
