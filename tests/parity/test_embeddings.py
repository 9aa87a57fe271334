"""Learned words against diffusers' textual inversion: the same file, the same ids, the same pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import weights_convert
from minidiff.adapters import words as embeddings
from minidiff.pipeline import StableDiffusion
from tests.support.parity.twins import folder_twin
from tests.tolerances import assert_close
from weights_convert import read_embedding

PROMPTS = (
    "a photo of <cat-toy> on a chair",
    "<CAT-TOY>",
    "a<cat-toy>b, <cat-toy>s and <cat-toy-2>",
    "two   <cat-toy> <cat-toy>",
    "a cat-toy <cat toy>",
)


@pytest.mark.parametrize("count", [1, 3])
def test_a_learned_word(tmp_path: Path, count: int) -> None:
    theirs = folder_twin(tmp_path / "sd1")
    theirs.set_progress_bar_config(disable=True)
    ours: Any = weights_convert.load(tmp_path / "sd1")
    assert isinstance(ours, StableDiffusion)
    width = ours.text_encoder.config.width
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    path = tmp_path / "learned_embeds.bin"
    torch.save({"<cat-toy>": vectors[0] if count == 1 else vectors}, path)
    theirs.load_textual_inversion(str(path))
    embeddings.add(ours, read_embedding(path, ours.config))
    for prompt in PROMPTS:
        told = theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
        ids = theirs.tokenizer(told, padding="max_length", max_length=77, truncation=True).input_ids
        if count > 1 and prompt != prompt.lower():
            # The reference puts in a word's further vectors only where it is written as it was named.
            ids = theirs.tokenizer(
                theirs.maybe_convert_prompt(prompt.lower(), theirs.tokenizer), padding="max_length", max_length=77
            ).input_ids
        assert ours.tokenizer(prompt)[0].tolist() == ids, prompt
    made = ours.generate(
        PROMPTS[0], steps=2, generator=torch.Generator().manual_seed(1), output="latent", progress=False
    )
    reference = theirs(
        PROMPTS[0], num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="latent"
    ).images
    assert_close(made, reference)


def test_a_pair_for_the_two_encoders_of_sdxl(tmp_path: Path) -> None:
    """The reference is told the encoder and the tokenizer of each half; the file holds the second one first."""
    theirs = folder_twin(tmp_path / "xl", "sdxl")
    theirs.set_progress_bar_config(disable=True)
    ours: Any = weights_convert.load(tmp_path / "xl")
    g = torch.Generator().manual_seed(0)
    halves = {"clip_g": torch.randn(2, 48, generator=g), "clip_l": torch.randn(2, 32, generator=g)}
    safetensors.torch.save_file(halves, tmp_path / "fox.safetensors")
    for key, encoder, tokenizer in (
        ("clip_l", theirs.text_encoder, theirs.tokenizer),
        ("clip_g", theirs.text_encoder_2, theirs.tokenizer_2),
    ):
        theirs.load_textual_inversion(halves[key], token="<fox>", text_encoder=encoder, tokenizer=tokenizer)
    plain = ours.encode_prompt("a <fox> sits")[0]
    embeddings.add(ours, read_embedding(tmp_path / "fox.safetensors", ours.config, "<fox>"))
    context, _, pooled, _ = theirs.encode_prompt("a <fox> sits", do_classifier_free_guidance=False)
    made = ours.encode_prompt("a <fox> sits")
    assert_close(made[0], context)
    assert_close(made[1], pooled)
    assert not torch.allclose(made[0], plain, atol=1e-2)
