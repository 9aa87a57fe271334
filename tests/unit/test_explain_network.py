"""The panels of `minidiff explain` that look into the networks: words, UNet, mistakes, quiz."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import minidiff
from minidiff import Control, ControlModel, fast
from minidiff.adapters import lora
from minidiff.explain import Seen, collect, explained
from minidiff.explain.mistakes import compare
from minidiff.explain.panel import Left, Panel
from minidiff.explain.panels import quiz, unet, whatif, words
from minidiff.explain.second_look import looks, own_pipe, own_unet, read_prompt, record, weights
from minidiff.models.attention import Attention
from minidiff.page.languages import label
from minidiff.pipeline.request import Request
from minidiff.storage.checkpoint import build
from tests.support import tiny
from tests.tolerances import EIGHT_BITS, HALF_BATCH, assert_close

PROMPT = "a red circle left of a blue star on a white background"


@pytest.fixture(scope="module")
def seen() -> Seen:
    return collect(minidiff.bundled(), Request(PROMPT, steps=3, seed=0), bundled=True)


def data_of(html: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', html)
    assert found is not None
    return json.loads(found[1])


def test_the_second_look_sees_what_the_run_saw(seen: Seen) -> None:
    for look in looks(seen):
        assert look.frame.conditional is not None
        # The run computed both halves in one batch, so the last bits differ.
        assert_close(look.out, look.frame.conditional, HALF_BATCH)


def test_attention_sums_to_one_and_gives_back_the_layer_s_output() -> None:
    torch.manual_seed(0)
    layer = Attention(24, 3, 16)
    x, context = torch.randn(1, 10, 24), torch.randn(1, 7, 16)
    plain, kept = layer(x, context), []
    undo = record(layer, kept.append)
    assert torch.equal(layer(x, context), plain)
    undo()
    layer(x, context)
    assert len(kept) == 1
    torch.testing.assert_close(kept[0].sum(dim=-1), torch.ones(1, 3, 10))
    v = layer.v(context).unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(layer.out((kept[0] @ v).transpose(1, 2).flatten(2)), plain)


def test_the_causal_mask_hides_every_later_token() -> None:
    found = weights(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4), causal=True)
    assert bool((found.triu(1) == 0).all())
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, 2, 5))


def test_maps_are_those_of_the_plain_model_under_fast_and_nothing_is_left_on_it() -> None:
    sd = minidiff.bundled()
    request = Request(PROMPT, steps=1, seed=0)
    plain = looks(collect(sd, request))[0]
    fast.optimize(sd)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in sd.unet.modules()]
    before = sd.generate(PROMPT, steps=1, seed=0, output="tensor")
    seen = collect(sd, request)
    again = looks(seen)[0]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in sd.unet.modules()]
    assert torch.equal(seen.pixels, before[0])
    assert torch.equal(sd.generate(PROMPT, steps=1, seed=0, output="tensor"), before)
    for name, each in plain.maps.items():  # the input of the only step is the same noise
        assert_close(again.maps[name], each, HALF_BATCH)  # packed weights have another kernel


def test_other_threads_on_the_model_see_nothing_of_a_page() -> None:
    """They draw on while a page of another run is made, under the switches that are on by themselves."""
    sd = minidiff.bundled()
    fast.optimize(sd)

    def drawn(seed: int) -> Tensor:
        found = sd.generate("a blue square", steps=2, seed=seed, output="latent", progress=False)
        assert isinstance(found, Tensor)
        return found

    right, made, done = [drawn(seed) for seed in range(2)], [0, 0], Event()

    def others(seed: int) -> bool:
        while not (done.is_set() and made[seed]):
            if not torch.equal(drawn(seed), right[seed]):
                return False
            made[seed] += 1
        return True

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(others, seed) for seed in range(2)]
        try:
            explained(collect(sd, Request(PROMPT, steps=2, seed=0)), panels=["words", "unet", "film", "quiz"])
        finally:
            done.set()
        assert [each.result() for each in found] == [True, True]


def from_a_picture(**options: Any) -> tuple[Any, Request]:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return tiny.tiny_sd(), Request("a fox", steps=4, seed=0, image=picture, **options)


def with_a_control(*controls: ControlModel) -> tuple[Any, Request]:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    steered = tuple(Control(model, picture) for model in controls)
    return tiny.tiny_sd(), Request("a fox", steps=2, seed=0, controls=steered)


def inpainting_model() -> tuple[Any, Request]:
    config = replace(tiny.SD, unet=replace(tiny.SD.unet, in_channels=9))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    _, request = from_a_picture(mask=mask)
    return tiny.drawn(config), request


def approximated(**how: Any) -> tuple[Any, Request]:
    sd = tiny.tiny_sd()
    fast.approximate(sd, **how)
    return sd, Request("a fox", steps=3, seed=0)


RUNS: dict[str, Callable[[], tuple[Any, Request]]] = {
    "image to image": lambda: from_a_picture(strength=0.6),
    "kept outside of a mask": lambda: from_a_picture(mask=torch.ones(1, 1, 64, 64), strength=0.6),
    "inpainting": inpainting_model,
    "ControlNet": lambda: with_a_control(tiny.tiny_controlnet()),
    "T2I-Adapter": lambda: with_a_control(tiny.tiny_adapter()),
    "both": lambda: with_a_control(tiny.tiny_controlnet(), tiny.tiny_adapter()),
    "AND": lambda: (tiny.tiny_sd(), Request("a fox AND a hen", steps=2, seed=0, prompt_style="a1111")),
    "alternation": lambda: (tiny.tiny_sd(), Request("a [fox|hen]", steps=3, seed=0, prompt_style="a1111")),
    "without guidance": lambda: (tiny.tiny_sd(), Request("a fox", steps=2, seed=0, guidance_scale=1.0)),
    "guidance on a part": lambda: (tiny.tiny_sd(), Request("a fox", steps=4, seed=0, guidance_interval=(0.3, 0.8))),
    "deep": lambda: approximated(deep=2),
    "merged": lambda: approximated(merge=0.5),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_is_left_as_it_is_and_looked_into(name: str) -> None:
    sd, request = RUNS[name]()
    plain = sd.run(request)
    wanted = sd.finish(plain, progress=False)[0].float()
    seen = collect(sd, request)
    assert torch.equal(seen.pixels, wanted)
    assert torch.equal(collect(sd, request).pixels, wanted), "and again"
    if name in ("deep", "merged", "AND"):
        return  # the second look is at the plain model, and at the first of joined prompts
    for look in looks(seen):
        predicted = look.frame.out if look.frame.conditional is None else look.frame.conditional
        assert_close(look.out, predicted, HALF_BATCH)


def test_the_second_look_at_joined_prompts_is_at_the_first() -> None:
    sd, request = RUNS["AND"]()
    joined, alone = (looks(collect(sd, replace(request, prompt=text)))[0] for text in (request.prompt, "a fox"))
    assert_close(joined.out, alone.out, HALF_BATCH)


def test_the_page_says_that_a_run_was_approximated() -> None:
    pages = [
        explained(collect(*run()), panels=["film"]) for run in (lambda: approximated(deep=2), lambda: from_a_picture())
    ]
    assert ["deep=2" in page for page in pages] == [True, False]
    assert ["This run was approximated" in page for page in pages] == [True, False]


def test_a_model_whose_parts_take_turns_is_looked_into(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tiny.tiny_sd().save(path)
    request = Request("a fox", steps=2, seed=0)
    whole, turning = (minidiff.StableDiffusion.load(path, "cpu", low_memory=low) for low in (False, True))
    seen, wanted = collect(turning, request), collect(whole, request)
    assert torch.equal(seen.pixels, wanted.pixels)
    for name, each in looks(wanted)[0].maps.items():
        assert torch.equal(looks(seen)[0].maps[name], each)
    assert explained(seen)


def test_live_adapters_are_in_the_second_look() -> None:
    sd = tiny.tiny_sd()
    layer = "unet.down.0.attn.0.blocks.0.attn2.k"
    wide, narrow = sd.unet.down[0].attn[0].blocks[0].attn2.k.weight.shape  # type: ignore[index, union-attr]
    update = lora.Update(torch.randn(2, narrow), torch.randn(wide, 2))
    request = Request("a photo", steps=1, seed=0)
    bare = looks(collect(sd, request))[0].maps["down.0.attn.0"]
    applied = lora.apply(sd.parts, [(lora.Adapter("x", {layer: update}), 1.0)], live=True)
    seen = collect(sd, request)
    look = looks(seen)[0]
    assert look.frame.conditional is not None
    assert_close(look.out, look.frame.conditional, HALF_BATCH)
    assert not torch.allclose(look.maps["down.0.attn.0"], bare)
    applied.remove()


def maps_of(found: dict[str, Any]) -> dict[tuple[int, str], Tensor]:
    """The maps of the words' data, by call and group, (L, h, w)."""
    tops = np.frombuffer(base64.b64decode(found["tops"]), "<f4")
    levels = np.frombuffer(base64.b64decode(found["maps"]), np.uint8)
    count, at, maps = len(found["tokens"]), 0, {}
    for n in range(len(found["calls"])):
        for g, (name, h, w) in enumerate(found["groups"]):
            start = (n * len(found["groups"]) + g) * count
            values = levels[at : at + count * h * w].reshape(count, h, w).astype("f4") / 255
            maps[n, name] = torch.tensor(values * tops[start : start + count, None, None])
            at += count * h * w
    assert at == len(levels)
    return maps


