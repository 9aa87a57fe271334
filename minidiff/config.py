"""Configs of all models: frozen dataclasses, presets by difference, and their JSON form.

A config describes a network (widths, depths, which attention where), not how it is run. It is validated when it is
created, so a model that can be built can also be run. The upper bounds lie far beyond any real model: configs are also
read from files of unknown origin, which must not keep a program building for hours.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from minidiff.console.spelling import near
from minidiff.errors import ConfigError

T = TypeVar("T")

Attention = Literal["none", "text", "self"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]


WIDEST = 2**16  # channels, heads, sides of a picture
MOST_TOKENS = 2**20  # entries of a vocabulary
MOST_LEVELS = 16  # resolutions: the coarsest is 2**15 times smaller by then
MOST_BLOCKS = 512  # ResBlocks and transformer blocks of a network in all; SDXL has about 100


def check(ok: bool, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``ok``."""
    if not ok:
        raise ConfigError(message)


def quote(value: Any) -> str:
    """Return ``value`` for a message, cut to 60 characters, since it may come from a file of unknown origin."""
    huge = isinstance(value, int) and abs(value) >= 10**60  # Python refuses to write out the largest
    shown = f"{'-' if value < 0 else ''}10**60 or more" if huge else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def within(low: float, high: float, **values: float | None) -> None:
    """Raise :class:`ConfigError` for a named value outside ``low``..``high`` or NaN; None is allowed."""
    for name, value in values.items():
        check(value is None or low <= value <= high, f"{name}={quote(value)} must lie in {low}..{high}")


def one_of(known: Collection[Any], **values: Any) -> None:
    """Raise :class:`ConfigError` for a named value that is none of ``known``, with the nearest one as a suggestion."""
    for name, value in values.items():
        names = ", ".join(map(str, known))
        check(value in known, f"{name}={quote(value)} is none of {names}{near(value, known)}")


@dataclass(frozen=True, kw_only=True)
class Level:
    """One resolution of the UNet.

    ``attention``: what follows every ResBlock: "none", a "text" transformer (self-attention, cross-attention to the
    prompt, feed-forward; ``depth`` of them) or plain spatial "self"-attention, as in the first DDPM. ``heads`` is a
    count. (The field that diffusers calls ``attention_head_dim`` is a count too, for SD1 and SD2.) Models from which
    blocks were removed (SSD-1B) have different depths after each ResBlock: ``down_depths`` and ``up_depths`` list them
    in order; None if all are ``depth``.
    """

    channels: int
    attention: Attention = "none"
    depth: int = 1
    heads: int = 8
    down_depths: tuple[int, ...] | None = None
    up_depths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        within(1, WIDEST, channels=self.channels, heads=self.heads)
        for depth in (self.depth, *(self.down_depths or ()), *(self.up_depths or ())):
            within(1, MOST_BLOCKS, depth=depth)
        fits = self.attention == "none" or self.channels % self.heads == 0
        check(fits, f"heads={self.heads} does not divide channels={self.channels}")


