"""Base class of the pipelines: model parts on a device, the choice of a sampler, and the run from start to picture.

Its two subclasses, with text and without, are defined in ``pipeline.py``.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from minidiff import noise
from minidiff.config import ModelConfig, check, one_of, quote
from minidiff.errors import CheckpointError, ConfigError
from minidiff.models.unet import UNet
from minidiff.pipeline import opening
from minidiff.pipeline.denoise import Predict, Progress, Run, Step, Work, denoise
from minidiff.pipeline.latents import Beginning, Start
from minidiff.pipeline.picture import label, to_pil, to_unit
from minidiff.precision import apply_policy, check_finite
from minidiff.programs import Convention
from minidiff.programs.program import ProgramSampler
from minidiff.programs.streams import Streams
from minidiff.samplers import name_of, sampler_from_config, sampler_to_config
from minidiff.samplers.method import Sampler
from minidiff.schedule import NoiseSchedule
from minidiff.storage import checkpoint
from minidiff.storage.files import Lazy, lazy
from minidiff.storage.identity import identify
from minidiff.storage.low_memory import Turns
from minidiff.version import VERSION

if TYPE_CHECKING:
    from PIL import Image

Output = Literal["pil", "tensor", "latent"]
Seed = int | Sequence[int] | None
SamplerChoice = str | Mapping[str, Any] | Sampler[Any, Any] | None
Like = str | Convention | None


MOST = 10**9  # pictures per run
Own = TypeVar("Own", bound="Pipeline")  # typing.Self needs Python 3.11


class Pipeline:
    """Base class of the pipelines: the parts, their device and dtype, and the way from noise to a result."""

    def __init__(self, config: ModelConfig, parts: Mapping[str, nn.Module], hash: str = "") -> None:
        """Initialize from ``parts`` by name, as :func:`checkpoint.build` returns them; ``hash``: that of their file.

        Raises :class:`UnsupportedError` for a model that this pipeline cannot run.
        """
        self._check_config(config)
        for part in parts.values():
            part.requires_grad_(False)  # training enables it where needed
        self.config = config
        self.parts = dict(parts)
        self.hash = hash
        self.source = ""  # identity of the checkpoint that the weights came from, as long as they are unchanged
        self.schedule = NoiseSchedule.from_config(config.schedule)
        self.unet = cast(UNet, parts["unet"])
        self.fast: tuple[str, ...] = ()  # active speed-ups (minidiff.fast), for the recipe
        self.approximations: dict[str, Any] = {}  # active approximations, which change the result
        self.turns: Turns | None = None  # set if the parts take turns in memory
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
        return opening.open_file(path, cls._own, device, dtype, low_memory, copy)

    @classmethod
    def _own(cls: type[Own], config: ModelConfig, source: str) -> type[Own]:
        if not cls.fits(config):
            other = "; open it with minidiff.load"
            raise CheckpointError(f"{source}: a {config.family} model, which is no {cls.__name__}{other}")
        return cls

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
        if self.turns is not None:
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
            self.turns is None, f"the parts of this model take turns on {self.device}, in {self.dtype}: that is final"
        )
        for part in self.parts.values():
            part.to(device=device, dtype=dtype)
        apply_policy(self.config, self.parts)
        return self

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the model to one minidiff file and return its content hash. Raises :class:`CheckpointError`."""
        self.hash = checkpoint.write(path, self.config, self._tensors())
        return self.hash

    def sampler(self, choice: SamplerChoice = None, like: Convention | None = None) -> Sampler[Any, Any]:
        """Return the sampler for ``choice``: a name, {"name": ..., options}, a Sampler, or None for the checkpoint's
        own. With ``like``, return that program's version of the named sampler."""
        if like is not None:
            choice = str(self.config.sampler.get("name")) if choice is None else choice
            if not isinstance(choice, (str, Mapping)):
                raise ConfigError(
                    f'{type(choice).__name__} is ready as it is; with like= give {{"name": ..., options}}'
                )
            return like.sampler(self.config.schedule, choice)
        if choice is None:
            return sampler_from_config(self.config.sampler)
        if isinstance(choice, (str, Mapping)):
            return sampler_from_config({"name": choice} if isinstance(choice, str) else choice)
        check(callable(getattr(choice, "plan", None)), f"sampler={choice!r} is neither a name nor a Sampler")
        return choice

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
        check_finite(x, self.parts, lambda: list(run.again() if run.again is not None else ()))
        return x

    def _run(
        self,
        predict: Predict,
        begin: Beginning,
        start: Start,
        labels: Sequence[dict[str, Any]],
        origins: Sequence[Mapping[str, Any]],
        steps: int,
        instead: Mapping[int, Predict] | None = None,
    ) -> Run:
        """Return the run from ``start``. ``labels`` and ``origins``: recipe entries of each image, the latter about its
        noise. ``instead``: rows that call another model."""
        rows, draw = begin.rows, begin.later
        work = Work()
        marks = [source.mark() for source in (begin.draw, draw)]

        def trail() -> Generator[Step, None, None]:
            return denoise(
                predict,
                start.sampler,
                begin.plan,
                start.x,
                first=rows.start,
                stop=rows.stop,
                draw=lambda like: draw(tuple(like.shape), like.dtype, like.device),
                instead=instead,
                work=work,
            )

        def again() -> Generator[Step, None, None]:
            for source, mark in zip((begin.draw, draw), marks, strict=True):
                source.rewind(mark)
            return trail()

        common = {
            "sampler": note(begin.sampler),
            "steps": int(steps),
            "model": self.config.family,
            "model_hash": self.identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "minidiff": VERSION,
            "torch": str(torch.__version__),
            **({"fast": list(self.fast)} if self.fast else {}),
            **({"approximate": dict(self.approximations)} if self.approximations else {}),
        }
        recipes = [{**own, **origin, **common} for own, origin in zip(labels, origins, strict=True)]
        return Run(trail(), begin.plan, recipes, rows, again, work)

    def _begin(
        self,
        sampler: Sampler[Any, Any],
        plan: Any,
        rows: range,
        shape: tuple[int, ...],
        latents: Tensor | None,
        seed: Seed,
        generator: noise.Generators | None,
        streams: Streams | None = None,
        noised: int | None = None,
    ) -> tuple[Beginning, list[dict[str, Any]]]:
        """Return the beginning of a run with its noise source, and the recipe entries about the noise of each image:
        its seed, if the seed alone determines it.

        ``streams``: another program's noise, in place of ``seed`` and ``generator``. ``noised``: see
        :class:`Beginning`.
        """
        check(latents is None or isinstance(latents, Tensor), f"latents must be a tensor, got {type(latents).__name__}")
        seeds = noise.seeds_of(shape[0], seed) if generator is None and streams is None else seed
        draw = noise.source(shape[0], seeds, generator) if streams is None else streams.first
        if latents is not None:
            latents = latents.to(self.device, self.dtype)
            check(
                tuple(latents.shape) == shape, f"latents of shape {tuple(latents.shape)} do not fit; {shape} is wanted"
            )
        like = torch.empty(shape, dtype=self.dtype, device=self.device)
        known = latents is None
        later = draw if streams is None else streams.later
        begin = Beginning(plan, sampler, rows, draw, later, like, latents, rows.start if noised is None else noised)
        if streams is not None and known:
            return begin, [dict(streams.note(k, shape[0])) for k in range(shape[0])]
        says_all = list(seeds) if known and isinstance(seeds, list) else [None] * shape[0]
        return begin, [{"seed": s} for s in says_all]

    def _deliver(self, run: Run, output: Output, progress: Progress) -> list[Image.Image] | Tensor:
        """Run to the end and return the requested ``output``."""
        if output == "latent":
            return self._last(run, progress)
        pixels = self.finish(run, progress)
        if output == "tensor":
            return pixels
        return [label(image, recipe) for image, recipe in zip(to_pil(pixels), run.recipes, strict=True)]


def check_output(output: str) -> None:
    one_of(("pil", "tensor", "latent"), output=output)


def check_count(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    check(whole and value >= 1, f"{name}={quote(value)} must be a whole number, at least 1")
    check(value < MOST, f"{name} must be below {MOST:,}")


def finite(name: str, value: Any) -> float:
    check(isinstance(value, numbers.Real) and math.isfinite(value), f"{name}={value!r} must be a finite number")
    return float(value)


def note(sampler: Any) -> dict[str, Any]:
    """Return the recipe entry of a sampler: its name and options, or class name and text form for a caller's own."""
    if isinstance(sampler, ProgramSampler):
        return sampler.note
    if name_of(sampler) is None:
        return {"name": type(sampler).__name__, "options": str(sampler)}
    return sampler_to_config(sampler)
