"""Record what other programs make of prompts: the fixtures of tests/unit/test_dialects.py.

    python scripts/record_dialects.py --a1111 DIR --comfyui DIR --sd-embed DIR [--out tests/fixtures] [--random N]

It runs in the environment of tests/parity, to which compel and what the programs import are added:

    pip install --no-deps compel==2.5.1 pyparsing lark==1.1.2 ftfy wcwidth regex open_clip_torch

DIR holds a copy of the program's source, of which little is loaded: AUTOMATIC1111/stable-diffusion-webui at 45b8a499
(modules/prompt_parser.py, sd_hijack_clip.py, sd_hijack_open_clip.py, sd_emphasis.py, sd_samplers_cfg_denoiser.py),
ComfyUI at a125cd84 (comfy/sd1_clip.py, sdxl_clip.py, clip_model.py, text_encoders/sd2_clip.py, and the files that they
read), xhinker/sd_embed at 4a47f71 (src/). Nothing of them is kept. What they import beyond that, settings, devices and
the fast kernels of their own, is replaced here by the least that does: the settings are the programs' defaults.

The text encoders are tiny and random (tests/support/dialects.py), converted by ``weights_convert`` and loaded by
transformers. The script says where ours differ from theirs by a single bit; with ``--random N`` also whether N texts of
random signs and words become the same chunks. Of the web UI some with brackets too many beside a schedule do not: see
minidiff/pipeline/dialects/schedule.py.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import weights_convert  # noqa: E402
from minidiff.errors import MinidiffError  # noqa: E402
from minidiff.models.tokenizer import Tokenizer  # noqa: E402
from minidiff.pipeline import StableDiffusion  # noqa: E402
from tests.support.dialects import (  # noqa: E402
    CALLS,
    PAIRS,
    TEXTS,
    Tensors,
    facts,
    folded,
    kept,
    models,
    pairs,
    print_of,
    spoken,
)

WORDS = ["a", "cat", "red house", "it's", "e-mail", "3", "0.5", "1.2", " ", " ", "雪", ",", ".", "\n"]
SIGNS = {
    "a1111": [*WORDS, *"()[]()[]:|\\", ":1.3)", ":0.5]", ":3]", "BREAK", " AND ", "[a:b:0.4]", "[c|d]", "(e:0.8)"],
    "comfyui": [*WORDS, *"()()[]:\\", ":1.3)", "(e:0.8)", "\\(", "BREAK", "many words that are long enough to be cut "],
    "compel": [
        *WORDS,
        *'()()"+-=\\',
        ")1.3",
        '")+',
        "++",
        ".attend(1.2)",
        ".blend(",
        '("a", "b")',
        ".and(1, 2)",
        "no_normalize",
    ],
    "sd_embed": [*WORDS, *"()[]()[]:\\", ":1.3)", "(e:0.8)", "BREAK"],
}
"""Parts that random texts are made of."""

Rows = list[tuple[list[int], list[float]]]
"""Chunks: the ids of each, and the weights."""


class Program(ABC):
    """One program on one model: what it makes of a text, and of a prompt with a negative prompt."""

    def __init__(self, pipe: Any, kind: str) -> None:
        self.pipe, self.kind, self.xl = pipe, kind, kind == "sdxl"

    @abstractmethod
    def facts(self, text: str) -> dict[str, Any]:
        """Return what is recorded of a text beside its encoding."""

    @abstractmethod
    def encode(self, prompt: str, negative: str) -> Tensors:
        """Return what ``tests.support.dialects.spoken`` returns of ours."""


def stub(name: str, **contents: Any) -> ModuleType:
    """Put a module of that name in place of the program's own."""
    module = ModuleType(name)
    module.__dict__.update(contents)
    module.__path__ = []
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], own, module)
    return module


class Pooled(Tensor):
    """A tensor that may carry the pooled text as an attribute, as the web UI's do."""


# --- AUTOMATIC1111 ---------------------------------------------------------------------------------------------------