def test_the_page_s_maps_sum_to_one_at_every_place(seen: Seen) -> None:
    found = data_of(explained(seen, panels=["words"]), "words")
    for each in maps_of(found).values():
        assert float((each.sum(dim=0) - 1).abs().max()) < 0.02  # 8 bits a value
    for n, look in enumerate(looks(seen)):
        for name, _, _ in found["groups"]:
            assert_close(maps_of(found)[n, name], look.maps[name], EIGHT_BITS)


def test_the_page_names_the_prompt_s_tokens(seen: Seen) -> None:
    found = data_of(explained(seen, panels=["words"]), "words")["tokens"]
    assert [i for i, _, _ in found] == minidiff.bundled().tokenizer(PROMPT)[0].tolist()
    assert " ".join(text for _, text, kind in found if kind == "word") == PROMPT
    assert [kind for _, _, kind in found].count("padding") == 32 - 14


def test_later_words_do_not_change_earlier_vectors(seen: Seen) -> None:
    ids = minidiff.bundled().tokenizer(PROMPT)
    maps, read = read_prompt(seen, "text_encoder", ids)
    assert all(bool((each.triu(1) == 0).all()) for each in maps)
    assert torch.equal(read, minidiff.bundled().text_encoder(ids).last[0])


def test_large_models_have_one_map_for_each_way_and_size() -> None:
    maps = {f"down.{k}.attn.0": torch.full((77, 64, 64), float(k)) for k in range(2)} | {
        "mid.attn.0": torch.ones(77, 8, 8)
    }
    found = words.groups(maps)
    assert {name: each.shape for name, each in found.items()} == {"down 64 x 64": (77, 64, 64), "mid 8 x 8": (77, 8, 8)}
    assert float(found["down 64 x 64"].mean()) == 0.5


