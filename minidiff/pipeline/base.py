"""Base class of the pipelines: the model's parts on a device, and the way from a request to a result.

    Request --job--> Job --denoise--> Step ... Step --finish--> pixels

Its two subclasses, with text and without, say what conditions the model and what a run begins from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from minidiff import programs
from minidiff.config import ModelConfig, check
from minidiff.errors import CheckpointError
from minidiff.models.unet import UNet
from minidiff.pipeline import assembly
from minidiff.pipeline.denoise import Progress, Run
from minidiff.pipeline.guidance import Conditioned
from minidiff.pipeline.images import Opened, Pictures
from minidiff.pipeline.job import Job
from minidiff.pipeline.latents import FirstSample, Sample
from minidiff.pipeline.png import label, to_pil, to_unit
from minidiff.pipeline.recipe import Made, Recipe
from minidiff.pipeline.request import Output, Request, options
from minidiff.pipeline.rows import choose_rows, unguided
from minidiff.precision import apply_policy, check_finite
from minidiff.programs import Program, img2img
from minidiff.programs.program_sampler import ProgramSampler
from minidiff.programs.streams import Streams
from minidiff.samplers.method import Sampler
from minidiff.schedule import NoiseSchedule
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy, lazy
from minidiff.storage.identity import identify
from minidiff.storage.low_memory import LowMemory
from minidiff.version import VERSION

if TYPE_CHECKING:
    from PIL import Image

SamplerChoice = str | Mapping[str, Any] | Sampler[Any, Any] | None
Own = TypeVar("Own", bound="Pipeline")  # typing.Self needs Python 3.11


class Parts(dict[str, nn.Module]):
    """A model's parts by name, and the adapters that bend them: (file, strength, hash) each, for the recipe."""

    adapters: tuple[tuple[str, float, str], ...] = ()