class A1111(Program):
    def __init__(self, pipe: Any, kind: str) -> None:
        super().__init__(pipe, kind)
        self.parser = importlib.import_module("modules.prompt_parser")
        first, second = importlib.import_module("modules.sd_hijack_clip"), None
        if kind == "sd1":
            self.readers = [first.FrozenCLIPEmbedderWithCustomWords(self.wrapped(), self.hijack())]
            return
        second = importlib.import_module("modules.sd_hijack_open_clip")
        if kind == "sd2":
            self.readers = [
                second.FrozenOpenCLIPEmbedderWithCustomWords(self.open_clip(pipe.text_encoder), self.hijack())
            ]
            return
        one = first.FrozenCLIPEmbedderForSDXLWithCustomWords(self.wrapped(), self.hijack())
        two = second.FrozenOpenCLIPEmbedder2WithCustomWords(self.open_clip(pipe.text_encoder_2), self.hijack())
        self.readers = [one, two]

    def hijack(self) -> Any:
        none = SimpleNamespace(find_embedding_at_position=lambda tokens, offset: (None, None))
        return SimpleNamespace(embedding_db=none, extra_generation_params={}, fixes=None)

    def wrapped(self) -> Any:
        encoder, layer = self.pipe.text_encoder, "hidden" if self.xl else "last"
        return SimpleNamespace(tokenizer=self.pipe.tokenizer, transformer=encoder, layer=layer, layer_idx=-2)

    def open_clip(self, encoder: Any) -> Any:
        def run(tokens: Tensor) -> Any:
            out = encoder(input_ids=tokens, output_hidden_states=True)
            if not self.xl:
                return out.last_hidden_state
            return {"penultimate": out.hidden_states[-2].as_subclass(Pooled), "pooled": out.text_embeds}

        return SimpleNamespace(encode_with_transformer=run, layer="penultimate", return_pooled=self.xl)

    def facts(self, text: str) -> dict[str, Any]:
        parser = self.parser
        indexes, flat, _ = parser.get_multicond_prompt_list([text])
        schedules = parser.get_learned_conditioning_prompt_schedules(flat, CALLS)
        entry = parser.ScheduledPromptConditioning
        conditionals = []
        for index, weight in indexes[0]:
            ways = [entry(end, torch.tensor([[float(i)]])) for i, (end, _) in enumerate(schedules[index])]
            read = [int(parser.reconstruct_cond_batch([ways], call)) for call in range(CALLS)]
            chunks = [folded(self.rows(way)) for _, way in schedules[index]]
            conditionals.append([weight, [list(way) for way in schedules[index]], read, chunks])
        return {"fragments": parser.parse_prompt_attention(text), "conditionals": conditionals}

    def rows(self, text: str) -> Rows:
        reader = self.readers[-1]
        rows = []
        for chunk in reader.tokenize_line(text)[0]:
            ids = list(chunk.tokens)
            if reader.id_end != reader.id_pad:
                end = ids.index(reader.id_end) + 1
                ids[end:] = [reader.id_pad] * (len(ids) - end)
            rows.append((ids, chunk.multipliers))
        return rows

    def encode(self, prompt: str, negative: str) -> Tensors:
        found: Tensors = {}
        indexes, flat, _ = self.parser.get_multicond_prompt_list([prompt])
        each = [self.side(text) for text in flat]
        longest = max(z.shape[1] for ways, _ in each for z in ways)
        for k, (index, _) in enumerate(indexes[0]):
            ways, pooled = each[index]
            # of equal length as the program makes them in every step, beside the longest
            ways = [self.parser.stack_conds([z[0], torch.zeros(longest, z.shape[2])])[:1] for z in ways]
            found |= self.named(f"positive.{k}", ways, pooled)
        ways, pooled = self.side(negative)
        if self.xl and not negative:  # modules/sd_models_xl.py: force_zero_negative_prompt
            ways, pooled = [torch.zeros_like(z) for z in ways], [torch.zeros_like(z) for z in pooled]
        return found | self.named("negative.0", ways, pooled)

    def named(self, name: str, ways: list[Tensor], pooled: list[Tensor]) -> Tensors:
        found = {f"{name}.{i}": z for i, z in enumerate(ways)}
        return found | ({f"pooled.{name}.{i}": z for i, z in enumerate(pooled)} if self.xl else {})

    def side(self, text: str) -> tuple[list[Tensor], list[Tensor]]:
        texts = [way for _, way in self.parser.get_learned_conditioning_prompt_schedules([text], CALLS)[0]]
        outs = [reader(texts) for reader in self.readers]
        pooled = outs[-1][1] if self.xl else torch.empty(len(texts), 0)
        z = torch.cat([out[0] if isinstance(out, tuple) else out for out in outs], dim=-1).as_subclass(Tensor)
        return [z[i : i + 1] for i in range(len(texts))], [pooled[i : i + 1] for i in range(len(texts))]


