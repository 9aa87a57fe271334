"""Random configurations, held against the reference: UNets, autoencoders, text encoders, tokenizers, whole pipelines.

A case is a kind and a number. It draws a configuration with odd values of the options below, which cover every argument
of the constructors (tests/parity/test_configs.py holds the list against their signatures), lets the reference build and
save a small model with it, sometimes spoils a line of the saved JSON, and reads the folder with the reference and with
the production converter. What both can read must give the same bits; what minidiff cannot do it refuses with one of its
errors. Any other end is a fault: another output, or an error that is none of minidiff's.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import weights_convert
from minidiff.errors import MinidiffError
from minidiff.models.tokenizer import Tokenizer, clip_table
from minidiff.models.tokenizer_files import tokenizer_config
from minidiff.samplers.diffusers.classes import READERS
from tests.support.parity import twins
from weights_convert.component import meta_model, read_component

Random = random.Random
Options = dict[str, list[Any]]
FAULTS = ("different", "raw error")
HUGE = (2**70, 10**400, float("inf"))
ODD = (None, True, False, 0, 1, -1, 0.5, "8", "", "true", [], {}, [[1]], [4], [8, 8], float("nan"), *HUGE)

UNET: Options = {
    "sample_size": [8, 16, None, (8, 12), [8, 8]],
    "in_channels": [4, 9, 3],
    "out_channels": [4, 3],
    "center_input_sample": [False, True],
    "flip_sin_to_cos": [True, False],
    "freq_shift": [0, 1, 2],
    "mid_block_type": ["UNetMidBlock2DCrossAttn", None, "UNetMidBlock2D", "UNetMidBlock2DSimpleCrossAttn"],
    "only_cross_attention": [False, True, [False] * 3, [True, False, False]],
    "block_out_channels": [(16, 32, 32), (32, 32, 64), (16, 24, 40)],
    "layers_per_block": [2, 1, [1, 1, 1], [1, 2, 1]],
    "downsample_padding": [1, 0, 2],
    "mid_block_scale_factor": [1, 1.0, 2],
    "dropout": [0.0, 0.1],
    "act_fn": ["silu", "swish", "gelu", "mish"],
    "norm_num_groups": [8, 4, 2, None],
    "norm_eps": [1e-5, 1e-6, 1e-3],
    "cross_attention_dim": [24, 32, [24, 24, 24], [24, 32, 24]],
    "transformer_layers_per_block": [1, 2, [1, 2, 1], [1, 1, 3], [1, [2, 1], [3, 2]], [[1, 1], 2, 1]],
    "reverse_transformer_layers_per_block": [None, None, [1, 2, 1], [[4, 1, 2], [2, 1, 1], 1], [2, 1, [1, 2, 3]]],
    "encoder_hid_dim": [None, 16],
    "encoder_hid_dim_type": [None, "text_proj", "image_proj"],
    "attention_head_dim": [4, 2, 8, [2, 4, 8], [4, 4, 4]],
    "num_attention_heads": [None, 4],
    "dual_cross_attention": [False, True],
    "use_linear_projection": [False, True],
    "class_embed_type": [None, "timestep", "identity", "projection", "simple_projection"],
    "addition_embed_type": [None, "text", "text_time", "text_image", "image", "image_hint"],
    "addition_time_embed_dim": [8, None, 4],
    "num_class_embeds": [None, 10],
    "upcast_attention": [False, True],
    "resnet_time_scale_shift": ["default", "scale_shift", "ada_group"],
    "resnet_skip_time_act": [False, True],
    "resnet_out_scale_factor": [1.0, 1, 2.0],
    "time_embedding_type": ["positional", "fourier", "learned"],
    "time_embedding_dim": [None, 64, 128, 96],
    "time_embedding_act_fn": [None, "silu"],
    "timestep_post_act": [None, "silu"],
    "time_cond_proj_dim": [None, 16],
    "conv_in_kernel": [3, 1, 5],
    "conv_out_kernel": [3, 1, 5],
    "projection_class_embeddings_input_dim": [20 + 6 * 8, None, 20 + 5 * 8],
    "attention_type": ["default", "gated"],
    "class_embeddings_concat": [False, True],
    "mid_block_only_cross_attention": [None, False, True],
    "cross_attention_norm": [None, "layer_norm", "group_norm"],
    "addition_embed_type_num_heads": [64, 8],
}
# The two lists of blocks are drawn together; "-" is the attention of the class.
LADDERS = ("--.", ".--", "---", "...", ".-.")
PLAIN: Options = {
    key: UNET[key]
    for key in (
        *("sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift"),
        *("block_out_channels", "downsample_padding", "mid_block_scale_factor", "dropout", "norm_num_groups"),
        *("norm_eps", "num_class_embeds", "act_fn", "resnet_time_scale_shift"),
    )
} | {
    "layers_per_block": [2, 1],
    "time_embedding_type": ["positional", "fourier", "learned"],
    "time_embedding_dim": [None, 64, 96],
    "mid_block_type": ["UNetMidBlock2D", None],
    "downsample_type": ["conv", "resnet"],
    "upsample_type": ["conv", "resnet"],
    "attention_head_dim": [8, 4, None, 2],
    "attn_norm_num_groups": [None, 8, 4],
    "add_attention": [True, False],
    "class_embed_type": [None, "timestep", "identity"],
    "num_train_timesteps": [None, 1000],
}
VAE: Options = {
    "in_channels": [3, 1, 4],
    "out_channels": [3, 1],
    "down_block_types": [("DownEncoderBlock2D",) * 3, ("AttnDownEncoderBlock2D",) * 3, ("DownEncoderBlock2D",)],
    "up_block_types": [("UpDecoderBlock2D",) * 3, ("AttnUpDecoderBlock2D",) * 3],
    "block_out_channels": [(16, 32, 48), (8, 8, 16), (16, 16)],
    "layers_per_block": [1, 2, 3],
    "act_fn": ["silu", "swish", "gelu"],
    "latent_channels": [4, 8, 3],
    "norm_num_groups": [8, 4, None],
    "sample_size": [32, 64, [32, 64], None],
    "scaling_factor": [0.18215, 0.13025, 1, 2.5],
    "shift_factor": [None, 0, 0.1],
    "latents_mean": [None, [0.1] * 4, [0] * 4],
    "latents_std": [None, [1.5] * 4],
    "force_upcast": [True, False],
    "use_quant_conv": [True, False],
    "use_post_quant_conv": [True, False],
    "mid_block_add_attention": [True, False],
}
TINY: Options = {
    "in_channels": [3, 4],
    "out_channels": [3, 4],
    "encoder_block_out_channels": [(16, 16, 16), (16, 16), (16, 32, 16)],
    "decoder_block_out_channels": [(16, 16, 16), (16, 16), (8, 8, 8)],
    "act_fn": ["relu", "silu"],
    "upsample_fn": ["nearest", "bilinear"],
    "latent_channels": [4, 16],
    "upsampling_scaling_factor": [2, 3],
    "num_encoder_blocks": [(1, 2, 2), (1, 2), (1, 1, 1)],
    "num_decoder_blocks": [(2, 2, 1), (2, 1), (1, 1, 1)],
    "latent_magnitude": [3, 2],
    "latent_shift": [0.5, 0.1],
    "force_upcast": [False, True],
    "scaling_factor": [1.0, 0.5],
    "shift_factor": [0.0, 0.3],
}
TEXT: Options = {
    "vocab_size": [300, 49408],
    "hidden_size": [24, 32],
    "intermediate_size": [48, 31],
    "projection_dim": [20, 24],
    "num_hidden_layers": [3, 1, 2],
    "num_attention_heads": [4, 2, 8],
    "max_position_embeddings": [77, 40, 16],
    "hidden_act": ["quick_gelu", "gelu", "gelu_new", "relu", "silu"],
    "layer_norm_eps": [1e-5, 1e-6],
    "attention_dropout": [0.0, 0.1],
    "initializer_range": [0.02],
    "initializer_factor": [1.0],
    "pad_token_id": [1, 0, None],
    "bos_token_id": [298, 5],
    "eos_token_id": [299, 2, 7],
}
TOKENIZER: Options = {
    "padding_side": ["right", "left"],
    "truncation_side": ["right", "left"],
    "model_max_length": [77, 20, 1000],
    "pad_token": ["<|endoftext|>", "!", "<|startoftext|>"],
    "do_lower_case": [True, False],
    "add_prefix_space": [False, True],
    "split_special_tokens": [False, True],
    "errors": ["replace", "strict"],
    "clean_up_tokenization_spaces": [False, True],
    "add_bos_token": [None, True, False],
    "add_eos_token": [None, True, False],
    "mask_token": [None, "the", "<mask>"],
    "additional_special_tokens": [None, [], ["<|endoftext|>"], ["<new>"]],
    "tokenizer_class": ["CLIPTokenizer", "CLIPTokenizerFast"],
}
INDEX: Options = {
    "force_zeros_for_empty_prompt": [True, False],
    "requires_aesthetics_score": [False, True],
    "requires_safety_checker": [False, True],
    "add_watermarker": [None, False],
    "some_extra": ["a", None],
}
SCHEDULER: Options = {
    "steps_offset": [1, 0],
    "clip_sample": [False, True],
    "prediction_type": ["epsilon", "v_prediction"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "beta_schedule": ["scaled_linear", "linear"],
    "set_alpha_to_one": [False, True],
    "skip_prk_steps": [True, False],
    "use_karras_sigmas": [False, True],
    "no_such_option": [None, 3],
}
SCHEDULERS = ("PNDM", "DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete")
PROMPTS = (
    "",
    "a red fox, sitting",
    "A  Photo of\n<w0> and <w1>_1!",
    "x" * 90,
    "caf\u00e9 e\u0301 \u2603 1234's",
    "! !!",
)


def draw(rng: Random, options: Options, most: int) -> dict[str, Any]:
    """The first value of every option, but for up to ``most`` of them."""
    found = {key: values[0] for key, values in options.items()}
    for key in rng.sample(sorted(options), rng.randint(0, most)):
        found[key] = rng.choice(options[key])
    return found


def spoil(rng: Random, file: Path) -> bool:
    """Now and then a value of a JSON file is replaced by an odd one, or left out; whether it is a huge number."""
    if rng.random() < 0.65:
        return False
    found = json.loads(file.read_text())
    key = rng.choice(sorted(k for k in found if k not in ("_class_name", "architectures", "added_tokens_decoder")))
    value = rng.choice((..., *ODD))
    if value is ...:
        del found[key]
    else:
        found[key] = value
    file.write_text(json.dumps(found))
    return value in HUGE


def judge(theirs: Callable[[], Any], read: Callable[[], Any], run: Callable[[Any], Any]) -> str:
    """How reading and running the same folder ends on both sides; each gives a list of tensors or of numbers.

    A setting may be refused when the folder is read, or by the run that it makes impossible.
    """
    try:
        want = theirs()
    except Exception:  # whatever it raises
        want = None
    try:
        model = read()
        got = None if want is None else run(model)
    except MinidiffError as e:
        if "\n" in str(e):
            return f"raw error of several lines: {e}"
        return "refused" if want is not None else "both refuse"
    except Exception as e:
        return f"raw error {type(e).__name__}: {e}"[:200]
    if got is None:
        return "the reference refuses"
    return "equal" if len(got) == len(want) and all(map(_same, got, want)) else "different"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return bool(a == b)


def aligned(model: Any) -> Any:
    """A model of the reference with its weights copied: mapped from a file they lie at odd addresses, where kernels sum
    in another order."""
    for p in model.parameters():
        p.data = p.data.clone()
    return model.eval()


def component(
    rng: Random, folder: Path, cls: Any, make: Callable[[], nn.Module], spare: Callable[[], nn.Module]
) -> Any:
    """A saved model of ``make``, or where the reference can't make it of ``spare``: its two readers."""
    try:
        model = make()
    except Exception:  # whatever it raises
        model = spare()
    twins.redraw(model, rng.randrange(1000)).save_pretrained(folder)
    huge = spoil(rng, folder / "config.json")

    def theirs() -> Any:
        assert not huge, "it would count so far, or ask for so much memory"
        read, told = cls.from_pretrained(folder, output_loading_info=True)
        assert not told["missing_keys"], "it would invent weights"
        return aligned(read)

    def ours() -> Any:
        found = read_component(folder, cls.__name__)
        read = meta_model(found.config)
        read.load_state_dict({k: t.load().clone() for k, t in found.part.tensors.items()}, assign=True)
        return read.eval()

    return theirs, ours