class Pipeline:
    """Base class of the pipelines: the parts, their device and dtype, and the way from a request to a result."""

    def __init__(self, config: ModelConfig, parts: Mapping[str, nn.Module], hash: str = "") -> None:
        """Initialize from ``parts`` by name, as :func:`checkpoint.build` returns them; ``hash``: that of their file.

        Raises :class:`UnsupportedError` for a model that this pipeline cannot run.
        """
        self._check_config(config)
        for part in parts.values():
            part.requires_grad_(False)  # training enables it where needed
        self.config = config
        self.parts = Parts(parts)
        self.hash = hash
        self.source = ""  # identity of the checkpoint that the weights came from, as long as they are unchanged
        self.words: tuple[tuple[str, str, str], ...] = ()  # learned words, (file, word, hash), for the recipe
        self.dtype_chosen: str | None = None  # "auto" if the command line chose the dtype, for the recipe
        self.schedule = NoiseSchedule.from_config(config.schedule)
        self.unet = cast(UNet, parts["unet"])
        self.fast: tuple[str, ...] = ()  # active speed-ups (minidiff.fast), for the recipe
        self.kernels: dict[str, str] = {}  # what "many_keys" chose on this processor
        self.approximations: dict[str, Any] = {}  # active approximations, which change the result
        self.low_memory: LowMemory | None = None  # set if the parts take turns in memory
        apply_policy(config, parts)

    @classmethod
    def load(
        cls: type[Own],
        path: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        low_memory: bool = False,
        copy: bool = False,
    ) -> Own:
        """Open a minidiff file as :func:`minidiff.load` does. Raises :class:`CheckpointError`, also for a model of
        another kind: with text or without."""
        return assembly.open_file(path, cls._own, device, dtype, low_memory, copy)

    @classmethod
    def _own(cls: type[Own], config: ModelConfig, source: str) -> type[Own]:
        if not cls.fits(config):
            raise CheckpointError(f"{source}: a {config.family} model, {cls._others}")
        return cls

    _others: ClassVar[str]  # what all other models are, and which call opens them

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        """Return True for a model that this kind of pipeline runs."""
        raise NotImplementedError

    @classmethod
    def _check_config(cls, config: ModelConfig) -> None:
        """Raise :class:`UnsupportedError` for parts that do not go together."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Summary in a few lines: family, parts with their sizes, and active speed-ups."""
        sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in self.parts.items()}
        parts = ", ".join(f"{name} {count / 1e6:.4g} M" for name, count in sizes.items())
        factor = 1 if self.config.vae is None else self.config.vae.factor
        height, width = (side * factor for side in self.unet.config.sides)
        size, sampler = f"{width} x {height}", self.config.sampler.get("name", "none of its own")
        lines = [
            f"{type(self).__name__}: {self.config.family}, {size} pixels, predicts {self.schedule.prediction}",
            f"parts (parameters): {parts}; {str(self.dtype).removeprefix('torch.')} on {self.device}",
            f"sampler: {sampler}",
        ]
        if self.low_memory is not None:
            lines.append("low memory: the parts take turns")
        if self.fast:
            lines.append(f"fast: {', '.join(self.fast)}")
        if self.approximations:
            lines.append(f"approximate: {', '.join(f'{k}={v}' for k, v in self.approximations.items())}")
        return "\n  ".join(lines)

    @property
    def device(self) -> torch.device:
        """Device of the UNet."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the UNet computes."""
        return self.unet.conv_in.weight.dtype

    @property
    def identity(self) -> str:
        """Identity of the model in recipes (``identity.py``): that of its checkpoint, or that of the weights in memory
        if they came from no checkpoint or have been trained since."""
        return self.source or identify(self.config, self._tensors())

    def _tensors(self) -> dict[str, Lazy]:
        return {f"{n}.{k}": lazy(t) for n, part in self.parts.items() for k, t in part.state_dict().items()}

    def to(self: Own, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Own:
        """Move and convert every part in place. Modules that overflow in float16 stay in float32 (``precision.py``).

        Raises :class:`ConfigError` if the parts take turns in memory (``low_memory``).
        """
        check(
            self.low_memory is None,
            f"the parts of this model take turns on {self.device}, in {self.dtype}: that is final",
        )
        for part in self.parts.values():
            part.to(device=device, dtype=dtype)
        apply_policy(self.config, self.parts)
        return self

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the model to one minidiff file and return its content hash. Raises :class:`CheckpointError`."""
        self.hash = checkpoint.write_checkpoint(path, self.config, self._tensors())
        return self.hash

    def sampler(self, choice: SamplerChoice = None) -> Sampler[Any, Any]:
        """Return the sampler for ``choice``: a name, {"name": ..., options}, a Sampler, or None for the checkpoint's
        own."""
        return programs.read(None).sampler(self.config.schedule, choice, self.config.sampler).inner

    def own_steps(self, sampler: SamplerChoice = None) -> int:
        """Return the default number of steps with a choice of sampler."""
        return 50

    def job(self, request: Request) -> Job:
        """Decide everything about a run and compute its beginning: what conditions it, and its first sample.

        Raises :class:`ConfigError` for a request that this model cannot run, before anything is computed.
        """
        self._check(request)
        config, total = self.config, len(self.schedule)
        count = request.num_images * self._prompts_of(request)
        opened = self._pictures(request)
        shape = (count, *self._shape(request, opened))
        self._check_memory(shape)

        program = programs.read(request.like)
        noise = program.streams(request.seed, count, request.generator)
        chosen = program.sampler(config.schedule, request.sampler, config.sampler).seeded(noise.seeds)
        entry = img2img.whole(request.steps)
        if request.image is not None and request.denoising_start is None:
            entry = program.entry(chosen.name, request.steps, request.taken_strength, total)
        plan = chosen.plan(self.schedule, entry.steps)
        sampler = chosen.inner
        rows, noised = choose_rows(plan, getattr(sampler, "order", 1), entry, request, config.schedule.steps)
        alone = unguided(plan, rows, sampler, request, config.schedule.steps)

        pictures = None if opened is None else opened.resized()
        conditioned = self._conditioned(request, program, shape)
        like = torch.empty(shape, dtype=self.dtype, device=self.device)
        given = self._given(request.latents, shape)
        first = self._first(FirstSample(plan, rows, noised, noise.first, like, given), pictures, request)

        return Job(
            plan=plan,
            sampler=sampler,
            rows=rows,
            x=first.x,
            predict=conditioned.predict(first.beside),
            instead=dict.fromkeys(alone, conditioned.alone(first.beside)),
            keep=first.keep,
            draw=lambda like: noise.later(tuple(like.shape), like.dtype, like.device),
            rewind=noise.rewinding(),
            recipes=self._recipes(request, program, chosen, noise, conditioned, shape, pictures),
        )

    # What a kind of pipeline decides for itself:

    def _check(self, request: Request) -> None:
        """Raise :class:`ConfigError` for options that this kind of model does not take, or that do not go together."""
        raise NotImplementedError

    def _prompts_of(self, request: Request) -> int:
        """Return the number of prompts, each of which gets ``num_images`` pictures."""
        return 1

    def _pictures(self, request: Request) -> Opened | None:
        """Return the image and the mask that the run begins from, opened and not yet resized."""
        return None

    def _shape(self, request: Request, pictures: Opened | None) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of a sample."""
        raise NotImplementedError

    def _conditioned(self, request: Request, program: Program, shape: tuple[int, ...]) -> Conditioned:
        """Return the model with its conditions, for samples of ``shape``."""
        raise NotImplementedError

    def _first(self, first: FirstSample, pictures: Pictures | None, request: Request) -> Sample:
        """Return the first sample."""
        return first.from_noise()

    def _check_memory(self, shape: tuple[int, ...]) -> None:
        """Raise :class:`ConfigError` if samples of ``shape`` (B, C, h, w) do not fit into memory."""
        raise NotImplementedError

    def _given(self, latents: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
        """Return the initial noise that was given, checked, on the model's device."""
        if latents is None:
            return None
        check(isinstance(latents, Tensor), f"latents must be a tensor, got {type(latents).__name__}")
        fits = tuple(latents.shape) == shape
        check(fits, f"latents of shape {tuple(latents.shape)} do not fit; {shape} is wanted")
        return latents.to(self.device, self.dtype)

    def _recipes(
        self,
        request: Request,
        program: Program,
        chosen: ProgramSampler,
        noise: Streams,
        conditioned: Conditioned,
        shape: tuple[int, ...],
        pictures: Pictures | None,
    ) -> tuple[Recipe, ...]:
        """Return the recipe of each picture: the request for it alone, and where it is made."""
        factor = 1 if self.config.vae is None else self.config.vae.factor
        asked = {f.name: getattr(request, f.name) for f, option in options(type(request)) if option.kept is not None}
        asked |= {
            "steps": int(request.steps),
            "sampler": chosen.note,
            "strength": request.taken_strength if pictures is not None else None,
            "height": shape[2] * factor,
            "width": shape[3] * factor,
            "like": None if program == programs.read(None) else str(program),
        }
        made = Made(
            lora=tuple((name, strength) for name, strength, _ in self.parts.adapters),
            lora_hashes=tuple(hash for _, _, hash in self.parts.adapters),
            embedding=tuple((name, word) for name, word, _ in self.words),
            embedding_hashes=tuple(hash for _, _, hash in self.words),
            model=self.config.family,
            model_hash=self.identity,
            dtype=str(self.dtype).removeprefix("torch."),
            dtype_chosen=self.dtype_chosen,
            device=self.device.type,
            fast=self.fast,
            kernels=dict(self.kernels),
            approximate=dict(self.approximations),
            minidiff=VERSION,
            torch=str(torch.__version__),
        )
        origins = {} if pictures is None else pictures.origins(request)
        known = request.latents is None  # or the seed would not tell the noise
        recipes = []
        for k, told in enumerate(conditioned.told):
            drawn = noise.note(k, shape[0]) if known else {}
            own = type(request)(**{**asked, **told, "seed": drawn.get("seed")})
            where = replace(made, place=drawn.get("place"), places=drawn.get("places"))
            recipes.append(Recipe(request=own, made=where, pictures=origins, text=conditioned.text))
        return tuple(recipes)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the finished sample of a run to pixels (B, 3, H, W) in [0, 1]. Without a VAE the sample is pixels
        already, and only its range changes."""
        return to_unit(self._raw_pixels(latents))

    def finish(self, run: Run, progress: Progress = None) -> Tensor:
        """Run to the end and decode to pixels (B, 3, H, W) in [0, 1]. ``progress``: see :meth:`Run.last`.

        Raises :class:`MinidiffError` if the pixels are not finite, naming the module that produced the first such
        value, and :class:`Cancelled` if ``run`` was cancelled, possibly from another thread.
        """
        latents = self._last(run, progress)
        with run.work.going_on():
            run.work.check()
            raw = self._raw_pixels(latents)
            check_finite(raw, self.parts, lambda: self._raw_pixels(latents))
        return to_unit(raw)

    def _raw_pixels(self, latents: Tensor) -> Tensor:
        return latents

    def _last(self, run: Run, progress: Progress) -> Tensor:
        """Return the finished sample of a run, checked to be finite."""
        x = run.last(progress).x
        check_finite(x, self.parts, lambda: list(run.again()))
        return x

    def run(self, request: Request) -> Run:
        """Return the denoising of a request; see :meth:`job`."""
        return Run(self.job(request))

    def _deliver(self, run: Run, output: Output, progress: Progress) -> list[Image.Image] | Tensor:
        """Run to the end and return the requested ``output``."""
        if output == "latent":
            return self._last(run, progress)
        pixels = self.finish(run, progress)
        if output == "tensor":
            return pixels
        return [label(image, recipe) for image, recipe in zip(to_pil(pixels), run.recipes, strict=True)]