def test_the_unet_s_parts_are_all_of_it(seen: Seen) -> None:
    parts = unet.parts_of(seen, looks(seen)[0])
    model = seen.pipe.unet
    rest = sum(p.numel() for part in (model.time, model.norm_out) for p in part.parameters())
    assert sum(part.parameters for part in parts) + rest == sum(p.numel() for p in model.parameters())
    assert [part.name for part in parts][::4] == ["conv_in", "mid", "conv_out"]
    # conv_in by hand: 2 operations for each weight at each place
    first = next(part for part in parts if part.name == "conv_in")
    assert first.operations == 2 * model.conv_in.weight.numel() * 16 * 16


def test_features_are_those_of_the_part(seen: Seen) -> None:
    frame, own = seen.frames[0], own_unet(seen)
    kept: list[Tensor] = []
    own.mid.register_forward_hook(lambda layer, args, out: kept.append(out))
    own(*frame.call)
    found = data_of(explained(seen, panels=["unet"]), "unet")["features"][0][1]["mid"]
    assert found == pytest.approx([float(kept[0].mean()), float(kept[0].std())], rel=1e-4)


@pytest.mark.parametrize("model", [tiny.tiny_xl, tiny.tiny_sd, tiny.tiny_ddpm])
def test_operations_are_those_that_torch_counts(model: Any) -> None:
    pipe = model()
    seen = collect(pipe, Request(None if model is tiny.tiny_ddpm else "a cat", steps=1, seed=0))

    def shapes(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(map(shapes, part))
        return part.to("meta") if isinstance(part, Tensor) else part

    with torch.no_grad(), FlopCounterMode(display=False) as counter:  # on a CPU it knows no kernel of attention
        build(pipe.config)["unet"](*map(shapes, tuple(seen.frames[0].call)))
    counted = {name.partition(".")[2]: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    (look,) = looks(seen)
    counted.pop("")  # the whole
    assert len(counted) > 60
    assert counted == {name: look.operations[name] for name in counted}  # it leaves out lists of modules


@pytest.mark.parametrize("model", [tiny.tiny_xl, tiny.tiny_sd, tiny.tiny_ddpm])
def test_every_family_has_panels_or_reasons(model: Any) -> None:
    pipe = model()
    text = pipe.config.text_encoder is not None
    request = Request("a photo of a cat", steps=2, seed=0) if text else Request(None, steps=2, seed=0)
    seen = collect(pipe, request)
    assert isinstance(unet.build(seen), Panel)
    assert isinstance(words.build(seen), Panel if text else Left)
    assert isinstance(whatif.build(seen), Panel)
    assert len(quiz.questions(seen)) >= 6
    assert explained(seen, panels=["words", "unet", "whatif", "quiz"])


def test_prompts_without_words_are_left_out() -> None:
    sd = tiny.tiny_sd()
    context, _ = sd.encode_prompt("a cat")
    for request in (
        Request(None, prompt_embeds=context, steps=1),
        Request("a (cat:1.2)", prompt_style="a1111", steps=1),
    ):
        found = words.build(collect(sd, replace(request, seed=0)))
        assert isinstance(found, Left)
        assert label(found.why)


def test_mistakes_part_where_they_were_made(seen: Seen) -> None:
    before = {name: value.clone() for name, value in seen.pipe.unet.state_dict().items()}
    right, found = compare(seen)
    plain = minidiff.bundled().generate(
        PROMPT, steps=3, seed=0, sampler={"name": "euler", "spacing": "leading", "steps_offset": 1}, output="tensor"
    )
    assert torch.equal(right, plain[0])
    stages = {one.name: one.stage for one in found}
    assert stages == {
        "offset": "plan/timesteps",
        "unscaled": "step.0/input",
        "prediction": "step.0/x",
        "eps": "step.0/unet/down.1.attn.0.norm",
        "twice": "step.0/out",
        "unpadded": "step.0/context",
    }
    assert all(one.apart > 0 for one in found)
    assert all(torch.equal(value, before[name]) for name, value in seen.pipe.unet.state_dict().items())
    norms = [m for m in seen.pipe.unet.modules() if isinstance(m, nn.GroupNorm)]
    assert {norm.eps for norm in norms} == {1e-5, 1e-6}


def test_a_copy_shares_the_weights_and_nothing_else(seen: Seen) -> None:
    own = own_pipe(seen)
    assert own.unet is not seen.pipe.unet
    assert own.unet.conv_in.weight.data_ptr() == seen.pipe.unet.conv_in.weight.data_ptr()
    assert own.parts["unet"] is own.unet


def test_the_quiz_s_answers_are_the_run_s(seen: Seen) -> None:
    asked = {one.name: one for one in quiz.questions(seen)}
    assert len(asked) == 8
    right = {name: one.options[one.right].en for name, one in asked.items()}
    assert right["first"] == f"{seen.frames[0].t:g}"
    assert right["calls"] == "6"
    assert right["scale"] == "2"
    assert right["weights"] == "the way up"
    for one in asked.values():
        assert len({*one.options}) == 3
    assert data_of(explained(seen, panels=["quiz"]), "quiz") == [[one.name, one.right] for one in asked.values()]


def question(seen: Seen, name: str) -> quiz.Question | None:
    return next((one for one in quiz.questions(seen) if one.name == name), None)


def test_the_quiz_asks_what_the_run_can_answer() -> None:
    """Guidance below 0, on a part, rescaled, or without any difference; a first sample that is not noise."""
    sd = tiny.tiny_sd()

    def asked(name: str, **options: Any) -> str | None:
        found = question(collect(sd, Request("a fox", steps=4, seed=0, sampler="ddim", **options)), name)
        return None if found is None else found.options[found.right].en

    assert asked("scale", guidance_scale=-3.0) == "-3"
    assert asked("scale", guidance_rescale=0.5) is None
    assert asked("scale", negative_prompt="a fox") is None, "the two predictions are equal"
    assert asked("calls") == "8"
    assert asked("calls", guidance_interval=(0.3, 0.8)) == "6"
    assert asked("calls", guidance_scale=1.0) == "4"
    assert asked("initial") is not None
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert asked("initial", image=picture, strength=0.5) is None


def test_a_lesson_says_whether_the_picture_shows_the_mistake() -> None:
    small, large = (whatif._lesson(whatif.Result("eps", torch.zeros(0), "a/b", 3, None, apart), whatif.WORDS["one eps"])
                    for apart in (0.2, 7.0))  # fmt: skip
    assert "is not seen in a picture" in small
    assert "is not seen in a picture" not in large
    assert "all have 1e-5" in large
    assert "7 levels of 255" in large


def test_packed_weights_are_looked_at_as_they_are() -> None:
    """Unpacking them would copy the whole model; the look is as close to the run, and counts the same operations."""
    plain, sd = minidiff.bundled(), minidiff.bundled()
    fast.optimize(sd)
    request = Request(PROMPT, steps=2, seed=0)
    seen = collect(sd, request, bundled=True)
    packed = {name for name, p in sd.unet.named_parameters() if p.is_mkldnn}
    own = own_unet(seen)
    assert {name for name, p in own.named_parameters() if p.is_mkldnn} == packed
    for name, p in own.named_parameters():
        if name not in packed:
            assert p.data_ptr() == sd.unet.get_parameter(name).data_ptr()
    before = collect(plain, request, bundled=True)
    for look, other in zip(looks(seen), looks(before), strict=True):
        assert look.frame.conditional is not None
        assert_close(look.out, look.frame.conditional, HALF_BATCH)
        assert look.operations == other.operations
    assert sd.generate(PROMPT, steps=2, seed=0, output="tensor").equal(seen.pixels[None]), "the model is left as it is"
