"""Prompt to picture: the only place where all parts meet.

prompt --tokenizer--> ids --text_encoder--> context
seed --noise--> x_T --+
schedule + sampler --plan--> rows --> [ scale_input -> unet -> guidance -> step ] x n --> x_0 --vae.decode--> image
"""

from __future__ import annotations

import math
import numbers
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from minidiff import checkpoint, noise
from minidiff.config import ModelConfig, check
from minidiff.conventions import Convention, read
from minidiff.conventions.program import ProgramSampler
from minidiff.conventions.streams import Streams
from minidiff.denoise import Predict, Prediction, Run, denoise
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.files import Lazy, lazy
from minidiff.guidance import guide
from minidiff.models.clip import CLIPText, TextOutput
from minidiff.models.tokenizer import END, START, Tokenizer
from minidiff.models.unet import UNet
from minidiff.models.vae import VAE
from minidiff.picture import label, to_pil, to_unit
from minidiff.samplers import name_of, sampler_from_config, sampler_to_config
from minidiff.samplers.base import Sampler
from minidiff.schedule import NoiseSchedule
from minidiff.version import VERSION

BUNDLED = "assets/shapes.safetensors"

Output = Literal["pil", "tensor", "latent"]
Seed = int | Sequence[int] | None
SamplerChoice = str | Mapping[str, Any] | Sampler[Any, Any] | None
Like = str | Convention | None


class Pipeline:
    """What the two kinds of pipeline share: the parts, their device and dtype, and the way from noise to a result."""

    def __init__(self, config: ModelConfig, parts: Mapping[str, nn.Module], hash: str = "") -> None:
        """``parts`` by name, as :func:`checkpoint.build` gives them; ``hash`` of the file they came from."""
        self.config = config
        self.parts = dict(parts)
        self.hash = hash
        self.schedule = NoiseSchedule.from_config(config.schedule)
        self.unet = cast(UNet, parts["unet"])

    @property
    def device(self) -> torch.device:
        """Where the UNet lives."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet computes in."""
        return self.unet.conv_in.weight.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move and convert every part, in place."""
        for part in self.parts.values():
            part.to(device=device, dtype=dtype)
        return self

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write everything as one minidiff file; returns its content hash. Raises :class:`CheckpointError`."""
        tensors = {f"{n}.{k}": lazy(t) for n, part in self.parts.items() for k, t in part.state_dict().items()}
        self.hash = checkpoint.write(path, self.config, tensors)
        return self.hash

    def sampler(self, choice: SamplerChoice = None, like: Convention | None = None) -> Sampler[Any, Any]:
        """The sampler meant by ``choice``: a name, {"name": ..., options}, one that is ready, or None for the
        checkpoint's own; with ``like``, that program's sampler of the name."""
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
        """The finished sample of a run -> pixels (B, 3, H, W) in [0, 1]. Without a VAE they are the same thing."""
        return to_unit(latents)

    def _run(
        self,
        predict: Predict,
        sampler: Sampler[Any, Any],
        plan: Any,
        steps: int,
        shape: tuple[int, ...],
        latents: Tensor | None,
        seed: Seed,
        generator: noise.Generators | None,
        labels: Sequence[dict[str, Any]],
        streams: Streams | None = None,
    ) -> Run:
        """A run from ``latents``, or from noise of ``shape`` that is drawn here; ``labels``: what to note, by image.
        ``streams`` replace ``seed`` and ``generator``: another program's noise."""
        check(latents is None or isinstance(latents, Tensor), f"latents must be a tensor, got {type(latents).__name__}")
        seeds = noise.seeds_of(shape[0], seed) if generator is None and streams is None else seed
        randn: noise.Randn = noise.source(shape[0], seeds, generator) if streams is None else streams.first
        later: noise.Randn = randn if streams is None else streams.later
        x = randn(shape, self.dtype, self.device) if latents is None else latents.to(self.device, self.dtype)
        check(tuple(x.shape) == shape, f"latents of shape {tuple(x.shape)} do not fit; {shape} is wanted")
        # Euler counts noise in units of the picture (x = x0 + sigma * noise) and so starts from sigma_max * noise,
        # 14.6146 for SD; DDIM and PNDM keep the variance at 1 (x = a * x0 + s * noise) and start from plain noise.
        x = x * plan.init_noise_sigma
        trail = denoise(predict, sampler, plan, x, draw=lambda like: later(tuple(like.shape), like.dtype, like.device))
        common = {
            "sampler": _note(sampler),
            "steps": int(steps),
            "model": self.config.family,
            "model_hash": self.hash,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "minidiff": VERSION,
            "torch": str(torch.__version__),
        }
        # A seed says all about the noise only where nothing came from outside.
        known = seeds if isinstance(seeds, list) and latents is None else [None] * shape[0]
        origins: list[dict[str, Any]] = [{"seed": s} for s in known]
        if streams is not None and latents is None:
            origins = [streams.note(k, shape[0]) for k in range(shape[0])]
        return Run(trail, plan, [{**own, **origin, **common} for own, origin in zip(labels, origins, strict=True)])

    def _deliver(self, run: Run, output: Output, progress: bool) -> Any:
        """Run to the end and hand over what was asked for."""
        latents = run.last(progress).x
        if output == "latent":
            return latents
        pixels = self.decode(latents)
        if output == "tensor":
            return pixels
        return [label(image, recipe) for image, recipe in zip(to_pil(pixels), run.recipes, strict=True)]