@torch.no_grad()
def unet(rng: Random, folder: Path) -> str:
    conditional = rng.random() < 0.75
    cls: Any = UNet2DConditionModel if conditional else UNet2DModel
    options = draw(rng, UNET if conditional else PLAIN, 4)
    word, ladder = ("CrossAttn" if conditional else "Attn"), rng.choice(LADDERS)
    options["down_block_types"] = [f"{word if c == '-' else ''}DownBlock2D" for c in ladder]
    options["up_block_types"] = [f"{word if c == '-' else ''}UpBlock2D" for c in reversed(ladder)]
    if conditional and rng.random() < 0.3:
        options["addition_embed_type"] = "text_time"
    theirs, ours = component(rng, folder, cls, lambda: cls(**options), lambda: twins.unet_twin("sd1"))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4 if not conditional else options["in_channels"], 8, 8, generator=g)
    x = x if conditional else x[:, : options["in_channels"]]
    t = torch.tensor([7, 801])
    if not conditional:
        return judge(lambda: [theirs()(x, t).sample], ours, lambda model: [model(x, t)])
    width = options["cross_attention_dim"]
    context = torch.randn(2, 7, width if isinstance(width, int) else width[0], generator=g)
    count = 5 if options["projection_class_embeddings_input_dim"] == 60 else 6
    pooled, ids = torch.randn(2, 20, generator=g), 99 * torch.rand(2, count, generator=g)
    code = None if options["time_cond_proj_dim"] is None else torch.randn(2, 16, generator=g)
    added = {"text_embeds": pooled, "time_ids": ids}

    def run(model: Any) -> Any:
        return [model(x, t, context, added=(pooled, ids) if model.config.added_dim else None, guidance=code)]

    return judge(lambda: [theirs()(x, t, context, timestep_cond=code, added_cond_kwargs=added).sample], ours, run)


