"""The pipelines: from prompt to picture. This is the only module that combines all parts.

prompt --tokenizer--> ids --text_encoder--> context
seed --noise--> x_T --+
schedule + sampler --plan--> rows --> [ scale_input -> unet -> guidance -> step ] x n --> x_0 --vae.decode--> image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast, overload

import torch
from torch import Tensor, nn

from minidiff import noise
from minidiff.config import ModelConfig, check
from minidiff.console.progress import check_progress
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.models.clip import CLIPText
from minidiff.models.tokenizer import Tokenizer
from minidiff.models.vae import VAE
from minidiff.pipeline import prompts
from minidiff.pipeline.base import Like, Output, Pipeline, SamplerChoice, Seed, check_count, check_output, finite
from minidiff.pipeline.conditions import Conditions, predictor
from minidiff.pipeline.denoise import Progress, Run
from minidiff.pipeline.images import Pictures
from minidiff.pipeline.memory import check_fits
from minidiff.pipeline.prompts import NEGATIVE_SCORE, SCORE, Encoder, Prompt, Sizes
from minidiff.pipeline.request import Request, check_sides, usual_strength
from minidiff.programs import read, starts
from minidiff.programs.program import ProgramSampler

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.pipeline.images import Picture

BUNDLED_SCALE = 2.0  # the guidance scale with the most correct pictures (training/README.md)


class StableDiffusion(Pipeline):
    """Text-to-image pipeline. Create it with :func:`minidiff.load` or ``weights_convert.load``."""

    def __init__(self, config: ModelConfig, parts: Mapping[str, nn.Module], hash: str = "") -> None:
        super().__init__(config, parts, hash)
        self.vae = cast(VAE, parts["vae"])
        if config.tokenizer is not None:
            self.tokenizer = Tokenizer(config.tokenizer)
            self.text_encoder = cast(CLIPText, parts["text_encoder"])
        if config.tokenizer_2 is not None:
            self.tokenizer_2 = Tokenizer(config.tokenizer_2)
            self.text_encoder_2 = cast(CLIPText, parts["text_encoder_2"])

    @staticmethod
    def fits(config: ModelConfig) -> bool:
        """Return True for a model with a text encoder."""
        return config.text_encoder is not None or config.text_encoder_2 is not None

    @classmethod
    def _check_config(cls, config: ModelConfig) -> None:
        """Raise :class:`UnsupportedError` for a UNet that fits neither the text encoders nor the VAE."""
        unet, vae, family = config.unet, config.vae, config.family
        if (unet.added_dim is not None) != (config.text_encoder_2 is not None):
            raise UnsupportedError(
                f"{family}: a UNet that reads a pooled text needs a second text encoder; one is missing"
            )
        if vae is not None and unet.in_channels not in (vae.latent_channels, 2 * vae.latent_channels + 1):
            channels = f"in_channels={unet.in_channels} of the UNet, latent_channels={vae.latent_channels} of the VAE"
            raise UnsupportedError(f"{family}: {channels}; only mask and masked picture can come beside the latents")

    @property
    def encoders(self) -> list[Encoder]:
        """Pairs of tokenizer and text encoder: one for SD1 and SD2, two for SDXL, only the second for its refiner."""
        names = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
        return [(getattr(self, t), getattr(self, e)) for t, e in names if hasattr(self, e)]

    @torch.no_grad()
    def encode_prompt(
        self, texts: str | Sequence[str], clip_skip: int = 0, texts_2: str | Sequence[str] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode texts for the UNet: context (B, 77, context_dim) and, for SDXL, pooled (B, D'), else None.

        Both have the dtype of the UNet. ``clip_skip``: take the output that many layers earlier than is usual for the
        family. ``texts_2``: input of the second text encoder, one for each of ``texts`` or one for all; None means the
        same texts.
        """
        each = [_texts(texts)] * len(self.encoders)
        if texts_2 is not None:
            each[-1] = self._second(texts_2, len(each[0]))
        context, pooled = prompts.encode(self.encoders, each, self.config.text_layer, clip_skip)
        reads = self.unet.config.added_dim is not None
        return context.to(self.device, self.dtype), pooled.to(self.device, self.dtype) if reads else None

    @overload
    def generate(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int = 50,
        guidance_scale: float | None = None,
        sampler: SamplerChoice = None,
        num_images: int = 1,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output: Literal["pil"] = "pil",
        progress: Progress = None,
        *,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        sizes: Sizes | None = None,
        negative_sizes: Sizes | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int = 0,
        like: Like = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> list[Image.Image]: ...

    @overload
    def generate(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int = 50,
        guidance_scale: float | None = None,
        sampler: SamplerChoice = None,
        num_images: int = 1,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        output: Literal["tensor", "latent"],
        progress: Progress = None,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        sizes: Sizes | None = None,
        negative_sizes: Sizes | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int = 0,
        like: Like = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> Tensor: ...

    def generate(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int = 50,
        guidance_scale: float | None = None,
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
        progress: Progress = None,
        *,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        sizes: Sizes | None = None,
        negative_sizes: Sizes | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int = 0,
        like: Like = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Generate ``num_images`` pictures for each prompt, in the order of the prompts.

        ``prompt``: one text or several, or None if ``prompt_embeds`` (P, 77, context_dim) is given.
        ``negative_prompt``: content to avoid; None means the empty text or, for a model trained that way (SDXL base),
        zeros in place of a text.
        ``steps``: 1 or more. ``guidance_scale``: strength of the prompt; None takes the model's default (7.5, or 2 for
        the bundled model), 1 is the plain conditional prediction, 0 ignores the prompt. (Few-step models such as
        SDXL-Turbo need 1, which corresponds to 0 in diffusers.)
        ``sampler``: None for the checkpoint's own, a name from ``SAMPLERS``, {"name": ..., options}, or a Sampler.
        ``seed``: image k draws from ``Generator().manual_seed(seed + k)``; a list gives one seed per image; None picks
        a random seed. ``generator``: in place of a seed, one for the whole batch as in diffusers, or one per image.
        ``height``, ``width``: pixels, divisible by 8; by default the training size, or the size of ``image``.
        ``latents``: initial noise of unit variance, (B, C, height / 8, width / 8).
        ``output``: "pil" for a list of PIL images that carry their recipe, "tensor" for float (B, 3, H, W) in [0, 1],
        "latent" for (B, C, h, w). ``progress``: None shows a bar on a terminal or in a notebook and nothing elsewhere;
        True also prints a line now and then elsewhere; False shows nothing; a function is called with each
        :class:`Step`.

        ``image``: picture to start from (img2img): a path, a PIL image, a list of them, a tensor (N, 3, H, W) in
        [0, 1], or latents (N, C, h, w). PIL images are resized with Lanczos, tensors with nearest neighbour.
        ``strength`` in 0..1 (None: 0.8, or 1 with a mask): noise is added to the picture, and the last
        int(steps * strength) steps are run.
        ``mask`` (inpainting), of the size of ``image``: white (0.5 and above) is repainted, black is kept.
        ``denoising_end``, ``denoising_start``: stop, or start with the latents ``image``, at that fraction of the way
        from noise to picture. SDXL's base hands over to its refiner this way, for instance with 0.8 for both.
        ``sizes``, ``negative_sizes``: the picture sizes that condition SDXL. ``pooled_prompt_embeds`` (P, D'): goes
        with ``prompt_embeds`` for SDXL. ``clip_skip``: encode the prompt (not the negative one, as in diffusers) with
        that many layers fewer.
        ``like``: reproduce another program, "diffusers", "ldm", "k-diffusion", "a1111" or "comfyui"
        (``minidiff.programs``): its noise levels, its noise and its rule for guidance. Explicit arguments take
        precedence.
        ``prompt_2``, ``negative_prompt_2``: texts for SDXL's second text encoder if they differ from the first; one
        for each prompt, or one for all. ``guidance_rescale`` in 0..1: amount of rescaling against the overexposure of
        strong guidance (Lin et al. 2023, section 3.4, recommend 0.7). ``guidance_interval``: (low, high), fractions of
        the way from noise (0) to picture (1), as in ``denoising_end``. Outside it, only the conditional prediction is
        computed, at half the cost (Kynkäänniemi et al. 2024). The result is a different picture, not the same one
        sooner. On Stable Diffusion's schedule the paper's interval for SDXL, sigma 5.42 to 0.28, is (0.19, 0.93).

        Raises :class:`ConfigError` for invalid values, before the first model call, and :class:`MinidiffError` if a
        value overflows during the run, naming the module.
        """
        check_output(output)
        check_progress(progress)
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
            image=image,
            strength=strength,
            mask=mask,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            sizes=sizes,
            negative_sizes=negative_sizes,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            clip_skip=clip_skip,
            like=like,
            prompt_2=prompt_2,
            negative_prompt_2=negative_prompt_2,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
        )
        return self._deliver(run, output, progress)

    def steps(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None = None,
        steps: int = 50,
        guidance_scale: float | None = None,
        sampler: SamplerChoice = None,
        num_images: int = 1,
        seed: Seed = None,
        generator: noise.Generators | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        image: Picture | None = None,
        strength: float | None = None,
        mask: Picture | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        sizes: Sizes | None = None,
        negative_sizes: Sizes | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int = 0,
        like: Like = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
    ) -> Run:
        """Return the denoising of :meth:`generate` as an iterator with one :class:`Step` per model call.

        Arguments are checked and the prompt and the image are encoded before it returns. ``x`` of the last step holds
        the finished latents, (B, C, height / 8, width / 8); :meth:`decode` turns them into pixels.
        """
        strength = usual_strength(mask is not None) if strength is None else strength
        convention = None if like is None else read(like)
        sampler = self.sampler(sampler, convention)
        asked = Request(
            image=image,
            strength=strength,
            mask=mask,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            sizes=sizes,
            negative_sizes=negative_sizes,
            clip_skip=clip_skip,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
        )
        begun = asked.begun(convention, sampler, steps, len(self.schedule))
        planned = steps if begun is None else begun.steps
        plan = sampler.plan(self.schedule, planned)
        rows = asked.rows(plan, steps, sampler, self.config, reads_mask=self.reads_mask, begun=begun)
        unguided = asked.unguided(plan, rows, sampler, self.config)
        check_count("num_images", num_images)
        check_sides(self.vae.config.factor, height, width)
        wanted = num_images * (len(prompt_embeds) if isinstance(prompt_embeds, Tensor) else len(_texts(prompt or "")))
        unsaid = None if image is None else self.vae.config.factor  # the picture decides, and may be small
        self._check_memory(wanted, self._latent_shape(height or unsaid, width or unsaid, None))
        pictures = asked.pictures(self.config, height, width)
        shape = self._latent_shape(height, width, pictures)
        self._check_memory(wanted, shape)
        scale = self.own_scale if guidance_scale is None else finite("guidance_scale", guidance_scale)

        given = self._prompt(prompt, prompt_embeds, pooled_prompt_embeds, "prompt", prompt_2, clip_skip)
        # At exactly 1 the negative prompt cancels out: half the work. A model that takes the scale as input needs none.
        guided = scale != 1 if convention is None else convention.guided(scale)
        guided = guided and self.unet.config.guidance_dim is None
        against = self._negative(
            negative_prompt,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            given,
            negative_prompt_2,
            encoded=guided,
        )
        positive = self._conditions(given, num_images, shape, sizes, SCORE)
        negative: Conditions | None = None
        if guided:
            told = negative_sizes or (sizes and replace(sizes, score=None))
            negative = self._conditions(against, num_images, shape, told, NEGATIVE_SCORE)
        count = len(positive.context)

        streams = convention.streams(seed, count) if convention is not None and generator is None else None
        if streams is not None and isinstance(sampler, ProgramSampler):
            sampler = sampler.seeded(streams.seeds)
            plan = sampler.plan(self.schedule, planned)
        noised = None if begun is None else starts.rows(begun, plan, getattr(sampler, "order", 1))[1]
        full = (count, *shape)
        begin, origins = self._begin(sampler, plan, rows, full, latents, seed, generator, streams, noised)
        if pictures is None:
            start = begin.from_noise()
        elif pictures.mask is None:
            start = begin.from_picture(pictures, self.vae, handed_over=denoising_start is not None)
        else:
            start = begin.from_hole(
                pictures,
                self.vae,
                strength=strength,
                handed_over=denoising_start is not None,
                reads_mask=self.reads_mask,
            )
        labels = [
            {
                "prompt": given.texts[k // num_images],
                "negative_prompt": against.texts[k // num_images % len(against.texts)],
                **_second_texts(given, against, k // num_images),
                "guidance_scale": scale,
                "width": shape[2] * self.vae.config.factor,
                "height": shape[1] * self.vae.config.factor,
                **asked.noted(),
                **({} if convention is None else {"like": str(convention)}),
            }
            for k in range(count)
        ]
        predict = predictor(self.unet, positive, negative, scale, start.beside, guidance_rescale)
        alone = predictor(self.unet, positive, None, scale, start.beside)
        return self._run(predict, begin, start, labels, origins, steps, dict.fromkeys(unguided, alone))

    @property
    def own_scale(self) -> float:
        """Default guidance scale: 7.5, or 2 for the bundled model and models trained from it."""
        return BUNDLED_SCALE if self.config.family == "shapes" else 7.5

    @property
    def reads_mask(self) -> bool:
        """True if the UNet was trained for inpainting: further input channels take the mask and the masked picture."""
        return self.unet.config.in_channels != self.vae.config.latent_channels

    @torch.no_grad()
    def _raw_pixels(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.decoder.conv_in.weight)  # its device and dtype
        # Division by the factor: multiplication by its reciprocal would round differently.
        return self.vae.decode(latents / self.vae.config.scaling_factor)

    def _check_memory(self, count: int, shape: tuple[int, int, int]) -> None:
        """Raise :class:`ConfigError` if ``count`` pictures with latents of ``shape`` do not fit into memory."""
        factor = self.vae.config.factor
        sliced, tiled = "vae_slices" in self.fast, "vae_tiles" in self.approximations
        sides, at_once = (shape[1] * factor, shape[2] * factor), 0 if tiled else 1 if sliced else count
        check_fits(self.config, count, *sides, device=self.device, size=self.dtype.itemsize, at_once=at_once)

    def _latent_shape(self, height: int | None, width: int | None, pictures: Pictures | None) -> tuple[int, int, int]:
        factor = self.vae.config.factor
        sides = self.unet.config.sides
        size = (height // factor if height else sides[0], width // factor if width else sides[1])
        if pictures is not None:
            found = pictures.pixels.shape[2:]
            size = (found[0], found[1]) if pictures.encoded else (found[0] // factor, found[1] // factor)
        return self.vae.config.latent_channels, *size

    def _prompt(
        self,
        given: str | Sequence[str] | None,
        embeds: Tensor | None,
        pooled: Tensor | None,
        name: str,
        second: str | Sequence[str] | None = None,
        clip_skip: int = 0,
    ) -> Prompt:
        """Return the encoded prompt, or the given embeddings, with the texts for the recipe. ``second``: text for the
        second encoder if it differs."""
        if embeds is None:
            if given is None:
                raise ConfigError(f"{name} is None and {name}_embeds is not given; one of them is needed")
            texts = _texts(given)
            others = None if second is None else self._second(second, len(texts))
            return Prompt(*self.encode_prompt(texts, clip_skip, others), list(texts), others)
        check(second is None, f"{name}_2 and {name}_embeds are both given; one of them says what the encoders read")
        check(isinstance(embeds, Tensor), f"{name}_embeds must be a tensor, got {type(embeds).__name__}")
        width = self.unet.config.context_dim
        fits = embeds.ndim == 3 and embeds.shape[2] == width and embeds.numel() > 0
        check(fits, f"{name}_embeds has shape {tuple(embeds.shape)}; (prompts, tokens, {width}) is wanted")
        if self.unet.config.added_dim is not None:
            if not isinstance(pooled, Tensor):
                raise ConfigError(
                    f"{name}_embeds is given to a UNet that reads a pooled text too: pooled_{name}_embeds"
                )
            fits = pooled.ndim == 2 and len(pooled) == len(embeds)
            check(fits, f"pooled_{name}_embeds has shape {tuple(pooled.shape)}; ({len(embeds)}, width) is wanted")
            pooled = pooled.to(self.device, self.dtype)
        return Prompt(embeds.to(self.device, self.dtype), pooled, [None] * len(embeds))

    def _second(self, given: str | Sequence[str], count: int) -> list[str]:
        """Return the texts for the second encoder, one for each of ``count`` prompts."""
        check(len(self.encoders) > 1, f"a second prompt is given, and this {self.config.family} has one text encoder")
        texts = _texts(given)
        texts = texts * count if len(texts) == 1 else texts
        check(len(texts) == count, f"{len(texts)} texts for the second encoder, and {count} for the first")
        return texts

    def _negative(
        self,
        given: str | Sequence[str] | None,
        embeds: Tensor | None,
        pooled: Tensor | None,
        positive: Prompt,
        second: str | Sequence[str] | None = None,
        *,
        encoded: bool,
    ) -> Prompt:
        """Return the negative prompt for every prompt. Unless ``encoded``, only its texts matter."""
        n = len(positive.context)
        if given is None and embeds is None and self.config.zero_empty:
            silent = "negative_prompt_2 is given and negative_prompt is not: zeros stand for both; give '' to read it"
            check(second is None, silent)
            zeros = None if positive.pooled is None else torch.zeros_like(positive.pooled)
            return Prompt(torch.zeros_like(positive.context), zeros, [None])
        texts = _texts("" if given is None else given)
        if not encoded:
            check(len(texts) in (1, n), f"{len(texts)} negative prompts for {n} prompts")
            others = None if second is None else self._second(second, len(texts))
            return Prompt(positive.context, positive.pooled, list(texts), others)
        if embeds is None and len(texts) == 1:
            texts = texts * n  # encoded in a batch of this size, as in the reference: the bits depend on it
        found = self._prompt(texts, embeds, pooled, "negative_prompt", second)
        return Prompt(*_match(found, positive), found.texts, found.texts_2)

    def _conditions(
        self, prompt: Prompt, num_images: int, shape: tuple[int, int, int], sizes: Sizes | None, score: float
    ) -> Conditions:
        """Return the conditioning of the UNet for ``num_images`` pictures of each prompt."""
        check(sizes is None or prompt.pooled is not None, "sizes are given, and this UNet reads none (SDXL does)")
        context = prompt.context.repeat_interleave(num_images, dim=0)
        if prompt.pooled is None:
            return Conditions(context)
        factor = self.vae.config.factor
        numbers = prompts.size_ids(self.config, sizes or Sizes(), shape[1] * factor, shape[2] * factor, score)
        ids = torch.tensor([numbers], dtype=self.dtype, device=self.device).repeat(len(context), 1)
        return Conditions(context, prompt.pooled.repeat_interleave(num_images, dim=0), ids)


def _texts(prompt: str | Sequence[str]) -> list[str]:
    check(isinstance(prompt, (str, Sequence)), f"a prompt must be text or a list of texts, got {prompt!r}")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    check(len(texts) > 0, "prompt is an empty list; give at least one text")
    for t in texts:
        check(isinstance(t, str), f"a prompt must be text, got {t!r}")
    return texts


def _second_texts(given: Prompt, against: Prompt, k: int) -> dict[str, str]:
    """Return the second encoder's texts for prompt ``k``, for the recipe, if they differ from the first encoder's."""
    both = {"prompt_2": given.texts_2, "negative_prompt_2": against.texts_2}
    return {name: texts[k % len(texts)] for name, texts in both.items() if texts is not None}


def _match(negative: Prompt, positive: Prompt) -> tuple[Tensor, Tensor | None]:
    """Return one negative row for every prompt; a single row is expanded to all."""
    context, pooled = negative.context, negative.pooled
    if len(context) == 1:
        context = context.expand(len(positive.context), -1, -1)
        pooled = None if pooled is None else pooled.expand(len(context), -1)
    shapes = f"{tuple(context.shape)} and {tuple(positive.context.shape)}"
    fits = context.shape == positive.context.shape
    check(fits, f"negative and positive prompt differ in shape, {shapes}; give one for each")
    return context, pooled
