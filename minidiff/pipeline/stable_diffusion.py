"""Pipeline of models that read a prompt: what encodes it, what the picture begins from, and how it is decoded.

prompt --tokenizer--> ids --text_encoder--> context
seed --noise--> x_T --+
schedule + sampler --plan--> rows --> [ scale_input -> unet -> guidance -> step ] x n --> x_0 --vae.decode--> image
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from minidiff import programs
from minidiff.adapters.control import ControlModel
from minidiff.config import ModelConfig, check
from minidiff.errors import ConfigError, UnsupportedError
from minidiff.models.clip import CLIPText
from minidiff.models.tokenizer import Tokenizer
from minidiff.models.vae import VAE
from minidiff.pipeline import images, prompts
from minidiff.pipeline.dialects.conditioned import in_dialect, measured
from minidiff.pipeline.entrance import Entrance
from minidiff.pipeline.estimate import Extent
from minidiff.pipeline.guidance import Conditioned, Conditions, predictor
from minidiff.pipeline.images import Opened, Pictures
from minidiff.pipeline.latents import FirstSample, Sample
from minidiff.pipeline.prompts import NEGATIVE_SCORE, SCORE, Encoder, Prompt
from minidiff.pipeline.request import Request, Sizes, Text, check_sides
from minidiff.programs import Program

BUNDLED_SCALE = 2.0  # the guidance scale with the most correct pictures (training/README.md)


class StableDiffusion(Entrance):
    """Text-to-image pipeline. Create it with :func:`minidiff.load` or ``weights_convert.load``.

    ``generate`` makes pictures, ``steps`` yields the steps on the way; their arguments are the fields of
    :class:`minidiff.Request`.
    """

    _others = "which knows no text; open it by Unconditional.load"

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
        """Raise :class:`UnsupportedError` for a UNet that does not fit the text encoders or the VAE."""
        unet, vae, family = config.unet, config.vae, config.family
        if (unet.added_dim is not None) != (config.text_encoder_2 is not None):
            raise UnsupportedError(
                f"{family}: a UNet that reads a pooled text needs a second text encoder; one is missing"
            )
        if vae is not None and unet.in_channels not in (vae.latent_channels, 2 * vae.latent_channels + 1):
            channels = f"in_channels={unet.in_channels} of the UNet, latent_channels={vae.latent_channels} of the VAE"
            raise UnsupportedError(f"{family}: {channels}; only mask and masked picture can come beside the latents")
        if vae is not None and unet.out_channels not in (vae.latent_channels, 2 * vae.latent_channels):
            channels = f"out_channels={unet.out_channels} of the UNet, latent_channels={vae.latent_channels} of the VAE"
            raise UnsupportedError(f"{family}: {channels}; only a variance can be predicted beside the latents")

    @property
    def encoders(self) -> list[Encoder]:
        """Pairs of tokenizer and text encoder: one for SD1 and SD2, two for SDXL, only the second for its refiner."""
        names = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
        return [(getattr(self, t), getattr(self, e)) for t, e in names if hasattr(self, e)]

    @property
    def reads_mask(self) -> bool:
        """True if the UNet was trained for inpainting: further input channels take the mask and the masked picture."""
        return self.unet.config.in_channels != self.vae.config.latent_channels

    @property
    def own_scale(self) -> float:
        """Default guidance scale: that of the config; without one 7.5, or 2 for models of coloured shapes."""
        usual = BUNDLED_SCALE if self.config.family == "shapes" else 7.5
        return usual if self.config.guidance_scale is None else self.config.guidance_scale

    @torch.no_grad()
    def encode_prompt(
        self, texts: Text, clip_skip: int = 0, texts_2: Text | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Encode texts for the UNet: context (B, 77, context_dim) and, for SDXL, pooled (B, D'), else None.

        Both have the dtype of the UNet. ``clip_skip``: take the output that many layers earlier than is usual for the
        family. ``texts_2``: input of the second text encoder, one for each of ``texts`` or one for all; None means the
        same texts.
        """
        each = [prompts.texts_of(texts)] * len(self.encoders)
        if texts_2 is not None:
            each[-1] = self._second(texts_2, len(each[0]))
        context, pooled = prompts.encode(self.encoders, each, self.config.text_layer, clip_skip)
        reads = self.unet.config.added_dim is not None
        return context.to(self.device, self.dtype), pooled.to(self.device, self.dtype) if reads else None

    # --- what a job asks for (base.py), in this order ---

    def _check(self, request: Request) -> None:
        """Raise :class:`ConfigError` for options that do not go together, or not with this model."""
        request.check_together()
        check_sides(self.vae.config.factor, request.height, request.width)
        family, given = self.config.family, request.image is not None
        refines = f"this {family} refines pictures: it needs an image, and image is None"
        check(given or not self.config.reads_score, refines)
        paints = f"this {family} model paints into pictures: it needs an image and a mask"
        check(request.mask is not None or not self.reads_mask, paints)

    def _prompts_of(self, request: Request) -> int:
        """Return the number of prompts."""
        if isinstance(request.prompt_embeds, Tensor):
            return max(1, len(request.prompt_embeds))
        return len(prompts.texts_of(request.prompt or ""))

    def _pictures(self, request: Request) -> Opened | None:
        """Return the image and the mask that the run begins from, opened and not yet resized."""
        if request.image is None:
            return None
        c = self.vae.config
        asked = (request.image, request.mask, request.height, request.width)
        return images.open_pictures(*asked, c.factor, c.latent_channels, c.image_channels)

    def _shape(self, request: Request, own: tuple[int, int] | None) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of a picture's latents: the size asked for, that of the picture that is given, or
        that of training."""
        factor, sides = self.vae.config.factor, self.unet.config.sides
        height, width = own or (None, None)
        height, width = request.height or height, request.width or width
        h, w = height // factor if height else sides[0], width // factor if width else sides[1]
        return self.vae.config.latent_channels, h, w

    def _extent(self, request: Request, shape: tuple[int, ...]) -> Extent:
        """Return what the memory of a run with latents of ``shape`` depends on."""
        embeds = request.prompt_embeds
        given = isinstance(embeds, Tensor) and embeds.ndim == 3  # anything else is refused where it is read
        conditionals, tokens = 1, embeds.shape[1] if given and embeds is not None else 0
        if request.prompt_style is not None:
            conditionals, tokens = measured(self, request)
        scale = self.own_scale if request.guidance_scale is None else float(request.guidance_scale)
        guided = programs.read(request.like).guided(scale) or conditionals > 1
        controls = [cast(ControlModel, control.model).config.control for control in request.controls or ()]
        return replace(
            super()._extent(request, shape),
            rows=conditionals + int(guided and self.unet.config.guidance_dim is None),
            tokens=tokens or max(tokenizer.config.length for tokenizer, _ in self.encoders),
            vae_size=self.vae.decoder.conv_in.weight.element_size(),
            encoded=0 if request.image is None else 1,
            decoded=1 if "vae_slices" in self.fast else shape[0],
            tile=self.approximations.get("vae_tiles", 0),
            together="halves" not in self.fast,
            controls=tuple(controls),
        )

    def _conditioned(
        self, request: Request, program: Program, shape: tuple[int, ...], calls: int, made: int
    ) -> Conditioned:
        """Return the UNet with its prompts: encoded, for every picture, guided by the request's scale."""
        if request.prompt_style is not None:
            return in_dialect(self, request, program, shape, calls, made)
        r, scale = request, self.own_scale if request.guidance_scale is None else float(request.guidance_scale)
        given = self._prompt(r.prompt, r.prompt_embeds, r.pooled_prompt_embeds, "prompt", r.prompt_2, r.clip_skip)
        # Where guidance cancels out it is left out: half the work. A model that takes the scale as input needs none.
        guided = program.guided(scale) and self.unet.config.guidance_dim is None
        against = self._negative(request, given, encoded=guided)
        positive = self._conditions(given, shape, r.sizes, SCORE)
        negative: Conditions | None = None
        if guided:
            sizes = r.negative_sizes or (r.sizes and replace(r.sizes, score=None))
            negative = self._conditions(against, shape, sizes, NEGATIVE_SCORE)
        told = [
            {
                "prompt": given.texts[k // r.num_images],
                "negative_prompt": against.texts[k // r.num_images % len(against.texts)],
                "prompt_2": given.second(k // r.num_images),
                "negative_prompt_2": against.second(k // r.num_images),
                "guidance_scale": scale,
            }
            for k in range(shape[0])
        ]
        return Conditioned(
            predict=lambda unet, beside: predictor(unet, [positive], negative, scale, beside, r.guidance_rescale),
            alone=lambda unet, beside: predictor(unet, [positive], None, scale, beside),
            told=told,
            text=True,
            guided=guided,
        )

    def _first(self, first: FirstSample, pictures: Pictures | None, request: Request) -> Sample:
        """Return the first sample: noise, a noised picture, or a picture with a hole."""
        if pictures is None:
            return first.from_noise()
        handed_over = request.denoising_start is not None
        if pictures.mask is None:
            return first.from_picture(pictures, self.vae, handed_over=handed_over)
        return first.from_hole(
            pictures,
            self.vae,
            strength=request.taken_strength,
            handed_over=handed_over,
            reads_mask=self.reads_mask,
        )

    @torch.no_grad()
    def _raw_pixels(self, latents: Tensor) -> Tensor:
        return images.decode(self.vae, latents)

    # --- prompts ---

    def _prompt(
        self,
        given: Text | None,
        embeds: Tensor | None,
        pooled: Tensor | None,
        name: str,
        second: Text | None = None,
        clip_skip: int = 0,
    ) -> Prompt:
        """Return the encoded prompt, or the given embeddings, with the texts for the recipe. ``second``: text for the
        second encoder if it differs."""
        if embeds is None:
            if given is None:
                raise ConfigError(f"{name} is None and {name}_embeds is not given; one of them is needed")
            texts = prompts.texts_of(given)
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

    def _texts(self, given: Text, second: Text | None) -> list[list[str]]:
        """Return the texts of each prompt, one for every encoder."""
        texts = prompts.texts_of(given)
        each = [[text] * len(self.encoders) for text in texts]
        if second is not None:
            for own, other in zip(each, self._second(second, len(texts)), strict=True):
                own[-1] = other
        return each

    def _second(self, given: Text, count: int) -> list[str]:
        """Return the texts for the second encoder, one for each of ``count`` prompts."""
        check(len(self.encoders) > 1, f"a second prompt is given, and this {self.config.family} has one text encoder")
        texts = prompts.texts_of(given)
        texts = texts * count if len(texts) == 1 else texts
        check(len(texts) == count, f"{len(texts)} texts for the second encoder, and {count} for the first")
        return texts

    def _negative(self, request: Request, positive: Prompt, *, encoded: bool) -> Prompt:
        """Return the negative prompt for every prompt. Unless ``encoded``, only its texts matter."""
        given, second, embeds = request.negative_prompt, request.negative_prompt_2, request.negative_prompt_embeds
        n = len(positive.context)
        if given is None and embeds is None and self.config.zero_empty:
            silent = "negative_prompt_2 is given and negative_prompt is not: zeros stand for both; give '' to read it"
            check(second is None, silent)
            zeros = None if positive.pooled is None else torch.zeros_like(positive.pooled)
            return Prompt(torch.zeros_like(positive.context), zeros, [None])
        texts = prompts.texts_of("" if given is None else given)
        if not encoded:
            check(len(texts) in (1, n), f"{len(texts)} negative prompts for {n} prompts")
            others = None if second is None else self._second(second, len(texts))
            return Prompt(positive.context, positive.pooled, list(texts), others)
        if embeds is None and len(texts) == 1:
            texts = texts * n  # encoded in a batch of this size, as in the reference: the bits depend on it
        pooled = request.negative_pooled_prompt_embeds
        return self._prompt(texts, embeds, pooled, "negative_prompt", second).matching(positive)

    def _conditions(self, prompt: Prompt, shape: tuple[int, ...], sizes: Sizes | None, score: float) -> Conditions:
        """Return the conditioning of the UNet: each prompt's for all of its pictures, ``shape[0]`` in all."""
        check(sizes is None or prompt.pooled is not None, "sizes are given, and this UNet reads none (SDXL does)")
        each = shape[0] // len(prompt.context)
        context = prompt.context.repeat_interleave(each, dim=0)
        if prompt.pooled is None:
            return Conditions(context)
        factor = self.vae.config.factor
        numbers = prompts.size_ids(self.config, sizes or Sizes(), shape[2] * factor, shape[3] * factor, score)
        ids = torch.tensor([numbers], dtype=self.dtype, device=self.device).repeat(len(context), 1)
        return Conditions(context, prompt.pooled.repeat_interleave(each, dim=0), ids)