@torch.no_grad()
def vae(rng: Random, folder: Path) -> str:
    tiny = rng.random() < 0.3
    cls: Any = AutoencoderTiny if tiny else AutoencoderKL
    options = draw(rng, TINY if tiny else VAE, 3)
    theirs, ours = component(rng, folder, cls, lambda: cls(**options), lambda: twins.vae_twin())
    pixels = torch.randn(2, options["in_channels"], 16, 20, generator=torch.Generator().manual_seed(0))
    z = torch.randn(2, options["latent_channels"], 4, 5, generator=torch.Generator().manual_seed(1))

    def read() -> Any:
        model = theirs()
        code = model.encode(pixels)
        first = [code.latents] if tiny else [code.latent_dist.mean, code.latent_dist.logvar]
        return [*first, model.decode(z).sample, torch.tensor(model.config.scaling_factor)]

    def run(model: Any) -> Any:
        code = model.encode(pixels)
        first = [code.mean] if tiny else [code.mean, code.logvar.clamp(-30, 20)]
        return [*first, model.decode(z), torch.tensor(model.config.scaling_factor)]

    return judge(read, ours, run)


@torch.no_grad()
def text(rng: Random, folder: Path) -> str:
    cls: Any = rng.choice([CLIPTextModel, CLIPTextModelWithProjection])
    options = draw(rng, TEXT, 4)
    make = lambda: cls(CLIPTextConfig(**options))  # noqa: E731
    theirs, ours = component(rng, folder, cls, make, lambda: cls(CLIPTextConfig(**{k: v[0] for k, v in TEXT.items()})))
    ids = torch.randint(3, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 5], ids[1, 9:], ids[:, 2] = 299, 299, 7

    def read() -> Any:
        out = theirs()(ids, output_hidden_states=True)
        return [out.last_hidden_state, out.hidden_states[-2], out[0] if out[0].ndim == 2 else out.pooler_output]

    return judge(read, ours, lambda model: list(model(ids)))