def load_a1111(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    options = SimpleNamespace(
        emphasis="Original",
        use_old_emphasis_implementation=False,
        comma_padding_backtrack=20,
        CLIP_stop_at_last_layers=1,
        sdxl_clip_l_skip=False,
        textual_inversion_add_hashes_to_infotext=False,
    )
    stub("modules").__path__ = [str(folder / "modules")]
    stub("modules.shared", opts=options, state=None, sd_model=None)
    stub("modules.devices", device="cpu", torch_npu_set_device=lambda: None)
    stub("modules.sd_hijack", StableDiffusionModelHijack=object)
    names = ("CFGDenoiserParams", "cfg_denoiser_callback", "CFGDenoisedParams", "cfg_denoised_callback")
    names += ("AfterCFGCallbackParams", "cfg_after_cfg_callback")
    stub("modules.script_callbacks", **dict.fromkeys(names))
    stub("modules.sd_samplers_common")
    place = importlib.util.find_spec("open_clip")
    if place is None or place.submodule_search_locations is None:
        sys.exit("open_clip_torch is not installed: see the top of this file for the environment it needs")
    stub("open_clip").__path__ = list(place.submodule_search_locations)
    importlib.import_module("open_clip.tokenizer")


def composed() -> dict[str, Any]:
    """Return what the web UI makes of three conditionals and one unconditional prediction of two pictures."""
    denoiser = importlib.import_module("modules.sd_samplers_cfg_denoiser").CFGDenoiser
    x = torch.randn(6, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    weights = [[(0, 1.0), (1, 0.6), (2, -0.5)], [(3, 1.5)]]
    out = denoiser.combine_denoised(None, x, weights, x[4:], 7.5)
    return {"x": x.flatten().tolist(), "weights": weights, "scale": 7.5, "out": out.flatten().tolist()}


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


class ComfyUI(Program):
    def __init__(self, pipe: Any, kind: str) -> None:
        super().__init__(pipe, kind)
        sd1, sdxl = importlib.import_module("comfy.sd1_clip"), importlib.import_module("comfy.sdxl_clip")
        sd2 = importlib.import_module("comfy.text_encoders.sd2_clip")
        clip = sd1.SDClipModel
        if self.xl:
            self.tokenizer = sdxl.SDXLTokenizer()
            hidden = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}
            own = clip(textmodel_json_config=self.config(pipe.text_encoder), **hidden)
            other = clip(
                textmodel_json_config=self.config(pipe.text_encoder_2),
                special_tokens={"start": 49406, "end": 49407, "pad": 0},
                **hidden,
            )
            self.model = sdxl.SDXLClipModel.__new__(sdxl.SDXLClipModel)
            nn.Module.__init__(self.model)
            self.model.clip_l, self.model.clip_g = own, other
            self.load(own, pipe.text_encoder)
            self.load(other, pipe.text_encoder_2)
            return
        special = {"special_tokens": {"start": 49406, "end": 49407, "pad": 0}} if kind == "sd2" else {}
        self.tokenizer = sd2.SD2Tokenizer() if kind == "sd2" else sd1.SD1Tokenizer()
        self.model = clip(textmodel_json_config=self.config(pipe.text_encoder), **special)
        self.load(self.model, pipe.text_encoder)

    def config(self, encoder: Any) -> dict[str, Any]:
        found = dict(encoder.config.to_dict())
        return {**found, "eos_token_id": 49407}

    def load(self, model: Any, encoder: Any) -> None:
        tensors = {(k if k.startswith("text_") else f"text_model.{k}"): v for k, v in encoder.state_dict().items()}
        tensors.setdefault("text_projection.weight", torch.eye(encoder.config.hidden_size))
        if tensors["text_projection.weight"].shape[0] != encoder.config.hidden_size:
            wide = tensors["text_projection.weight"]  # ComfyUI's is square
            model.transformer.text_projection = nn.Linear(*reversed(wide.shape), bias=False)
        model.transformer.load_state_dict(tensors)

    def side(self, text: str) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer.tokenize_with_weights(text)
        pairs = tokens if self.xl else next(iter(tokens.values()))
        out: tuple[Tensor, Tensor] = self.model.encode_token_weights(pairs)
        return out

    def facts(self, text: str) -> dict[str, Any]:
        tokens = self.tokenizer.tokenize_with_weights(text)
        rows = tokens["g"] if self.xl else next(iter(tokens.values()))
        return {"chunks": folded([([i for i, _ in row], [w for _, w in row]) for row in rows])}

    def encode(self, prompt: str, negative: str) -> Tensors:
        found: Tensors = {}
        for name, text in (("positive", prompt), ("negative", negative)):
            found[f"{name}.0.0"], pooled = self.side(text)
            if self.xl:
                found[f"pooled.{name}.0.0"] = pooled
        return found


def load_comfyui(folder: Path) -> None:
    class Embedding(nn.Embedding):
        def forward(self, ids: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
            return super().forward(ids)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)

    stub("comfy").__path__ = [str(folder / "comfy")]
    operations = SimpleNamespace(Linear=nn.Linear, LayerNorm=nn.LayerNorm, Embedding=Embedding)
    stub("comfy.ops", manual_cast=operations, cast_to=lambda weight, dtype, device: weight)
    stub("comfy.model_management", intermediate_device=lambda: torch.device("cpu"))
    stub("comfy.ldm")
    stub("comfy.ldm.modules")
    stub("comfy.ldm.modules.attention", optimized_attention_for_device=lambda *_, **__: attend)


# --- compel and sd_embed ---------------------------------------------------------------------------------------------


class Compel(Program):
    def __init__(self, pipe: Any, kind: str) -> None:
        super().__init__(pipe, kind)
        module = importlib.import_module("compel")
        self.program = (module.CompelForSDXL if self.xl else module.CompelForSD)(pipe)
        self.parser = importlib.import_module("compel.prompt_parser")
        self.last = self.program.compel_2 if self.xl else self.program.compel

    def facts(self, text: str) -> dict[str, Any]:
        joined = self.parser.PromptParser().parse_conjunction(text)
        clauses, provider = [], self.last.conditioning_provider
        for prompt, weight in zip(joined.prompts, joined.weights, strict=True):
            blended = isinstance(prompt, self.parser.Blend)
            each = prompt.prompts if blended else [prompt]
            own = [[[part.text, part.weight] for part in one.children] for one in each]
            chunks = []
            for one in own:
                ids, weights, _ = provider.get_token_ids_and_expand_weights(*map(list, zip(*one, strict=True)), "cpu")
                rows = [(i.tolist(), w.tolist()) for i, w in zip(ids.split(77), weights.split(77), strict=True)]
                chunks.append(folded(rows, 6))
            shares, normalize = (prompt.weights, prompt.normalize_weights) if blended else ([1.0], True)
            clauses.append([own, shares, normalize, blended, weight, chunks])
        return {"clauses": clauses}

    def encode(self, prompt: str, negative: str) -> Tensors:
        out = self.program(prompt, negative_prompt=negative)
        found = {"positive.0.0": out.embeds, "negative.0.0": out.negative_embeds}
        if self.xl:
            found |= {"pooled.positive.0.0": out.pooled_embeds, "pooled.negative.0.0": out.negative_pooled_embeds}
        return found


class SDEmbed(Program):
    def __init__(self, pipe: Any, kind: str) -> None:
        super().__init__(pipe, kind)
        self.functions = importlib.import_module("sd_embed.embedding_funcs")
        for encoder in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if encoder is not None and not hasattr(encoder, "text_model"):  # transformers 5 has it no more
                type(encoder).text_model = property(lambda self: self)

    def facts(self, text: str) -> dict[str, Any]:
        tokenizer = self.pipe.tokenizer_2 if self.xl else self.pipe.tokenizer
        tokens = self.functions.get_prompts_tokens_with_weights(tokenizer, text)
        rows = self.functions.group_tokens_and_weights(*tokens, pad_last_block=False)
        return {"chunks": folded(list(zip(*rows, strict=True)))}

    def encode(self, prompt: str, negative: str) -> Tensors:
        if not self.xl:
            out = self.functions.get_weighted_text_embeddings_sd15(self.pipe, prompt, negative)
            return dict(zip(("positive.0.0", "negative.0.0"), out, strict=True))
        return self.named(self.functions.get_weighted_text_embeddings_sdxl(self.pipe, prompt, negative))

    def refine(self, prompt: str, negative: str) -> Tensors:
        return self.named(self.functions.get_weighted_text_embeddings_sdxl_refiner(self.pipe, prompt, negative))

    def named(self, found: tuple[Tensor, ...]) -> Tensors:
        names = ("positive.0.0", "negative.0.0", "pooled.positive.0.0", "pooled.negative.0.0")
        return dict(zip(names, found, strict=True))


PROGRAMS: dict[str, type[Program]] = {"a1111": A1111, "comfyui": ComfyUI, "compel": Compel, "sd_embed": SDEmbed}


def opened(kind: str, model: StableDiffusion, folder: Path) -> Any:
    """Return a model of ours as diffusers and transformers load it, through the converter."""
    import diffusers

    file = folder / f"{kind}.safetensors"
    model.save(file)
    weights_convert.convert(file, folder / kind, to="diffusers")
    classes = {"sdxl": diffusers.StableDiffusionXLPipeline}
    return classes.get(kind, diffusers.StableDiffusionPipeline).from_pretrained(folder / kind, safety_checker=None)


def attempt(make: Callable[[], Tensors]) -> Tensors | str:
    try:
        return make()
    except Exception as e:  # whatever a program raises: ours has to raise something too
        return f"{type(e).__name__}: {e}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option in ("--a1111", "--comfyui", "--sd-embed"):
        parser.add_argument(option, type=Path, required=True, metavar="DIR", help="a copy of the program's source")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "fixtures")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="random texts to compare (default: none)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load_a1111(args.a1111)
    load_comfyui(args.comfyui)
    sys.path.insert(0, str(args.sd_embed))
    told: dict[str, Any] = {"what": "prompts as other programs read them, written by scripts/record_dialects.py"}
    tensors: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, ours in models().items():
            pipe = opened(kind, ours, Path(folder))
            for name, program in PROGRAMS.items():
                theirs = program(pipe, kind)
                if kind in ("sd1", "sd2"):
                    told.setdefault(name, {})[kind] = [{"text": text, **theirs.facts(text)} for text in TEXTS[name]]
                equal = 0
                for n, (prompt, negative) in enumerate(pairs(name)):
                    made = attempt(lambda: theirs.encode(prompt, negative))  # noqa: B023
                    own = attempt(lambda: spoken(ours, name, prompt, negative))  # noqa: B023
                    equal += report(f"{name} {kind} {prompt[:40]!r}", made, own)
                    found = {"error": torch.zeros(1, 1)} if isinstance(made, str) else made
                    for k, z in found.items():
                        if kept(k, n, len(TEXTS[name])):
                            tensors[f"{name}.{kind}.{n}.{k}"] = print_of(z).contiguous().clone()
                if isinstance(theirs, SDEmbed) and kind == "sdxl":
                    for n, (prompt, negative) in enumerate(PAIRS):
                        found, own = theirs.refine(prompt, negative), spoken(ours, name, prompt, negative, refiner=True)
                        report(f"{name} refiner {prompt[:40]!r}", found, own)
                        tensors |= {f"{name}.refiner.{n}.{k}": print_of(z).clone() for k, z in found.items()}
                if kind != "sdxl":
                    told_apart(theirs, name, ours.tokenizer, args.random)
                print(f"{name} {kind}: {equal} of {len(pairs(name))} prompts equal to the bit")
    told["composed"] = composed()
    (args.out / "dialects.json").write_text(json.dumps(told, separators=(",", ":")) + "\n", encoding="utf-8")
    save_file(tensors, args.out / "dialects.safetensors")


