"""Textual inversion: learned words in prompts and in saved models, and errors in one line for what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from minidiff.adapters import words as embeddings
from minidiff.adapters.words import Word
from minidiff.config import TokenizerConfig
from minidiff.errors import CheckpointError, ConfigError, MinidiffError, UnsupportedError
from minidiff.models.tokenizer import Tokenizer
from minidiff.pipeline import StableDiffusion, load, random_model
from tests.support import tiny
from tests.tolerances import EXACT, assert_close
from weights_convert import convert, read_embedding

CAT = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sd() -> StableDiffusion:
    return tiny.tiny_sd()


def test_a_word_becomes_its_ids_wherever_it_stands() -> None:
    plain, taught = Tokenizer(), Tokenizer(TokenizerConfig(added=(("<Cat>", 2), ("<cat>s", 1))))
    assert taught.size == 49411
    for text in ("a <cat> sits", "a<CAT> sits", "a <cAt>  sits"):
        assert taught.encode(text) == [*plain.encode("a"), 49408, 49409, *plain.encode("sits")]
    assert taught.encode("<cat>s") == [49410], "the longer word wins"
    assert taught.encode("<dog>") == plain.encode("<dog>")
    assert taught.decode(taught.encode("a <cat> sits")) == "a <cat> sits"
    assert taught(["a <cat>"])[0, :6].tolist() == [49406, *plain.encode("a"), 49408, 49409, 49407, 49407]


@pytest.mark.parametrize("added", [(("two words", 1),), (("", 1),), (("<x>", 0),)])
def test_names_that_are_no_word(added: Any) -> None:
    with pytest.raises(ConfigError, match="added"):
        TokenizerConfig(added=added)


@torch.no_grad()
def test_its_vectors_are_what_the_encoder_sees(sd: StableDiffusion) -> None:
    before = sd.encode_prompt("a cat")[0]
    embeddings.add(sd, Word("<cat>", {"text_encoder": CAT}))
    seen: list[Tensor] = []
    handle = sd.text_encoder.token.register_forward_hook(lambda *a: seen.append(a[2]))
    sd.encode_prompt("a <cat>")
    handle.remove()
    assert_close(seen[0][0, 2:4], CAT, EXACT)
    assert_close(sd.encode_prompt("a cat")[0], before, EXACT)
    embeddings.add(sd, Word("<dog>", {"text_encoder": CAT[:1]}))
    assert sd.tokenizer.encode("<dog><cat>") == [49410, 49408, 49409]
    assert sd.text_encoder.token.weight.shape == (49411, 16)


def test_a_saved_model_keeps_it(sd: StableDiffusion, tmp_path: Path) -> None:
    embeddings.add(sd, Word("<cat>", {"text_encoder": CAT}))
    sd.save(tmp_path / "taught.safetensors")
    back = load(tmp_path / "taught.safetensors")
    assert isinstance(back, StableDiffusion)
    assert back.config.tokenizer is not None
    assert back.config.tokenizer.added == (("<cat>", 2),)
    assert_close(back.encode_prompt("a <cat>")[0], sd.encode_prompt("a <cat>")[0], EXACT)
    assert not torch.equal(back.encode_prompt("a <cat>")[0], back.encode_prompt("a cat")[0])


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_other_layouts_have_no_place_for_it(sd: StableDiffusion, tmp_path: Path, to: str) -> None:
    embeddings.add(sd, Word("<cat>", {"text_encoder": CAT}))
    sd.save(tmp_path / "taught.safetensors")
    with pytest.raises(UnsupportedError, match=f"has learned '<cat>'; the layout '{to}' keeps no such words"):
        convert(tmp_path / "taught.safetensors", tmp_path / "out", to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["taught.safetensors"]


def test_rows_that_a_table_has_to_spare_are_used(sd: StableDiffusion) -> None:
    roomy = replace(tiny.SD, text_encoder=replace(tiny.SD.text_encoder, vocab=49420))
    model = random_model(roomy)
    assert isinstance(model, StableDiffusion)
    embeddings.add(model, Word("<cat>", {"text_encoder": CAT}))
    assert model.text_encoder.token.weight.shape == (49420, 16)
    assert_close(model.text_encoder.token.weight[49408:49410].detach(), CAT, EXACT)


@pytest.mark.parametrize(
    ("word", "error", "words"),
    [
        (Word("<cat>", {"text_encoder": CAT[:, :8]}), CheckpointError, "width 16"),
        (Word("<cat>", {"text_encoder": CAT[:0]}), CheckpointError, "shape"),
        (Word("<cat>", {}), CheckpointError, "no vectors for the text_encoder"),
        (
            Word("<cat>", {"text_encoder": CAT, "text_encoder_2": CAT}),
            CheckpointError,
            "vectors for a text_encoder_2, which this tiny sd model does not have",
        ),
        (Word("<|endoftext|>", {"text_encoder": CAT}), ConfigError, "no prompt can contain this word"),
        (Word("<cat>", {"text_encoder": CAT.double() * 1e300}), CheckpointError, "infinite"),
        (
            Word("<cat>", {"text_encoder": CAT}, (Word("<CAT>", {"text_encoder": CAT}),)),
            ConfigError,
            "<CAT>: this word already exists",
        ),
        (Word("<cat>", {"text_encoder": CAT * torch.inf}), CheckpointError, "infinite"),
        (Word("a cat", {"text_encoder": CAT}), ConfigError, "one word"),
    ],
)
def test_words_that_do_not_fit(sd: StableDiffusion, word: Word, error: type[MinidiffError], words: str) -> None:
    config, weight = sd.config, sd.text_encoder.token.weight
    with pytest.raises(error, match=words):
        embeddings.add(sd, word)
    assert sd.config is config
    assert sd.text_encoder.token.weight is weight


def test_a_word_twice_and_a_model_with_few_words(sd: StableDiffusion) -> None:
    embeddings.add(sd, Word("<cat>", {"text_encoder": CAT}))
    with pytest.raises(ConfigError, match="already exists"):
        embeddings.add(sd, Word("<CAT>", {"text_encoder": CAT}))
    few = random_model(replace(tiny.SD, text_encoder=replace(tiny.SD.text_encoder, kept=(320, 49406, 49407))))
    assert isinstance(few, StableDiffusion)
    with pytest.raises(UnsupportedError, match="fixed vocabulary"):
        embeddings.add(few, Word("<cat>", {"text_encoder": CAT}))


# --- files -----------------------------------------------------------------------------------------------------------


def saved(path: Path, content: Any) -> Path:
    if path.suffix in (".safetensors", ".pti"):
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("file", "content", "name"),
    [
        ("learned_embeds.bin", {"<cat-toy>": CAT[0]}, "<cat-toy>"),
        ("learned_embeds.safetensors", {"<cat-toy>": CAT}, "<cat-toy>"),
        (
            "easy.pt",
            {
                "string_to_token": {"*": 265},
                "string_to_param": {"*": torch.nn.Parameter(CAT)},
                "name": "cat-toy",
                "step": 9,
            },
            "cat-toy",
        ),
        ("bad-hands.safetensors", {"emb_params": CAT}, "bad-hands"),
        ("nameless.pt", {"string_to_param": {"*": CAT}}, "nameless"),
        (
            "ldm.pt",
            {
                "string_to_token": {"*": torch.tensor(265)},
                "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(CAT)}),
            },
            "ldm",
        ),
        (
            "placeholder.pt",
            {"string_to_param": torch.nn.ParameterDict({"<fox>": torch.nn.Parameter(CAT)})},
            "<fox>",
        ),
        ("embeddings.pti", {"text_encoders_0": CAT}, "embeddings"),
        ("for-l.safetensors", {"clip_l": CAT[0]}, "for-l"),
    ],
)
def test_forms_of_files(tmp_path: Path, file: str, content: Any, name: str) -> None:
    word = read_embedding(saved(tmp_path / file, content), tiny.SD)
    assert word.name == name
    assert_close(word.vectors["text_encoder"], CAT[: len(word.vectors["text_encoder"])], EXACT)
    assert not word.vectors["text_encoder"].requires_grad
    assert read_embedding(tmp_path / file, tiny.SD, "<mine>").name == "<mine>"


@pytest.mark.parametrize("first", ["clip_l", "clip_g", "text_encoders_0", "text_encoders_1"])
def test_a_pair_for_two_encoders(tmp_path: Path, first: str) -> None:
    """In either order, and of either name."""
    names = {"clip_l": 0, "clip_g": 1} if first.startswith("clip") else {"text_encoders_0": 0, "text_encoders_1": 1}
    both = (CAT, torch.randn(2, 8, generator=torch.Generator().manual_seed(1)))
    order = sorted(names, key=lambda name: name != first)
    torch.save({name: both[names[name]] for name in order}, tmp_path / "both.pt")
    word = read_embedding(tmp_path / "both.pt", tiny.XL)
    assert word.name == "both"
    assert word.vectors.keys() == {"text_encoder", "text_encoder_2"}
    assert_close(word.vectors["text_encoder"], both[0], EXACT)
    assert_close(word.vectors["text_encoder_2"], both[1], EXACT)
    sd = tiny.tiny_xl()
    embeddings.add(sd, word)
    assert sd.tokenizer.encode("both") == sd.tokenizer_2.encode("both") == [49408, 49409]
    assert_close(sd.text_encoder_2.token.weight[49408:].detach(), both[1], EXACT)


def test_several_words_of_a_file_are_taught_together(sd: StableDiffusion, tmp_path: Path) -> None:
    path = saved(tmp_path / "two.safetensors", {"<s0>": CAT[0].clone(), "<s1>": CAT[:2].clone()})
    word = read_embedding(path, tiny.SD)
    assert [w.name for w in (word, *word.others)] == ["<s0>", "<s1>"]
    embeddings.add(sd, word)
    assert sd.tokenizer.encode("<s0><s1>") == [49408, 49409, 49410]
    assert_close(sd.text_encoder.token.weight[49408:].detach(), torch.cat([CAT[:1], CAT]), EXACT)
    with pytest.raises(CheckpointError, match="has several words, '<s0>', '<s1>'; they keep their names"):
        read_embedding(path, tiny.SD, "fox")
    before = sd.text_encoder.token.weight
    clash = Word("<new>", {"text_encoder": CAT}, (Word("<s1>", {"text_encoder": CAT}),))
    with pytest.raises(ConfigError, match="<s1>: this word already exists"):
        embeddings.add(sd, clash)
    assert sd.text_encoder.token.weight is before


def test_content_decides_and_rows_that_are_not_stored_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"<cat>": CAT}, tmp_path / "a.pt")
    assert read_embedding(tmp_path / "a.pt", tiny.SD).name == "<cat>"
    torch.save({"<cat>": torch.ones(1).expand(10**6, 16)}, tmp_path / "few bytes.pt")
    torch.save({"<cat>": torch.eye(16).to_sparse()}, tmp_path / "few.pt")
    torch.save({"string_to_param": 7}, tmp_path / "number.pt")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    (tmp_path / "b.pt").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "c.bin").write_bytes(b"<!doctype html>")
    for name, error, words in (
        ("few bytes.pt", CheckpointError, "not stored"),
        ("few.pt", CheckpointError, "'<cat>' is .*sparse"),
        ("number.pt", CheckpointError, "string_to_param is a int"),
        ("a.png", UnsupportedError, "is a picture; words that are hidden in one are not read"),
        ("b.pt", CheckpointError, "is a Git LFS pointer"),
        ("c.bin", CheckpointError, "is a web page"),
    ):
        with pytest.raises(error, match=words):
            read_embedding(tmp_path / name, tiny.SD)


def test_a_folder_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("a toy")
    torch.save({"<cat-toy>": CAT}, tmp_path / "learned_embeds.bin")
    assert read_embedding(tmp_path, tiny.SD).name == "<cat-toy>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a.weight": CAT, "b.weight": CAT + 1}, "'a.weight', 'b.weight'; no learned words .an adapter is for --lora"),
        ({f"<{i}>": CAT + i for i in range(300)}, "'<0>', .* and 297 more; no learned words"),
        ({"clip_l": CAT, "t5xxl": CAT + 1}, "'clip_l', 't5xxl' do not belong together"),
        ({"clip_l": CAT, "text_encoders_0": CAT + 1}, "do not belong together"),
        ({}, "no tensors; no learned words"),
        ({"a": CAT.int()}, "int32"),
        ({"a": CAT[None]}, "shape"),
    ],
)
def test_files_that_hold_no_word(tmp_path: Path, content: Any, words: str) -> None:
    for name in ("x.pt", "x.safetensors"):
        if content or name == "x.pt":
            with pytest.raises(CheckpointError, match=words):
                read_embedding(saved(tmp_path / name, content), tiny.SD)
    with pytest.raises(CheckpointError, match="no such file"):
        read_embedding(tmp_path / "none.pt", tiny.SD)