def words(rng: Random) -> str:
    """A text of ordinary and extraordinary characters."""
    pieces = (
        "cat ",
        "Dog",
        "'s",
        "12",
        " ",
        "\t",
        "!",
        "<|endoftext|>",
        "<|startoftext|>",
        "<w0>",
        "<w1>",
        "_1",
        "\u4e2d",
    )
    return "".join(rng.choice((*pieces, chr(rng.randrange(0x20, 0x2FF)))) for _ in range(rng.randint(0, 40)))


def tokenizer(rng: Random, folder: Path) -> str:
    twin = twins.tokenizer_twin(rng.choice(["<|endoftext|>", "!"]))
    twin.add_tokens([f"<w{i}>" for i in range(rng.choice([0, 0, 1, 3]))])
    twin.save_pretrained(folder)
    if rng.random() < 0.4:  # as older versions wrote it
        table, merges = clip_table()
        (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(table)}))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
        (folder / "tokenizer.json").unlink()
        extra = {t: i for t, i in twin.get_vocab().items() if i >= len(table)}
        (folder / "added_tokens.json").write_text(json.dumps(extra))
    file = folder / "tokenizer_config.json"
    found = json.loads(file.read_text())
    drawn = draw(rng, TOKENIZER, 2)
    found |= {k: v for k, v in drawn.items() if v is not None and (v != TOKENIZER[k][0] or rng.random() < 0.1)}
    file.write_text(json.dumps(found))
    spoil(rng, file)
    texts = [words(rng) for _ in range(8)]

    def read() -> Any:
        t = CLIPTokenizer.from_pretrained(folder)
        assert isinstance(t.model_max_length, int), "no length to fill up to"
        return t(texts, padding="max_length", max_length=t.model_max_length, truncation=True).input_ids

    return judge(read, lambda: Tokenizer(tokenizer_config(folder)), lambda model: model(texts).tolist())