def text(channels: int, heads: int, depth: int = 1) -> Level:
    """Create a level whose ResBlocks are followed by transformers that read the prompt."""
    return Level(channels=channels, attention="text", heads=heads, depth=depth)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Config of the UNet of every family: SD1, SD2, SDXL, inpainting (9 input channels) and unconditional DDPM.

    ``levels`` run from the finest to the coarsest resolution; the way up mirrors the way down. Besides widths, the
    families differ in the ``attention`` of the levels, ``linear_proj`` (the projections around a transformer are linear
    layers instead of 1x1 convolutions), ``added_dim`` (SDXL: width of the vector of pooled text and six sinusoids of
    ``added_sinusoid``, five in its refiner), the sinusoid (``sin_first``, ``freq_shift``) and ``asymmetric_down``.
    ``mid_layers``: ResBlocks of the middle, two with the attention of ``mid`` between them, or fewer without attention
    in reduced models (SSD-1B has one, Tiny-SD none).
    """

    levels: tuple[Level, ...]
    mid: Level
    in_channels: int = 4
    out_channels: int = 4
    layers: int = 2  # ResBlocks per level on the way down; one more on the way up
    mid_layers: int = 2
    context_dim: int | None = None  # width of one text token
    linear_proj: bool = False
    added_dim: int | None = None
    added_sinusoid: int = 256
    guidance_dim: int | None = None  # LCM: width of the sinusoid of the guidance scale
    sin_first: bool = False  # SD puts the cosines first, DDPM the sines
    freq_shift: int = 0  # the exponent of the sinusoid runs over half - freq_shift
    asymmetric_down: bool = False  # pad right and bottom only, as DDPM's TensorFlow code did
    upcast_attention: bool = False  # its attention scores overflow in float16 (SD2.1): computed in float32 there
    groups: int = 32
    eps: float = 1e-5
    sample_size: int = 64  # side of the latents (or pixels) that it was trained on
    sample_width: int | None = None  # width if the pictures were not square; sample_size is then the height

    def __post_init__(self) -> None:
        check(0 < len(self.levels) <= MOST_LEVELS, f"{len(self.levels)} levels: a UNet has 1 to {MOST_LEVELS}")
        within(1, WIDEST, in_channels=self.in_channels, out_channels=self.out_channels, context_dim=self.context_dim)
        within(1, WIDEST, added_dim=self.added_dim, guidance_dim=self.guidance_dim, sample_size=self.sample_size)
        within(1, WIDEST, groups=self.groups, layers=self.layers, sample_width=self.sample_width)
        within(1, WIDEST, added_sinusoid=self.added_sinusoid)
        within(0, 1, eps=self.eps)
        within(0, 2, mid_layers=self.mid_layers)
        bare = self.mid_layers == 2 or self.mid.attention == "none"
        check(bare, f"mid_layers={self.mid_layers} leaves no place for attention in the middle, which needs 2")
        for level in self.levels:
            for name, count in (("down_depths", self.layers), ("up_depths", self.layers + 1)):
                depths = getattr(level, name)
                fits = depths is None or (len(depths) == count and level.attention == "text")
                check(fits, f"{name}={quote(depths)} of a level must be {count} depths of text transformers")
        blocks = self.mid.depth + sum(
            1 + d for level in self.levels for d in (*self.down_depths(level), *self.up_depths(level))
        )
        check(
            blocks <= MOST_BLOCKS,
            f"layers={self.layers} and the levels' depths make {blocks} blocks; the limit is {MOST_BLOCKS}",
        )
        first, coarsest = self.levels[0].channels, self.levels[-1].channels
        check(first % 2 == 0, f"the first level's channels={first} must be even: half sines, half cosines")
        within(0, first // 2 - 1, freq_shift=self.freq_shift)
        if self.added_dim is not None:  # five or six sinusoids, and the pooled text takes the rest
            fits = 0 < 5 * self.added_sinusoid < self.added_dim and self.added_sinusoid % 2 == 0
            check(
                fits, f"added_dim={self.added_dim} has no room for five sinusoids of {self.added_sinusoid} and the text"
            )
        check(
            self.mid.channels == coarsest, f"mid.channels={self.mid.channels} differs from the last level's {coarsest}"
        )
        for level in (*self.levels, self.mid):
            check(level.channels % self.groups == 0, f"groups={self.groups} does not divide channels={level.channels}")
            needs = level.attention == "text" and self.context_dim is None
            check(not needs, "a level with attention='text' needs context_dim, which is None")

    @property
    def time_dim(self) -> int:
        """Width of the time embedding: four times the first level's, in every family."""
        return 4 * self.levels[0].channels

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the latents (or pixels) that it was trained on."""
        return self.sample_size, self.sample_width or self.sample_size

    def down_depths(self, level: Level) -> tuple[int, ...]:
        """Return the depth of the transformer after each of a level's ResBlocks on the way down."""
        return level.down_depths or (level.depth,) * self.layers

    def up_depths(self, level: Level) -> tuple[int, ...]:
        """Return the depth of the transformer after each of a level's ResBlocks on the way up."""
        return level.up_depths or (level.depth,) * (self.layers + 1)


