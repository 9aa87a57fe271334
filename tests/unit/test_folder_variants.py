"""Folders with fp16 and other variants of their weights: the choice between them, and its report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights_convert
from minidiff import CheckpointError, cli
from tests.support import convert_sources as sources

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def named(file: str, variant: str) -> str:
    return file.replace(".safetensors", f".{variant}.safetensors")


def add(folder: Path, variant: str, parts: tuple[str, ...] = tuple(FILES), by: float = 1.0) -> None:
    """A variant beside the plain weights, told apart by its values."""
    for part in parts:
        tensors = {k: t + by for k, t in load_file(folder / part / FILES[part]).items()}
        save_file(tensors, folder / part / named(FILES[part], variant))


def value(source: weights_convert.conversion.Source, part: str, base: weights_convert.conversion.Source) -> float:
    """The difference of a part's first tensor from the plain one."""
    key = next(k for k in base.tensors if k.startswith(f"{part}."))
    return round(float((source.tensors[key].load() - base.tensors[key].load()).mean()), 3)


def test_plain_weights_go_first_and_a_variant_when_asked(folder: Path, good: Path) -> None:
    base = weights_convert.open_source(good)
    add(folder, "fp16")
    add(folder, "non_ema", ("unet",), by=2.0)
    plain = weights_convert.open_source(folder)
    assert [value(plain, p, base) for p in FILES] == [0, 0, 0]
    assert plain.report.notes == base.report.notes
    half = weights_convert.open_source(folder, variant="fp16")
    assert [value(half, p, base) for p in FILES] == [1, 1, 1]
    other = weights_convert.open_source(folder, variant="non_ema")
    assert [value(other, p, base) for p in FILES] == [2, 0, 0]
    assert "vae: the plain weights (no non_ema)" in other.report.notes
    assert "text_encoder: the plain weights (no non_ema)" in other.report.notes


def test_a_variant_alone_is_taken_and_said(folder: Path, good: Path) -> None:
    base = weights_convert.open_source(good)
    add(folder, "fp16")
    for part, file in FILES.items():
        (folder / part / file).unlink()
    found = weights_convert.open_source(folder)
    assert [value(found, p, base) for p in FILES] == [1, 1, 1]
    assert "unet: the fp16 weights, there are no others" in found.report.notes


def test_between_two_variants_the_caller_chooses(folder: Path) -> None:
    add(folder, "fp16")
    add(folder, "non_ema", ("unet",))
    (folder / "unet" / FILES["unet"]).unlink()
    with pytest.raises(CheckpointError, match="has the variants fp16, non_ema only; choose one with --variant"):
        weights_convert.open_source(folder)
    weights_convert.open_source(folder, variant="non_ema")


def test_a_variant_that_nobody_has(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no component has bf16 weights; leave out --variant"):
        weights_convert.open_source(folder, variant="bf16")
    weights_convert.convert(folder, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="variant='fp16' is for diffusers folders; a minidiff file has one"):
        weights_convert.open_source(tmp_path / "m.safetensors", variant="fp16")


@pytest.mark.parametrize("index", ["{}.safetensors.index.fp16.json", "{}.fp16.safetensors.index.json"])
@pytest.mark.parametrize("alone", [True, False])
def test_sharded_variant(folder: Path, good: Path, index: str, alone: bool) -> None:
    base = weights_convert.open_source(good)
    file = folder / "unet" / FILES["unet"]
    tensors = {k: t + 1 for k, t in load_file(file).items()}
    names = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {k: names[i % 2] for i, k in enumerate(tensors)}
    for name in names:
        save_file({k: t for k, t in tensors.items() if where[k] == name}, folder / "unet" / name)
    sources.write_json(folder / "unet" / index.format("diffusion_pytorch_model"), {"weight_map": where})
    if alone:
        file.unlink()
    assert value(weights_convert.open_source(folder, variant="fp16"), "unet", base) == 1
    assert value(weights_convert.open_source(folder), "unet", base) == (1 if alone else 0)


def test_a_variant_whose_file_is_gone_is_none(folder: Path) -> None:
    """A link that leads nowhere, as in a cache that was cleaned up."""
    file = folder / "unet" / FILES["unet"]
    file.unlink()
    (folder / "unet" / named(FILES["unet"], "fp16")).symlink_to(folder / "gone")
    with pytest.raises(CheckpointError, match="no weights; expected diffusion_pytorch_model"):
        weights_convert.open_source(folder)


def test_pickled_variant(folder: Path, good: Path) -> None:
    base = weights_convert.open_source(good)
    file = folder / "vae" / FILES["vae"]
    torch.save({k: t + 1 for k, t in load_file(file).items()}, folder / "vae" / "diffusion_pytorch_model.fp16.bin")
    file.unlink()
    assert value(weights_convert.open_source(folder), "vae", base) == 1


def test_optional_parts_may_be_missing_or_null(folder: Path) -> None:
    index = dict(sources.INDEX)
    del index["safety_checker"], index["feature_extractor"]
    sources.write_json(folder / "model_index.json", index)
    weights_convert.open_source(folder)
    sources.write_json(folder / "model_index.json", index | {"image_encoder": None, "safety_checker": [None, None]})
    assert weights_convert.open_source(folder).report.dropped == []


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(folder, "fp16")
    argv = ["convert", str(folder), str(tmp_path / "m.safetensors"), "--variant", "fp16"]
    assert cli.main(argv) == 0
    assert cli.main([*argv[:-1], "fp8", "--force"]) == 2
    assert "no component has fp8 weights" in capsys.readouterr().err