def pipeline(rng: Random, folder: Path) -> str:
    kind = rng.choice(["sd1", "sd2", "sdxl", "refiner", "inpaint", "lcm", "ddpm"])
    pipe = twins.pipeline_twin(kind)
    if kind not in ("ddpm", "refiner") and rng.random() < 0.3:
        learned = {"<w0>": torch.randn(1, 32)}  # of a width that fits SD1's text encoder only
        if kind == "sd1":
            pipe.load_textual_inversion(learned["<w0>"], token="<w0>")
    pipe.save_pretrained(folder)
    drawn = draw(rng, INDEX, 2)
    change(folder / "model_index.json", {k: v for k, v in drawn.items() if v != INDEX[k][0]})
    name = rng.choice(SCHEDULERS) + "Scheduler"
    if rng.random() < 0.4:
        change(folder / "model_index.json", {"scheduler": ["diffusers", name]})
    own = {key: values for key, values in SCHEDULER.items() if key == "no_such_option" or key in READERS[name].fields}
    if rng.random() < 0.5:
        settings = {k: v for k, v in draw(rng, own, 3).items() if v is not None}
        change(folder / "scheduler" / "scheduler_config.json", {"_class_name": rng.choice([name, ...]), **settings})
    if rng.random() < 0.2:
        version = rng.choice(["0.8.1", "0.6.0.dev0", "0.9.0", "0.10.2", "odd"])
        change(folder / "unet" / "config.json", {"_diffusers_version": version})
    if rng.random() < 0.2 and kind != "ddpm":
        part = rng.choice(["text_encoder", "text_encoder_2"] if kind == "sdxl" else [pipe_text(kind)])
        setting = rng.choice([("use_attention_mask", True), ("eos_token_id", 2), ("eos_token_id", 49407)])
        change(folder / part / "config.json", dict([setting]))
    spoil(rng, folder / rng.choice(["model_index.json", "scheduler/scheduler_config.json"]))
    return judge(lambda: [theirs(folder, kind)], lambda: weights_convert.load(folder), lambda sd: [ours(sd, kind)])


def pipe_text(kind: str) -> str:
    return "text_encoder_2" if kind == "refiner" else "text_encoder"


def change(file: Path, settings: dict[str, Any]) -> None:
    """Put settings into a JSON file; ``...`` takes one out."""
    found = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


PROMPT = "a red fox <w0>"


def theirs(folder: Path, kind: str) -> Tensor:
    """Two steps of the reference from a seed: latents (or the pixels of a DDPM)."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            aligned(part)
    g, size = torch.Generator().manual_seed(1), pipe.unet.config.sample_size
    if kind == "ddpm":
        images = pipe(num_inference_steps=2, generator=g, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)
    more = start(size, kind)[0]
    return pipe(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=g, output_type="latent", **more).images


def ours(sd: Any, kind: str) -> Tensor:
    """The same from minidiff."""
    g = torch.Generator().manual_seed(1)
    if kind == "ddpm":
        return sd.generate(steps=2, generator=g, output="tensor", progress=False)
    more = start(sd.unet.config.sample_size, kind)[1]
    return sd.generate(PROMPT, steps=2, guidance_scale=3.0, generator=g, output="latent", progress=False, **more)


def start(size: int, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a pipeline beside the prompt, in the reference's words and in ours: a picture for some."""
    height = width = 4 * size
    if kind not in ("inpaint", "refiner"):
        return {}, {}
    g = torch.Generator().manual_seed(2)
    image = torch.rand(1, 3, height, width, generator=g)
    if kind == "refiner":
        return {"image": image, "strength": 1.0}, {"image": image, "strength": 1.0}
    mask = (torch.rand(1, 1, height, width, generator=g) > 0.5).float()
    theirs = {"image": image * 2 - 1, "mask_image": mask, "height": height, "width": width}
    return theirs, {"image": image, "mask": mask, "strength": 1.0}


KINDS: dict[str, Callable[[Random, Path], str]] = {
    "unet": unet,
    "vae": vae,
    "text": text,
    "tokenizer": tokenizer,
    "pipeline": pipeline,
}


def try_case(kind: str, number: int) -> str:
    """Case ``number`` of a kind, and how it ended: "equal", "refused", "both refuse", "the reference refuses", or one
    of ``FAULTS``."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(number)
        return KINDS[kind](Random(f"{kind} {number}"), Path(folder))


def quiet() -> None:
    """Without the reference's warnings about odd configs."""
    import logging
    import warnings

    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