class StableDiffusion(Pipeline):
    """Text to picture. Made by :func:`minidiff.load` or ``weights_convert.load``."""

    def __init__(self, config: ModelConfig, parts: Mapping[str, nn.Module], hash: str = "") -> None:
        super().__init__(config, parts, hash)
        assert config.tokenizer is not None
        self.tokenizer = Tokenizer(config.tokenizer)
        self.text_encoder = cast(CLIPText, parts["text_encoder"])
        self.vae = cast(VAE, parts["vae"])

    @torch.no_grad()
    def encode_prompt(self, texts: str | Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """(context, pooled or None) as the UNet takes them: context (B, 77, context_dim) in the UNet's dtype."""
        texts = _texts(texts)
        self._warn_of_unknown_words(texts)
        ids = self.tokenizer(texts).to(self.text_encoder.token.weight.device)
        out: TextOutput = self.text_encoder(ids)
        return getattr(out, self.config.text_layer).to(self.device, self.dtype), None

    def generate(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = "",
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: SamplerChoice = None,
        num_images: int = 1,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output: Output = "pil",
        progress: bool = True,
        like: Like = None,
    ) -> Any:
        """Pictures for one prompt or several, ``num_images`` of each, prompt by prompt.

        ``prompt``: text, or None with ``prompt_embeds`` (P, 77, context_dim) given. ``steps``: 1 and up.
        ``guidance_scale``: how much the prompt counts; 1 is the plain prediction, 0 ignores the prompt.
        ``sampler``: None for the checkpoint's own, a name from ``SAMPLERS``, or a Sampler.
        ``seed``: image k draws from ``Generator().manual_seed(seed + k)``, or a list, one seed an image; None draws a
        fresh one. ``generator``: instead of a seed, one for the whole batch as diffusers does it, or one an image.
        ``height``, ``width``: pixels, divisible by 8; the training size by default.
        ``latents``: the first noise from outside, unit variance, (B, C, height / 8, width / 8).
        ``output``: "pil" for a list of PIL images that carry their recipe, "tensor" for float (B, 3, H, W) in [0, 1],
        "latent" for (B, C, h, w).
        ``like``: as another program would do it: "diffusers", "ldm", "k-diffusion", "a1111" or "comfyui"
        (``minidiff.conventions``): its noise levels, its noise and its rule for guidance; what is given here wins.

        Raises :class:`ConfigError` for any value that cannot work, before the first model call.
        """
        _check_output(output)
        run = self.steps(
            prompt,
            negative_prompt,
            steps,
            guidance_scale,
            sampler,
            num_images,
            seed,
            generator,
            height,
            width,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            like,
        )
        return self._deliver(run, output, progress)

    def steps(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = "",
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: SamplerChoice = None,
        num_images: int = 1,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        like: Like = None,
    ) -> Run:
        """The denoising of :meth:`generate` as an iterator: one :class:`Step` a model call.

        Arguments are checked and the prompt is encoded before it returns. The last step's ``x`` holds the finished
        latents, (B, C, height / 8, width / 8); :meth:`decode` turns them into pixels.
        """
        convention = None if like is None else read(like)
        sampler = self.sampler(sampler, convention)
        plan = sampler.plan(self.schedule, steps)
        shape = self._latent_shape(height, width)
        _check_count("num_images", num_images)
        guidance_scale = _finite("guidance_scale", guidance_scale)
        context, prompts = self._context(prompt, prompt_embeds, "prompt")
        negative: Tensor | None = None
        negative_prompt = "" if negative_prompt is None else negative_prompt
        negatives: list[str | None] = [*_texts(negative_prompt)]
        # at exactly 1 the negative prompt cancels out: half the work
        if guidance_scale != 1 if convention is None else convention.guided(guidance_scale):
            negative, negatives = self._context(negative_prompt, negative_prompt_embeds, "negative_prompt")
            negative = _match(negative, context).repeat_interleave(num_images, dim=0)
        check(len(negatives) in (1, len(prompts)), f"{len(negatives)} negative prompts for {len(prompts)} prompts")
        context = context.repeat_interleave(num_images, dim=0)
        labels = [
            {
                "prompt": prompts[k // num_images],
                "negative_prompt": negatives[k // num_images % len(negatives)],
                "guidance_scale": guidance_scale,
                "width": shape[2] * self.vae.config.factor,
                "height": shape[1] * self.vae.config.factor,
            }
            for k in range(len(context))
        ]
        streams = None
        if convention is not None:
            labels = [{**label, "like": str(convention)} for label in labels]
            streams = convention.streams(seed, len(context)) if generator is None else None
            if streams is not None and isinstance(sampler, ProgramSampler):
                sampler = sampler.seeded(streams.seeds)
                plan = sampler.plan(self.schedule, steps)
        predict = self._predictor(context, negative, guidance_scale)
        full = (len(context), *shape)
        return self._run(predict, sampler, plan, steps, full, latents, seed, generator, labels, streams)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the UNet knows them, (B, C, h, w) -> pixels (B, 3, 8h, 8w) in [0, 1]."""
        latents = latents.to(self.vae.decoder.conv_in.weight)  # its device and dtype
        # Divided by the factor: its reciprocal, multiplied, would round differently.
        return to_unit(self.vae.decode(latents / self.vae.config.scaling_factor))

    def _warn_of_unknown_words(self, texts: Sequence[str]) -> None:
        """One line for the words that a model with a small vocabulary reads as gaps."""
        kept = self.text_encoder.config.kept
        strange = [] if kept is None else self.tokenizer.unknown(" ".join(texts), kept)
        if kept is not None and strange:
            known = sorted({self.tokenizer.decode([i]) for i in kept} - {START, END})
            words = f"this {self.config.family} model does not know {', '.join(map(repr, strange))}"
            warnings.warn(f"{words}; its words are: {' '.join(known)}", stacklevel=2)

    def _predictor(self, context: Tensor, negative: Tensor | None, scale: float) -> Predict:
        """The UNet with its prompt bound: (scaled x, t) -> :class:`Prediction`."""
        if negative is None:
            return lambda x, t: Prediction(self.unet(x, t, context))
        both = torch.cat([negative, context])  # this order, in one batch: the bits of a batch depend on its size

        def predict(x: Tensor, t: Tensor) -> Prediction:
            unconditional, conditional = self.unet(torch.cat([x, x]), t, both).chunk(2)
            return Prediction(guide(unconditional, conditional, scale), conditional, unconditional)

        return predict

    def _context(
        self, given: str | Sequence[str] | None, embeds: Tensor | None, name: str
    ) -> tuple[Tensor, list[str | None]]:
        """A prompt encoded, or taken as it was encoded outside; with the texts, for the recipe."""
        if embeds is None:
            if given is None:
                raise ConfigError(f"{name} is None and {name}_embeds is not given; one of them is needed")
            texts = _texts(given)
            return self.encode_prompt(texts)[0], list(texts)
        check(isinstance(embeds, Tensor), f"{name}_embeds must be a tensor, got {type(embeds).__name__}")
        width = self.unet.config.context_dim
        fits = embeds.ndim == 3 and embeds.shape[2] == width and embeds.numel() > 0
        check(fits, f"{name}_embeds has shape {tuple(embeds.shape)}; (prompts, tokens, {width}) is wanted")
        return embeds.to(self.device, self.dtype), [None] * len(embeds)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        factor = self.vae.config.factor
        default = self.unet.config.sample_size * factor
        height, width = (default if value is None else value for value in (height, width))
        for name, value in (("height", height), ("width", width)):
            check(isinstance(value, int), f"{name}={value!r} must be a whole number of pixels")
            near = max(1, round(value / factor)) * factor
            check(value > 0 and value % factor == 0, f"{name}={value} is not divisible by {factor}; {near} is")
        return self.vae.config.latent_channels, height // factor, width // factor


class Unconditional(Pipeline):
    """Pictures from nothing but noise: the models of Ho et al. 2020, which know no prompt and work on pixels."""

    def generate(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        latents: Tensor | None = None,
        output: Output = "pil",
        progress: bool = True,
    ) -> Any:
        """``batch_size`` pictures; the arguments are those of :meth:`StableDiffusion.generate`.

        ``steps``: by default every timestep of the training for DDPM, 50 for the faster methods.
        """
        _check_output(output)
        return self._deliver(self.steps(batch_size, steps, sampler, seed, generator, latents), output, progress)

    def steps(
        self,
        batch_size: int = 1,
        steps: int | None = None,
        sampler: SamplerChoice = None,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        latents: Tensor | None = None,
    ) -> Run:
        """The denoising of :meth:`generate` as an iterator: one :class:`Step` a model call."""
        _check_count("batch_size", batch_size)
        sampler = self.sampler(sampler)
        if steps is None:
            steps = self.config.schedule.steps if _note(sampler)["name"] == "ddpm" else 50
        c = self.unet.config
        size = c.sample_size
        labels = [{"width": size, "height": size}] * batch_size
        shape = (batch_size, c.in_channels, size, size)
        plan = sampler.plan(self.schedule, steps)
        return self._run(
            lambda x, t: Prediction(self.unet(x, t)), sampler, plan, steps, shape, latents, seed, generator, labels
        )


def assemble(
    config: ModelConfig,
    tensors: Mapping[str, Lazy],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    source: str = "checkpoint",
    hash: str = "",
) -> StableDiffusion | Unconditional:
    """A pipeline from a config and tensors by name ("unet.conv_in.weight", ...), from wherever they come.

    ``device`` None: CUDA if there is one, else the CPU. ``dtype`` None: float32 on the CPU, the tensors' own on CUDA.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    parts = checkpoint.build(config)
    checkpoint.fill(parts, tensors, device, dtype, source)
    return from_parts(config, parts, hash)


def from_parts(config: ModelConfig, parts: Mapping[str, nn.Module], hash: str = "") -> StableDiffusion | Unconditional:
    """The pipeline that fits a config: with a text encoder, or without.

    Raises :class:`UnsupportedError` for a model that no pipeline runs yet: SDXL, inpainting, a text UNet without text.
    """
    unet, vae = config.unet, config.vae
    if config.text_encoder_2 is not None or unet.added_dim is not None:
        raise UnsupportedError(f"{config.family}: two text encoders (SDXL) are not supported by the pipeline yet")
    if config.text_encoder is None and (unet.context_dim is not None or vae is not None):
        raise UnsupportedError(f"{config.family}: a UNet that reads a prompt, or a VAE, but no text encoder with it")
    if vae is not None and unet.in_channels != vae.latent_channels:
        channels = f"in_channels={unet.in_channels} of the UNet, latent_channels={vae.latent_channels} of the VAE"
        raise UnsupportedError(f"{config.family}: {channels}; inpainting models are not supported by the pipeline yet")
    return (Unconditional if config.text_encoder is None else StableDiffusion)(config, parts, hash)


def load(
    path: str | os.PathLike[str], device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> StableDiffusion | Unconditional:
    """Open a minidiff file; ``device`` and ``dtype`` as for :func:`assemble`. Raises :class:`CheckpointError`."""
    found = checkpoint.read(path)
    try:
        return assemble(found.config, found.file.lazy, device, dtype, str(path), found.hash)
    finally:
        found.file.close()  # tensors that were converted need the map no longer; the others hold it themselves


def bundled(device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> StableDiffusion:
    """The small model that ships with minidiff: 64 x 64 pictures of coloured shapes, "a red star on a blue background".

    What it was trained on, and how well it draws, stands in the README; ``scripts/train_shapes.py`` makes it from
    nothing. ``device`` and ``dtype`` as for :func:`assemble`. Raises :class:`UnsupportedError` where it is missing.
    """
    asset = files("minidiff") / BUNDLED
    if not asset.is_file():
        raise UnsupportedError("no model given, and none is bundled with this version; name one with --model PATH")
    with as_file(asset) as path:
        return cast(StableDiffusion, load(path, device, dtype))


def random_model(config: ModelConfig, seed: int = 0) -> StableDiffusion | Unconditional:
    """An untrained model with weights drawn from ``seed``: for trying things out, and where training starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {name: part.to_empty(device="cpu") for name, part in checkpoint.build(config).items()}
        for part in parts.values():
            for module in part.modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
    return from_parts(config, parts)


def _check_output(output: str) -> None:
    check(output in ("pil", "tensor", "latent"), f"output={output!r} is none of 'pil', 'tensor', 'latent'")


def _check_count(name: str, value: Any) -> None:
    check(isinstance(value, int) and value >= 1, f"{name}={value!r} must be a whole number, at least 1")


def _finite(name: str, value: Any) -> float:
    check(isinstance(value, numbers.Real) and math.isfinite(value), f"{name}={value!r} must be a finite number")
    return float(value)


def _note(sampler: Any) -> dict[str, Any]:
    """A sampler for the recipe: its name and options, or what it is called where it is the caller's own."""
    if isinstance(sampler, ProgramSampler):
        return sampler.note
    if name_of(sampler) is None:
        return {"name": type(sampler).__name__, "options": str(sampler)}
    return sampler_to_config(sampler)


def _texts(prompt: str | Sequence[str]) -> list[str]:
    check(isinstance(prompt, (str, Sequence)), f"a prompt must be text or a list of texts, got {prompt!r}")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    check(len(texts) > 0, "prompt is an empty list; give at least one text")
    for t in texts:
        check(isinstance(t, str), f"a prompt must be text, got {t!r}")
    return texts


def _match(negative: Tensor, context: Tensor) -> Tensor:
    """One negative row for every prompt: a single one serves all."""
    if len(negative) == 1:
        negative = negative.expand(len(context), -1, -1)
    shapes = f"{tuple(negative.shape)} and {tuple(context.shape)}"
    check(negative.shape == context.shape, f"negative and positive prompt differ in shape, {shapes}; give one for each")
    return negative
