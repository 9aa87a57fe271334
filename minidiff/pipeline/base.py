"""Base class of the pipelines: the model's parts on a device, and the way from a request to a result.

    Request --job--> Job --denoise--> Step ... Step --finish--> pixels

Its two subclasses, with text and without, say what conditions the model and what a run begins from.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from minidiff import programs
from minidiff.adapters.control import Steering
from minidiff.config import ControlConfig, ModelConfig, check
from minidiff.errors import CheckpointError
from minidiff.models.unet import UNet
from minidiff.pipeline.denoise import Progress, Run
from minidiff.pipeline.estimate import Estimate, Extent, estimate, reorders
from minidiff.pipeline.guidance import Conditioned, Network
from minidiff.pipeline.images import Opened, Pictures
from minidiff.pipeline.job import Job, Predict
from minidiff.pipeline.latents import FirstSample, Sample
from minidiff.pipeline.memory_limit import check_fits
from minidiff.pipeline.model import Model
from minidiff.pipeline.png import label, to_pil, to_unit
from minidiff.pipeline.recipe import Made, Recipe, Steered
from minidiff.pipeline.request import Output, Request, options
from minidiff.pipeline.rows import choose_rows, unguided
from minidiff.precision import check_finite
from minidiff.programs import Program, img2img
from minidiff.programs.program_sampler import ProgramSampler
from minidiff.programs.streams import Streams
from minidiff.samplers.checks import check_output
from minidiff.samplers.method import Sampler
from minidiff.schedule import NoiseSchedule
from minidiff.storage import checkpoint
from minidiff.version import VERSION

if TYPE_CHECKING:
    from PIL import Image

SamplerChoice = str | Mapping[str, Any] | Sampler[Any, Any] | None
Own = TypeVar("Own", bound="Pipeline")  # typing.Self needs Python 3.11


class Pipeline(Model):
    """Base class of the pipelines: the parts, their device and dtype, and the way from a request to a result."""

    config: ModelConfig

    def __init__(self, config: ModelConfig, parts: Mapping[str, nn.Module], hash: str = "") -> None:
        """Initialize from ``parts`` by name, as :func:`checkpoint.build` returns them; ``hash``: that of their file.

        Raises :class:`UnsupportedError` for a model that this pipeline cannot run.
        """
        self._check_config(config)
        super().__init__(config, parts, hash)
        self.words: tuple[tuple[str, str, str], ...] = ()  # learned words, (file, word, hash), for the recipe
        self.dtype_chosen: str | None = None  # "auto" if the command line chose the dtype, for the recipe
        self.schedule = NoiseSchedule.from_config(config.schedule)
        self.unet = cast(UNet, parts["unet"])

    @classmethod
    def _own(cls: type[Own], config: ModelConfig | ControlConfig, source: str) -> type[Own]:
        if isinstance(config, ControlConfig):
            raise CheckpointError(f"{source}: a {config.family}, which steers a model; open it by ControlModel.load")
        if not cls.fits(config):
            raise CheckpointError(f"{source}: a {config.family} model, {cls._others}")
        return cls

    _others: ClassVar[str]  # what all other models are, and which call opens them

    @staticmethod
    @abstractmethod
    def fits(config: ModelConfig) -> bool:
        """Return True for a model that this kind of pipeline runs."""

    @classmethod
    @abstractmethod
    def _check_config(cls, config: ModelConfig) -> None:
        """Raise :class:`UnsupportedError` for parts that do not go together."""

    def __repr__(self) -> str:
        """Summary in a few lines: family, parts with their sizes, and active speed-ups."""
        height, width = (side * self._factor for side in self.unet.config.sides)
        size, sampler = f"{width} x {height}", self.config.sampler.get("name", "none of its own")
        first = f"{type(self).__name__}: {self.config.family}, {size} pixels, predicts {self.schedule.prediction}"
        return "\n  ".join([first, self._sizes(), f"sampler: {sampler}", *self._done()])

    @property
    def _weight(self) -> Tensor:
        return self.unet.conv_in.weight

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
        opened, steering, shape = self._begun(request)
        count, factor = shape[0], self._factor
        config, total = self.config, len(self.schedule)
        check_fits(config, self._extent(request, shape), self.device)
        steering.fits(config, shape, self.device, self.dtype)

        program = programs.read(request.like)
        noise = program.streams(request.seed, count, request.generator)
        chosen = program.sampler(config.schedule, request.sampler, config.sampler).seeded(noise.seeds)
        entry = img2img.whole(request.steps)
        if request.image is not None and request.denoising_start is None:
            entry = program.entry(chosen.name, request.steps, request.taken_strength, total)
        plan = chosen.plan(self.schedule, entry.steps)
        sampler = chosen.inner
        check_output(config.unet.out_channels, shape[1], sampler)
        order = getattr(sampler, "order", 1)
        rows, noised = choose_rows(plan, order, entry, request, config.schedule.steps)
        alone = unguided(plan, rows, sampler, request, config.schedule.steps)

        pictures = None if opened is None else opened.resized()
        steering.prepare(shape, factor)
        conditioned = self._conditioned(request, program, shape, request.steps * order, len(rows))
        steered = steering.unets(rows, len(plan.timesteps), alone if conditioned.guided else rows)
        like = torch.empty(shape, dtype=self.dtype, device=self.device)
        given = self._given(request.latents, shape)
        first = self._first(FirstSample(plan, rows, noised, noise.first, like, given), pictures, request)

        @functools.cache  # rows that predict alike share one function, and with it the tensors of their conditions
        def way(now: Conditioned, unet: Network, alone: bool) -> Predict:
            return (now.alone if alone else now.predict)(unet, first.beside)

        usual = (conditioned, self.unet, False)
        each = {i: (conditioned.at(k), steered.get(i, self.unet), i in alone) for k, i in enumerate(rows)}
        return Job(
            plan=plan,
            sampler=sampler,
            rows=rows,
            x=first.x,
            predict=way(*usual),
            instead={i: way(*how) for i, how in each.items() if how != usual},
            keep=first.keep,
            draw=lambda like: noise.later(tuple(like.shape), like.dtype, like.device),
            rewind=noise.rewinding(),
            beside=steering.parts,
            done=steering.rest,
            recipes=self._recipes(request, program, chosen, noise, conditioned, shape, pictures, steering.notes),
        )

    def estimate(self, request: Request) -> Estimate:
        """Return the memory that a run of ``request`` will take: that of its weights, and at its peak.

        Nothing is computed. Raises :class:`ConfigError` for a request that this model cannot run.
        """
        return self._estimate(request, in_turn=self.low_memory is not None)

    def _estimate(self, request: Request, *, in_turn: bool) -> Estimate:
        _, steering, shape = self._begun(request)
        steering.fits(self.config, shape, self.device, self.dtype)
        sizes = {name: next(part.parameters()).element_size() for name, part in self.parts.items()}
        beside = sum(t.numel() * t.element_size() for net in set(steering.parts.values()) for t in net.parameters())
        return estimate(
            self.config,
            checkpoint.build(self.config) if "packed" in self.fast else self.parts,  # which leaves no shapes
            self._extent(request, shape),
            sizes,
            beside,
            copies=reorders(self.device),
            mapped=self.mapped and "packed" not in self.fast,
            in_turn=in_turn,
        )

    @property
    def _factor(self) -> int:
        """Pixels per number of a sample along a side."""
        return 1 if self.config.vae is None else self.config.vae.factor

    def _begun(self, request: Request) -> tuple[Opened | None, Steering, tuple[int, ...]]:
        """Return what a run begins from, its controls, and the shape (B, C, h, w) of its samples."""
        self._check(request)
        count = request.num_images * self._prompts_of(request)
        opened = self._pictures(request)
        steering = Steering(self.unet, request.controls or ())
        own = steering.size(self._factor) if opened is None else opened.size
        return opened, steering, (count, *self._shape(request, own))

    def _extent(self, request: Request, shape: tuple[int, ...]) -> Extent:
        """Return what the memory of a run with samples of ``shape`` (B, C, h, w) depends on."""
        count, height, width = shape[0], shape[2] * self._factor, shape[3] * self._factor
        size = self.dtype.itemsize
        grouped = "groups" in self.fast
        return Extent(count=count, height=height, width=width, size=size, vae_size=size, decoded=count, grouped=grouped)

    # What a kind of pipeline decides for itself:

    @abstractmethod
    def _check(self, request: Request) -> None:
        """Raise :class:`ConfigError` for options that this kind of model does not take, or that do not go together."""

    def _prompts_of(self, request: Request) -> int:
        """Return the number of prompts, each of which gets ``num_images`` pictures."""
        return 1

    def _pictures(self, request: Request) -> Opened | None:
        """Return the image and the mask that the run begins from, opened and not yet resized."""
        return None

    @abstractmethod
    def _shape(self, request: Request, own: tuple[int, int] | None) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of a sample. ``own``: height and width in pixels of the picture that is given."""

    @abstractmethod
    def _conditioned(
        self, request: Request, program: Program, shape: tuple[int, ...], calls: int, made: int
    ) -> Conditioned:
        """Return the model with its conditions, for samples of ``shape``. A full run makes ``calls`` model calls, this
        one ``made``."""

    def _first(self, first: FirstSample, pictures: Pictures | None, request: Request) -> Sample:
        """Return the first sample."""
        return first.from_noise()

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
        controls: tuple[Steered, ...],
    ) -> tuple[Recipe, ...]:
        """Return the recipe of each picture: the request for it alone, and where it is made."""
        factor = self._factor
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
            together=shape[0] if shape[0] > 1 else None,
            lora=tuple((name, strength) for name, strength, _ in self.parts.adapters),
            lora_hashes=tuple(hash for _, _, hash in self.parts.adapters),
            embedding=tuple((name, word) for name, word, _ in self.words),
            embedding_hashes=tuple(hash for _, _, hash in self.words),
            control=controls,
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
        beside = {} if run.job is None else run.job.beside
        x = run.last(progress).x
        check_finite(x, {**beside, **self.parts}, lambda: list(run.again()))
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