SD15 = UNetConfig(
    levels=(text(320, 8), text(640, 8), text(1280, 8), Level(channels=1280)), mid=text(1280, 8), context_dim=768
)
SD21 = replace(
    SD15,
    levels=(text(320, 5), text(640, 10), text(1280, 20), Level(channels=1280)),
    mid=text(1280, 20),
    context_dim=1024,
    linear_proj=True,
    sample_size=96,
    upcast_attention=True,
)
SDXL = replace(
    SD21,
    upcast_attention=False,
    levels=(Level(channels=320), text(640, 10, depth=2), text(1280, 20, depth=10)),
    mid=text(1280, 20, depth=10),
    context_dim=2048,
    added_dim=2816,
    sample_size=128,
)
DDPM_CAT256 = UNetConfig(
    levels=(
        *(Level(channels=c) for c in (128, 128, 256, 256)),
        Level(channels=512, attention="self", heads=1),
        Level(channels=512),
    ),
    mid=Level(channels=512, attention="self", heads=1),
    in_channels=3,
    out_channels=3,
    sin_first=True,
    freq_shift=1,
    asymmetric_down=True,
    eps=1e-6,
    sample_size=256,
)


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(UNetConfig):
    """Config of a ControlNet: that of the UNet whose way down it copies, and that of the network before its picture.

    ``hint_widths``: every width after the first halves the side of the picture. ``bgr``: it reads blue, green, red.
    ``pooled``: its outputs are averaged over the picture, so that it passes on what is there, not where (shuffle).
    """

    image_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    bgr: bool = False
    pooled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.hint_widths)
        check(0 < levels <= MOST_LEVELS, f"{levels} widths before a ControlNet's picture: it has 1 to {MOST_LEVELS}")
        within(1, WIDEST, image_channels=self.image_channels)
        for width in self.hint_widths:
            within(1, WIDEST, hint_widths=width)
        check(self.guidance_dim is None, f"guidance_dim={self.guidance_dim}: a ControlNet reads no guidance scale")

    @property
    def factor(self) -> int:
        """Number of pixels of its picture per latent along a side."""
        return int(2 ** (len(self.hint_widths) - 1))


@dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig:
    """Config of a T2I-Adapter (Mou et al. 2023). ``channels``: width of each of its features, finest first.

    ``factor``: side of the squares of pixels that it reads as one. ``kind``: "full" and "light" halve the side before
    every feature but the first, "xl" once, before the third; "light" computes at a quarter of the width.
    """

    kind: Literal["full", "xl", "light"] = "full"
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    image_channels: int = 3
    factor: int = 8

    def __post_init__(self) -> None:
        one_of(("full", "xl", "light"), kind=self.kind)
        check(0 < len(self.channels) <= MOST_LEVELS, f"{len(self.channels)} features: it has 1 to {MOST_LEVELS}")
        within(1, WIDEST, image_channels=self.image_channels)
        within(1, 256, factor=self.factor)
        read = self.image_channels * self.factor**2
        check(read <= WIDEST, f"factor={self.factor} makes {read} channels of the picture; {WIDEST} is the most")
        within(1, MOST_BLOCKS // MOST_LEVELS, layers=self.layers)
        for width in self.channels:
            within(4 if self.kind == "light" else 1, WIDEST, channels=width)


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Config of a control: a network beside a model, which reads a picture and steers it. ``family``: the models that
    it is made for."""

    family: str
    control: ControlNetConfig | T2IAdapterConfig


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Config of the autoencoder between pixels and latents (Rombach et al. 2022, section 3.1, KL-regularized).

    ``scaling_factor`` gives the latents unit variance: 0.18215 is one over the standard deviation measured on the first
    batch when Stable Diffusion 1 was trained.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)  # finest first; every step but the last halves the side
    image_channels: int = 3
    latent_channels: int = 4
    layers: int = 2
    groups: int = 32
    mid_attention: bool = True
    quant_convs: bool = True  # the 1x1 convolutions on either side of the latents
    scaling_factor: float = 0.18215
    sample_size: int = 512
    upcast: bool = False  # its activations overflow in float16 (SDXL): it stays in float32 then

    def __post_init__(self) -> None:
        check(0 < len(self.channels) <= MOST_LEVELS, f"{len(self.channels)} levels: a VAE has 1 to {MOST_LEVELS}")
        within(1, WIDEST, image_channels=self.image_channels, latent_channels=self.latent_channels, groups=self.groups)
        within(1, MOST_BLOCKS // (2 * MOST_LEVELS), layers=self.layers)
        within(1, WIDEST, sample_size=self.sample_size)
        within(1e-6, 1e6, scaling_factor=self.scaling_factor)
        for c in self.channels:
            within(1, WIDEST, channels=c)
            check(c % self.groups == 0, f"groups={self.groups} does not divide channels={c}")

    @property
    def factor(self) -> int:
        """Number of pixels per latent along a side: 8 for Stable Diffusion."""
        return int(2 ** (len(self.channels) - 1))


VAE_SD = VAEConfig()
VAE_SDXL = replace(VAE_SD, scaling_factor=0.13025, sample_size=1024, upcast=True)


@dataclass(frozen=True, kw_only=True)
class TAESDConfig:
    """Config of the tiny autoencoder (TAESD), a substitute for the large one whose latents are already scaled."""

    width: int = 64
    blocks: tuple[int, ...] = (1, 3, 3, 3)  # finest first, as in the encoder; the decoder has them in reverse order
    image_channels: int = 3
    latent_channels: int = 4
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        check(0 < len(self.blocks) <= MOST_LEVELS, f"{len(self.blocks)} levels: a VAE has 1 to {MOST_LEVELS}")
        within(1, WIDEST, width=self.width, image_channels=self.image_channels, latent_channels=self.latent_channels)
        within(1e-6, 1e6, scaling_factor=self.scaling_factor)
        for n in self.blocks:
            within(0, MOST_BLOCKS // (2 * MOST_LEVELS), blocks=n)

    @property
    def factor(self) -> int:
        """Number of pixels per latent along a side."""
        return int(2 ** (len(self.blocks) - 1))


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Config of the text encoder, a causal transformer over token ids (Radford et al. 2021)."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp: int = 3072
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int | None = None  # width of the pooled output; None: the pooled token is not projected
    vocab: int = 49408
    kept: tuple[int, ...] | None = None  # ids, ascending, with a vector of their own; the others share one. None: all
    positions: int = 77
    # The pooled output is that of the first token with this id; None: with the largest id, as in CLIP's own code.
    end_token: int | None = 49407
    eps: float = 1e-5

    def __post_init__(self) -> None:
        within(1, WIDEST, width=self.width, heads=self.heads, mlp=self.mlp, projection=self.projection)
        within(1, WIDEST, positions=self.positions)
        within(1, MOST_BLOCKS, layers=self.layers)
        within(1, MOST_TOKENS, vocab=self.vocab)
        within(0, MOST_TOKENS, end_token=self.end_token)
        within(0, 1, eps=self.eps)
        check(self.width % self.heads == 0, f"heads={self.heads} does not divide width={self.width}")
        if self.kept is not None:
            rising = all(a < b for a, b in itertools.pairwise((-1, *self.kept, self.vocab)))
            check(rising, f"kept={quote(self.kept)} must be ids below vocab={self.vocab} in ascending order")


CLIP_L = CLIPTextConfig()
OPENCLIP_H = CLIPTextConfig(width=1024, layers=23, heads=16, mlp=4096, activation="gelu")
OPENCLIP_BIGG = CLIPTextConfig(width=1280, layers=32, heads=20, mlp=5120, activation="gelu", projection=1280)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer settings: the byte-pair table that turns text into ids, and the padding of short prompts.

    ``vocab`` and ``merges`` are None for the public CLIP table, which ships with minidiff; otherwise they hold the
    checkpoint's own vocabulary (tokens in the order of their ids) and merges. ``added``: learned words
    (adapters/words.py), each with the number of its vectors; their ids follow those of the vocabulary.
    """

    pad: int = 49407  # SD1 pads with the end token, SD2 and SDXL's second encoder with 0
    length: int = 77
    vocab: tuple[str, ...] | None = None
    merges: tuple[tuple[str, str], ...] | None = None
    added: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name, count in self.added:
            check(name != "" and not any(c.isspace() for c in name), f"added: {quote(name)} must be one word")
            within(1, WIDEST, added=count)
        within(2, WIDEST, length=self.length)  # the start and end tokens alone need 2
        within(0, MOST_TOKENS, pad=self.pad)
        check((self.vocab is None) == (self.merges is None), "vocab and merges must be given together")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Noise settings of training: the amount of noise at each timestep, and the prediction type.

    Betas lie in 0..1; ``betas`` (given outright) replaces ``beta_schedule``. ``zero_snr`` rescales them so that
    the last timestep is pure noise (Lin et al. 2023, algorithm 1).
    """

    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    prediction: Prediction = "epsilon"
    zero_snr: bool = False
    betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        within(1, 100_000, steps=self.steps)
        within(0, 1, beta_start=self.beta_start, beta_end=self.beta_end)
        for beta in self.betas or ():
            within(0, 1, betas=beta)
        fits = self.betas is None or len(self.betas) == self.steps
        check(fits, f"steps={self.steps} but {len(self.betas or ())} betas are given")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Config of a whole checkpoint: its parts (None if the family has none) and its default sampler.

    ``sampler``: name and options of a sampler, as ``samplers.sampler_from_config`` reads them. ``text_layer``: layer of
    the text encoders that the UNet reads. ``zero_empty``: trained with zeros instead of the encoded empty text where
    there is no prompt (SDXL base). ``guidance_scale``: default scale of a request; None: 7.5, and 2 for the family
    "shapes" (training/README.md), whose first files do not contain it.
    """

    family: str
    unet: UNetConfig
    schedule: ScheduleConfig
    sampler: dict[str, Any] = field(default_factory=dict)
    vae: VAEConfig | TAESDConfig | None = None
    text_encoder: CLIPTextConfig | None = None
    tokenizer: TokenizerConfig | None = None
    text_encoder_2: CLIPTextConfig | None = None
    tokenizer_2: TokenizerConfig | None = None
    text_layer: Literal["last", "penultimate"] = "last"
    zero_empty: bool = False
    guidance_scale: float | None = None

    def __post_init__(self) -> None:
        pairs = ((self.text_encoder, self.tokenizer), (self.text_encoder_2, self.tokenizer_2))
        for encoder, tokenizer in pairs:
            check((encoder is None) == (tokenizer is None), "a text encoder and its tokenizer must be given together")
            if encoder is None or tokenizer is None:
                continue
            check(self.vae is not None, "a model with a text encoder needs a VAE, and vae is None")
            fits = tokenizer.length <= encoder.positions
            check(
                fits, f"the tokenizer's length={tokenizer.length} exceeds the encoder's positions={encoder.positions}"
            )
            tokens = CLIPTextConfig.vocab if tokenizer.vocab is None else len(tokenizer.vocab)
            tokens += sum(count for _, count in tokenizer.added)
            check(tokens <= encoder.vocab, f"the tokenizer has {tokens} tokens, the text encoder vocab={encoder.vocab}")
        lengths = {tokenizer.length for _, tokenizer in pairs if tokenizer is not None}
        check(len(lengths) < 2, f"the tokenizers' lengths {sorted(lengths)} differ, and their texts are joined")
        width = sum(encoder.width for encoder, _ in pairs if encoder is not None)
        fits = width in (0, self.unet.context_dim)
        check(fits, f"context_dim={self.unet.context_dim} of the UNet differs from the text encoder's width={width}")
        if self.unet.added_dim is not None and self.text_encoder_2 is not None:
            pooled = self.text_encoder_2.projection or self.text_encoder_2.width
            rest = self.unet.added_dim - pooled
            fits = rest in (5 * self.unet.added_sinusoid, 6 * self.unet.added_sinusoid)
            told = f"five or six sinusoids of {self.unet.added_sinusoid}"
            check(fits, f"added_dim={self.unet.added_dim} of the UNet is not {told} and a pooled text of {pooled}")

    @property
    def reads_score(self) -> bool:
        """True if the UNet reads five numbers, the last of them a score, instead of six sizes: SDXL's refiner."""
        c, text = self.unet, self.text_encoder_2
        if c.added_dim is None or text is None:
            return False
        return c.added_dim - (text.projection or text.width) == 5 * c.added_sinusoid


def to_json(config: Any) -> str:
    """Return any config as one line of JSON; :func:`from_json` restores it."""
    return json.dumps(dataclasses.asdict(config), separators=(",", ":"))


def from_json(cls: type[T], data: str | Mapping[str, Any]) -> T:
    """Build config ``cls`` from JSON text or the dict it parses to.

    Raises :class:`ConfigError` for text that is no JSON, a field that ``cls`` does not have or lacks, or a value of
    the wrong type, quoting it.
    """
    try:
        if isinstance(data, str):
            data = json.loads(data)
        return typing.cast(T, read_value(cls, data, cls.__name__))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{cls.__name__}: not valid JSON ({e})") from None


def _has_fields(kind: Any, value: Any) -> bool:
    """Return True if ``value`` (parsed JSON) may be a dataclass ``kind``: it has no other fields."""
    known = {f.name for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return isinstance(value, Mapping) and known.issuperset(value)


def read_value(kind: Any, value: Any, where: str) -> Any:
    """Convert ``value`` (parsed JSON) to type ``kind``; ``where`` names the place in messages.

    Raises :class:`ConfigError` for a value of another type.
    """
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected an object, got {quote(value)}")
        hints, fields = get_type_hints(kind), dataclasses.fields(kind)
        unknown = sorted(map(str, set(value) - {f.name for f in fields}))
        guess = near(unknown[0], (f.name for f in fields)) if unknown else ""
        check(not unknown, f"{where}: unknown field {', '.join(map(quote, unknown[:3]))}{guess}")
        required = {
            f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing = sorted(required - set(value))
        check(not missing, f"{where}: field {', '.join(missing)} is missing")
        return kind(**{k: read_value(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    origin, args = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        return read_value(next((k for k in kinds if _has_fields(k, value)), kinds[0]), value, where)
    if origin is Literal:
        one_of(args, **{where: value})
        return value
    if origin is tuple:
        check(isinstance(value, (list, tuple)), f"{where}: expected a list, got {quote(value)}")
        short = not dataclasses.is_dataclass(args[0]) or len(value) <= MOST_LEVELS
        check(short, f"{where}: {len(value)} entries; {MOST_LEVELS} is the most")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        check(len(kinds) == len(value), f"{where}: expected {len(kinds)} entries, got {len(value)}")
        return tuple(read_value(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        check(abs(value) < 2**1023, f"{where}={quote(value)} is out of range")
        return float(value)
    base = origin or kind
    fits = isinstance(value, base) and (base is bool or not isinstance(value, bool))
    check(fits, f"{where}: expected {base.__name__}, got {quote(value)}")
    return value
