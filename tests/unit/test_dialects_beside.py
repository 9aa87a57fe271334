"""Dialects where no other program is the measure: what is refused, what any text gives, and the way through a run."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff import fast
from minidiff.adapters import words
from minidiff.adapters.words import Word
from minidiff.cli import main
from minidiff.errors import ConfigError, MinidiffError, UnsupportedError
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline import StableDiffusion
from minidiff.pipeline.dialects import DIALECTS
from minidiff.pipeline.dialects.dialect import Reading
from minidiff.pipeline.recipe import parse
from minidiff.pipeline.request import PROMPT_STYLES, Request
from tests.support.tiny import SD, UNET, drawn, tiny_controlnet, tiny_ddpm, tiny_sd, tiny_xl
from tests.tolerances import BATCH, assert_close

TOKENIZER = Tokenizer()
SIGNS = [
    *'()[]:|,.+-="\\{}<> \n',
    "a",
    "red",
    "1.3",
    "0.5",
    "3",
    "BREAK",
    "AND",
    ".and(",
    ".blend(",
    "embedding:",
    "雪",
    "\ud800",
]
STEPS: dict[str, Any] = {"steps": 4, "seed": 0, "sampler": "euler", "guidance_scale": 5.0}


@pytest.fixture
def sd() -> StableDiffusion:
    return tiny_sd()


@pytest.fixture(scope="module")
def xl() -> StableDiffusion:
    return tiny_xl()


def latent(sd: StableDiffusion, prompt: Any, negative: Any = "blue", **options: Any) -> Tensor:
    return sd.generate(prompt, negative, output="latent", **{**STEPS, **options})


def near(a: Tensor, b: Tensor) -> None:
    """Equal but for the kernels that a batch size picks."""
    assert_close(a / b.std(), b / b.std(), BATCH)


REFUSED = [
    ("a1111", "a <lora:ink:0.7> cat", UnsupportedError, "'<lora:ink:0.7>': .*leave it out.*--lora FILE=0.7"),
    ("a1111", "a <hypernet:x:1> cat", UnsupportedError, "networks named in a prompt are not loaded; leave it out"),
    ("a1111", "a cat ADDCOL a dog", UnsupportedError, "ADDCOL splits the picture into regions"),
    ("a1111", "(a:1.2.3)", ConfigError, "the weight '1.2.3' is no number"),
    ("a1111", "[" * 99 + "a" + "]" * 99, ConfigError, "nest more than 50 deep"),
    ("a1111", "(" * 9000 + "a", ConfigError, "has the weight inf, which does not lie in"),
    ("comfyui", "a {red|blue} cat", UnsupportedError, "'{red|blue}' is a random choice"),
    ("comfyui", "a embedding:cat x", ConfigError, "'embedding:cat': there is no such learned word"),
    ("comfyui", "(a:inf)", ConfigError, "'a' has the weight inf"),
    ("comfyui", "(a:nan)", ConfigError, "'a' has the weight nan"),
    ("a1111", "a AND b: 20000", ConfigError, "has the weight 20000, which does not lie in -10000..10000"),
    ("compel", '("a", "b").and(1, 20000)', ConfigError, "'.and' has the weight 20000"),
    ("comfyui", "(" * 99 + "a" + ")" * 99, ConfigError, "nest more than 50 deep"),
    ("compel", "a cat.swap(dog)", UnsupportedError, r"\.swap\(\) exchanges attention maps"),
    ("compel", "a cat withLora(ink, 0.5)", UnsupportedError, r"withLora\(\.\.\.\) asks for another network"),
    ("compel", '("a", "b").blend(1)', ConfigError, r"\.blend\(\) joins 2 prompts, and has 1 weights"),
    ("compel", '("a", "b").and(1, x)', ConfigError, "the weight 'x' is no number"),
    ("compel", '("a", "b").blend(1, -1)', ConfigError, r"\.blend\(\) divides its weights by their sum, which is 0"),
    ("compel", '("a", "b").and() more', ConfigError, "'more' stands behind .and"),
    ("compel", "(" * 99 + "a" + ")" * 99, ConfigError, "nest more than 50 deep"),
    ("sd_embed", "(a:..)", ConfigError, "the weight '..' is no number"),
]


@pytest.mark.parametrize(("name", "text", "kind", "message"), REFUSED, ids=[f"{n} {t[:20]}" for n, t, *_ in REFUSED])
def test_what_is_not_done_is_refused_in_one_line(name: str, text: str, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        list(DIALECTS[name].readings(text, TOKENIZER, 10))
    assert "\n" not in str(error.value)


def test_a_negative_prompt_of_a1111_has_no_and_and_no_networks() -> None:
    (reading,) = DIALECTS["a1111"].readings("a AND <lora:x:1>", TOKENIZER, 10, negative=True)
    assert TOKENIZER.encode("a and <lora:x:1>") == list(
        reading.chunks[0].ids[1:][: len(TOKENIZER.encode("a and <lora:x:1>"))]
    )


@pytest.mark.parametrize("name", DIALECTS)
def test_any_text_gives_chunks_or_one_line(name: str) -> None:
    rng = random.Random(name)
    given = 0
    for _ in range(400):
        text = "".join(rng.choice(SIGNS) for _ in range(rng.randint(0, 30)))
        readings, refused = attempt(name, text)
        assert "\n" not in refused
        for chunk in (chunk for reading in readings for chunk in reading.chunks):
            assert len(chunk.ids) == len(chunk.weights) <= 77
            assert chunk.ids[0] == TOKENIZER.start
            assert chunk.ids[-1] == TOKENIZER.end
            assert len(chunk.ids) == 77 or name == "sd_embed"
        given += not refused
    assert given > 200


def attempt(name: str, text: str) -> tuple[list[Reading], str]:
    """Input of an encoder for a text, or the reason why it gets none."""
    try:
        return list(DIALECTS[name].readings(text, TOKENIZER, 7)), ""
    except MinidiffError as e:
        return [], str(e)


@pytest.mark.parametrize("name", ["a1111", "comfyui", "compel"])
def test_a_short_plain_prompt_is_what_it_is_without_a_dialect(
    name: str, sd: StableDiffusion, xl: StableDiffusion
) -> None:
    for model in (sd, xl):
        plain = latent(model, "a red cat")
        assert torch.equal(latent(model, "a red cat", prompt_style=name), plain)
        assert not torch.equal(latent(model, "a (red)1.3 (cat:1.4)", prompt_style=name), plain)


def test_a_recipe_keeps_the_dialect_and_one_without_it_is_plain(sd: StableDiffusion) -> None:
    (recipe,) = sd.steps("a (red:1.3) cat", prompt_style="a1111", **STEPS).recipes
    assert recipe["prompt_style"] == "a1111"
    again, unknown = parse(recipe, "here")
    assert unknown == []
    assert again.request.prompt_style == "a1111"
    assert torch.equal(
        sd.generate(again.request, output="latent"), latent(sd, "a (red:1.3) cat", None, prompt_style="a1111")
    )
    (plain,) = sd.steps("a (red:1.3) cat", **STEPS).recipes
    assert "prompt_style" not in plain


def test_a_schedule_changes_the_conditions_at_its_call(sd: StableDiffusion) -> None:
    run = sd.steps("a [cat:dog:0.5]", "blue", prompt_style="a1111", **STEPS)
    assert run.job is not None
    assert sorted(run.job.instead) == [3]  # the first text is read up to call 2, counted from 0
    cat, steps = list(sd.steps("a cat", "blue", prompt_style="a1111", **STEPS)), list(run)
    for i in range(3):
        near(steps[i].x, cat[i].x)
    dog = sd.steps("a dog", "blue", prompt_style="a1111", **STEPS)
    assert dog.job is not None
    seen = dog.job.predict(dog.job.sampler.scale_input(dog.job.plan, 3, steps[2].x), dog.job.plan.timesteps[3])
    near(steps[3].out, seen.out)


def test_alternating_texts_share_what_is_equal(sd: StableDiffusion) -> None:
    run = sd.steps("a [cat|dog]", prompt_style="a1111", **{**STEPS, "steps": 9})
    assert run.job is not None
    assert len({id(way) for way in run.job.instead.values()}) == 1
    heun = sd.steps("a [cat:dog:4]", prompt_style="a1111", **{**STEPS, "sampler": "heun"})
    assert heun.job is not None
    assert sorted(heun.job.instead) == [5, 6]  # calls count, and this method makes two a step


def test_conditionals_joined_by_and_are_weighed_against_one_negative_prompt(sd: StableDiffusion) -> None:
    def first(prompt: str, **options: Any) -> Any:
        return next(sd.steps(prompt, "blue", prompt_style="a1111", **{**STEPS, **options}))

    both, cat, dog = first("a cat AND a dog :0.5"), first("a cat"), first("a dog")
    u = cat.unconditional
    wanted = u + 5.0 * ((cat.conditional - u) + 0.5 * (dog.conditional - u))
    near(both.out, wanted)
    # at scale 1 the negative prompt does not cancel out here
    near(
        first("a cat AND a dog:0.5", guidance_scale=1).out,
        u + (cat.conditional - u) + 0.5 * (dog.conditional - u),
    )
    # where guidance is left out, the first conditional is what the others are measured against
    alone = first("a cat AND a dog:0.5", guidance_interval=(0.9, 1.0))
    near(alone.out, 1.0 * cat.conditional + 0.5 * (dog.conditional - cat.conditional))


@pytest.mark.parametrize("name", DIALECTS)
def test_prompts_of_a_batch_do_not_change_each_other(name: str, xl: StableDiffusion) -> None:
    prompts = ["a (red:1.3) cat", "a lighthouse by the sea, " * 20, "a [dog|cat] AND snow:0.4"]
    together = latent(xl, prompts, "blue, (bad:1.2)", num_images=2, prompt_style=name, steps=2)
    for k, prompt in enumerate(prompts):
        alone = latent(xl, prompt, "blue, (bad:1.2)", seed=[2 * k, 2 * k + 1], num_images=2, prompt_style=name, steps=2)
        near(together[2 * k : 2 * k + 2], alone)


def test_prompts_of_different_length_read_as_each_alone(sd: StableDiffusion) -> None:
    long = "a lighthouse by the sea, " * 30  # three chunks, and two
    both = next(sd.steps(long, long[:500], prompt_style="a1111", **STEPS))
    one, other = (next(sd.steps(text, text, prompt_style="a1111", **STEPS)) for text in (long, long[:500]))
    near(both.conditional, one.conditional)
    near(both.unconditional, other.unconditional)


def test_controls_steer_every_conditional_and_guess_spares_the_negative_prompt(sd: StableDiffusion) -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for guess in (False, True):
        control = minidiff.Control(tiny_controlnet(), picture, guess=guess)
        asked: dict[str, Any] = {"prompt_style": "a1111", "controls": [control], **STEPS}
        both, cat, dog = (next(sd.steps(text, "blue, " * 40, **asked)) for text in ("cat AND dog:0.5", "cat", "dog"))
        free = next(sd.steps("cat", "blue, " * 40, **{**asked, "controls": None}))
        u = cat.unconditional
        near(both.conditional, u + (cat.conditional - u) + 0.5 * (dog.conditional - u))
        assert ((u - free.unconditional).abs().max() < 1e-3) == guess
        assert not torch.allclose(cat.conditional, free.conditional, atol=1e-2)


def test_guess_spares_no_conditional_where_there_is_no_guidance(sd: StableDiffusion) -> None:
    """Outside the guidance interval the first prediction of a batch is that with the first prompt."""
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    control = minidiff.Control(tiny_controlnet(), picture, guess=True)
    seen: list[Any] = []
    handle = sd.unet.register_forward_pre_hook(lambda _, args: seen.append(args[5]))
    asked: dict[str, Any] = {"prompt_style": "a1111", "controls": [control], **STEPS}
    next(sd.steps("cat AND dog:0.5", guidance_interval=(0.5, 1.0), **asked))
    next(sd.steps("cat AND dog:0.5", **asked))
    handle.remove()
    (alone, guided) = (mid.flatten(1).any(dim=1).tolist() for _, mid in seen)
    assert (alone, guided) == ([True, True], [False, True, True])


def test_contexts_that_are_as_long_as_their_texts_may_not_fit_into_one_batch(sd: StableDiffusion) -> None:
    texts = ["a " * 66, "a " * 65, "a " * 63]
    with pytest.raises(ConfigError, match="texts of 65, 67, 68 tokens do not fit into one batch; make their pictures"):
        sd.steps(texts, "b", prompt_style="sd_embed", **STEPS)


def test_learned_words_are_read_in_every_dialect(sd: StableDiffusion) -> None:
    words.add(sd, Word("<cat-toy>", {"text_encoder": torch.ones(3, 16)}))
    ids = list(sd.tokenizer.added["<cat-toy>"])
    written = {
        "a1111": "(<cat-toy>:1.2)",
        "comfyui": "(<cat-toy>:1.2)",
        "compel": "(<cat-toy>)1.2",
        "sd_embed": "(<cat-toy>:1.2)",
    }
    for name, text in written.items():
        (chunk,) = DIALECTS[name].chunks(f"a {text} in ink", sd.tokenizer)
        assert list(chunk.ids[2:5]) == ids
        assert chunk.weights[1:6] == (1.0, 1.2, 1.2, 1.2, 1.0)
        assert latent(sd, f"a {text} in ink", prompt_style=name).isfinite().all()
    first, second = DIALECTS["a1111"].chunks("a " * 74 + "<cat-toy>", sd.tokenizer)
    assert ids[0] not in first.ids  # a word is not cut in two
    assert list(second.ids[1:4]) == ids
    (chunk,) = DIALECTS["comfyui"].chunks("a (embedding:<cat-toy>, ink:1.2)", sd.tokenizer)
    assert list(chunk.ids[2:5]) == ids


def test_zeros_stand_for_the_empty_negative_prompt_of_sdxl_where_the_program_has_it_so(xl: StableDiffusion) -> None:
    def unconditional(name: str, negative: str | None) -> bool:
        run = xl.steps("a cat", negative, prompt_style=name, **STEPS)
        seen: list[Tensor] = []
        handle = xl.unet.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
        next(run)
        handle.remove()
        return not seen[0][0].any()

    found = {name: (unconditional(name, None), unconditional(name, "")) for name in DIALECTS}
    assert found == {
        "a1111": (True, True),
        "comfyui": (False, False),
        "compel": (True, False),
        "sd_embed": (False, False),
    }


def test_the_second_encoder_may_have_a_text_where_the_program_has_two(xl: StableDiffusion) -> None:
    for name in DIALECTS:
        if DIALECTS[name].second:
            long = latent(xl, "a cat", prompt_2="a dog " * 50, prompt_style=name)
            assert not torch.equal(long, latent(xl, "a cat", prompt_style=name))
            continue
        with pytest.raises(ConfigError, match=f"{name} has one text for both encoders"):
            xl.steps("a cat", prompt_2="a dog", prompt_style=name, **STEPS)


def test_clip_skip_counts_for_both_prompts(sd: StableDiffusion) -> None:
    for name in DIALECTS:
        usual, skipped = (next(sd.steps("a cat", "blue", prompt_style=name, clip_skip=n, **STEPS)) for n in (0, 1))
        assert not torch.equal(usual.conditional, skipped.conditional)
        assert not torch.equal(usual.unconditional, skipped.unconditional)
    with pytest.raises(ConfigError, match=r"clip_skip=2 must be a whole number in 0\.\.1"):
        sd.steps("a cat", prompt_style="a1111", clip_skip=2, **STEPS)


def test_requests_that_cannot_work(sd: StableDiffusion) -> None:
    with pytest.raises(ConfigError, match=r"prompt_style='a111' is none of .*; did you mean a1111\?"):
        Request("a", prompt_style="a111")
    with pytest.raises(ConfigError, match="prompt_style=a1111 reads a text, and prompt_embeds is given"):
        sd.steps("a", prompt_embeds=torch.zeros(1, 77, 16), prompt_style="a1111", **STEPS)
    with pytest.raises(ConfigError, match="prompt is None, and prompt_style=a1111 reads a text"):
        sd.steps(None, prompt_style="a1111", **STEPS)
    with pytest.raises(ConfigError, match="2 negative prompts for 3 prompts"):
        sd.steps(["a", "b", "c"], ["d", "e"], prompt_style="a1111", **STEPS)
    with pytest.raises(ConfigError, match="prompt_style= is given"):
        tiny_ddpm().generate(prompt_style="a1111")
    distilled = drawn(replace(SD, unet=replace(UNET, guidance_dim=8)))
    assert isinstance(distilled, StableDiffusion)
    with pytest.raises(ConfigError, match="AND and its weights need guidance"):
        distilled.steps("a AND b", prompt_style="a1111", **STEPS)
    assert set(PROMPT_STYLES) == set(DIALECTS)


def test_dialects_go_with_switches_low_memory_and_threads(tmp_path: Path) -> None:
    sd = tiny_sd()
    asked = {name: ("a (red:1.3) [cat|dog] AND snow:0.4, " * 9, name) for name in DIALECTS}
    plain = {name: latent(sd, text, prompt_style=style) for name, (text, style) in asked.items()}
    sd.save(tmp_path / "model.safetensors")
    low = minidiff.load(tmp_path / "model.safetensors", "cpu", low_memory=True)
    found: dict[str, Tensor] = {}

    def make(name: str) -> None:
        text, style = asked[name]
        found[name] = latent(sd, text, prompt_style=style)

    threads = [threading.Thread(target=make, args=[name]) for name in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fast.optimize(sd, (*fast.SWITCHES, "halves"))
    for name, (text, style) in asked.items():
        assert torch.equal(found[name], plain[name])
        assert torch.equal(latent(low, text, prompt_style=style), plain[name])
        near(latent(sd, text, prompt_style=style), plain[name])


def test_the_command_prints_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokens", "a (red:1.3) BREAK cat", "--prompt-style", "a1111"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["chunk", "id", "weight", "token"]
    assert lines[2].split() == ["1", "736", "1.3", "red"]
    assert lines[4].split() == ["2", "2368", "1", "cat"]
    assert main(["tokens", "a [cat|dog]", "--prompt-style", "a1111", "--steps", "6"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model calls")]
    assert lines == ["model calls 1 to 2, 4, 6:", "model calls 3, 5:"]
    assert main(["tokens", "a cat, " * 30]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("cut: 15 tokens: a cat , a cat")
    assert main(["tokens", "a <lora:x:1>", "--prompt-style", "a1111"]) == 2


def test_like_suggests_the_dialect_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a (red) star", "--steps", "1", "--sampler", "euler", "--plain", "--out", f"{tmp_path}/"]
    for more, hints in ((["--like", "a1111"], 1), (["--like", "a1111", "--prompt-style", "a1111"], 0), ([], 0)):
        assert main([*command, *more]) == 0
        assert capsys.readouterr().err.count("--prompt-style a1111 reads its brackets") == hints


def test_a_mean_that_cannot_be_restored_is_told() -> None:
    """With all that counts weighed with 0, the mean is 0, and what restores it is NaN, as in that program."""
    from minidiff.pipeline.dialects.a1111 import A1111
    from minidiff.pipeline.dialects.chunks import Chunk

    def reader(ids: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[[0.0], [3.0]]]), torch.zeros(1, 1)

    told = "weights of this prompt leave an encoding whose mean is 0"
    with pytest.raises(ConfigError, match=told):
        A1111()._column(reader, [Chunk((1, 2), (1.0, 0.0))])  # type: ignore[arg-type]
    z, _ = A1111()._column(reader, [Chunk((1, 2), (1.0, 0.5))])  # type: ignore[arg-type]
    assert z[0, 1] == 3