def told_apart(theirs: Program, name: str, tokenizer: Tokenizer, count: int) -> None:
    """Say which of ``count`` random texts become other chunks than with the program."""
    rng, verdicts = random.Random(count), Counter[str]()
    for _ in range(count):
        text = "".join(rng.choice(SIGNS[name]) for _ in range(rng.randint(1, 12)))
        try:
            ours = facts(name, text, tokenizer)
        except MinidiffError as e:
            ours = {"refused": str(e)}
        try:
            made = theirs.facts(text)
        except Exception as e:  # whatever a program raises
            made = {"error": f"{type(e).__name__}: {e}"}
        refused, failed = "refused" in ours, "error" in made
        same = json.loads(json.dumps(made)) == json.loads(json.dumps(ours))
        verdict = (
            "refused" if refused and not failed else "an error in both" if refused else "equal" if same else "OTHER"
        )
        verdicts[verdict] += 1
        if verdict in ("OTHER", "refused"):
            print(f"{name} {text!r}: {verdict}\n  theirs {str(made)[:300]}\n  ours   {str(ours)[:300]}")
    if count:
        print(f"{name} {theirs.kind}, {count} random texts: {dict(verdicts)}")


def report(what: str, theirs: Tensors | str, ours: Tensors | str) -> bool:
    """Say where two encodings differ; return True if they are equal."""
    if isinstance(theirs, str) or isinstance(ours, str):
        both = isinstance(theirs, str) and isinstance(ours, str)
        shown = [made if isinstance(made, str) else "fine" for made in (theirs, ours)]
        print(f"{what}: theirs {shown[0]}; ours {shown[1]}")
        return both
    same = theirs.keys() == ours.keys()
    if not same:
        print(f"{what}: {sorted(theirs)} and {sorted(ours)}")
    for k in theirs.keys() & ours.keys():
        a, b = theirs[k], ours[k]
        if a.shape != b.shape or not torch.equal(a, b):
            same = False
            far = "shapes" if a.shape != b.shape else f"by {(a - b).abs().max():.2e}"
            print(f"{what}: {k} differs, {far}, {tuple(a.shape)} and {tuple(b.shape)}")
    return same


if __name__ == "__main__":
    main()
