"""The identity of a model: the same in every layout and place, another for other weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import minidiff
import weights_convert
from minidiff.adapters import words as embeddings
from minidiff.config import ModelConfig
from minidiff.pipeline import from_parts, random_model
from minidiff.storage.files import Lazy, TensorFile, lazy
from minidiff.storage.identity import DIGITS, SAMPLES, identify, sample
from minidiff.training.loop import Trainer
from minidiff.training.settings import TrainConfig
from tests.support import convert_sources
from tests.support.tiny import SD, tiny_sd

PARTS: dict[str, Lazy] = {"a": lazy(torch.arange(100.0).reshape(10, 10)), "b": lazy(torch.ones(3))}


def minidiff_file(path: Path, scale: float = 1.0) -> Path:
    model = tiny_sd()
    with torch.no_grad():
        for part in model.parts.values():
            for weight in part.parameters():
                weight.mul_(scale)
    model.save(path / "a.safetensors")
    return path / "a.safetensors"


def tensors(scale: float) -> dict[str, torch.Tensor]:
    return {name: t * scale if t.is_floating_point() else t for name, t in convert_sources.original_tensors().items()}


def single_file(path: Path, scale: float = 1.0) -> Path:
    safetensors.torch.save_file(tensors(scale), path / "a.safetensors")
    return path / "a.safetensors"


def zipped(path: Path, scale: float = 1.0) -> Path:
    torch.save({"state_dict": tensors(scale)}, path / "a.ckpt")
    return path / "a.ckpt"


def legacy(path: Path, scale: float = 1.0) -> Path:
    torch.save({"state_dict": tensors(scale)}, path / "a.ckpt", _use_new_zipfile_serialization=False)
    return path / "a.ckpt"


def folder(path: Path, scale: float = 1.0) -> Path:
    convert_sources.write_folder(path / "folder")
    for file in (path / "folder").rglob("*.safetensors"):
        found = {name: t * scale for name, t in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(found, file, {"format": "pt"})
    return path / "folder"


Source = Callable[..., Path]


def opened(path: Path, source: Source, **options: Any) -> Any:
    if source is minidiff_file:
        return minidiff.load(path, **options)
    return weights_convert.load(path, config=None if source is folder else convert_sources.OVERRIDE, **options)


@pytest.mark.parametrize("source", [minidiff_file, single_file, zipped, legacy, folder])
def test_a_source_has_one_name_and_its_weights_make_it(source: Source, tmp_path: Path) -> None:
    """At any dtype and on any way to open it; same header and other weights: another."""
    (tmp_path / "other").mkdir()
    path, other = source(tmp_path), source(tmp_path / "other", 1.5)
    first = opened(path, source, device="cpu")
    assert len(first.identity) == 32
    for options in ({"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"low_memory": True}):
        assert opened(path, source, device="cpu", **options).identity == first.identity
    assert opened(other, source, device="cpu").identity != first.identity
    first.to(dtype=torch.float64)
    assert first.identity == opened(path, source, device="cpu").identity
    (image,) = first.to(dtype=torch.float32).generate("a", steps=1, seed=0, progress=False)
    assert minidiff.read_recipe(image)["model_hash"] == first.identity


def test_a_file_whose_header_is_the_same(tmp_path: Path) -> None:
    """Its content hash stands in the header and cannot know; the samples do."""
    path = minidiff_file(tmp_path)
    before = minidiff.load(path, "cpu")
    data = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    for at in range(begin, len(data), 4):
        data[at] ^= 1
    path.write_bytes(bytes(data))
    after = minidiff.load(path, "cpu")
    assert after.hash == before.hash
    assert after.identity != before.identity


def test_what_it_hangs_on() -> None:
    name = identify(SD, PARTS)
    assert name == identify(SD, dict(reversed(PARTS.items())))
    changes: list[dict[str, Lazy]] = [
        PARTS | {"b": lazy(torch.tensor([1.0, 1, 2]))},
        PARTS | {"a": lazy(torch.arange(100.0).reshape(20, 5))},
        PARTS | {"b": lazy(torch.ones(3, dtype=torch.float16))},
        PARTS | {"c": lazy(torch.ones(0))},
        {"a": PARTS["a"], "c": PARTS["b"]},
    ]
    assert len({name, *(identify(SD, changed) for changed in changes)}) == 6
    assert identify(replace(SD, family="another"), PARTS) != name
    assert identify(replace(SD, sampler={"name": "ddim"}), PARTS) == name
    assert identify(replace(SD, schedule=replace(SD.schedule, prediction="v_prediction")), PARTS) != name


def test_options_that_a_later_version_adds_change_no_name() -> None:
    """Only what is not as it is by default counts: a field more, at its default, leaves names as they were."""
    name = identify(SD, PARTS)

    wider = dataclasses.make_dataclass("Wider", [("later", int, 3)], bases=(ModelConfig,), frozen=True, kw_only=True)
    same = wider(**{f.name: getattr(SD, f.name) for f in dataclasses.fields(SD)})
    assert identify(same, PARTS) == name
    assert identify(replace(same, later=4), PARTS) != name


def test_samples() -> None:
    """Few, spread over all of a tensor, the first and the last among them, of any dtype and layout."""
    for n in (0, 1, SAMPLES, SAMPLES + 1, 1000, 4321):
        found = torch.frombuffer(bytearray(sample(torch.arange(float(n)))), dtype=torch.float32) if n else torch.ones(0)
        assert len(found) == n or SAMPLES // 2 <= len(found) <= SAMPLES + 1
        if n:
            assert (found[0], found[-1]) == (0, n - 1)
            assert float(found.diff().max() if n > 1 else 0) <= max(1, 2 * n / SAMPLES)
    square = torch.arange(100.0).reshape(10, 10)
    assert sample(square.T) == sample(square.T.contiguous()) != sample(square)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int64):
        assert sample(square.to(dtype)) != sample((square + 40).to(dtype))


def test_a_model_in_memory_is_named_by_its_weights(tmp_path: Path) -> None:
    """One that came from no file, or was trained since: the name it has when it is saved and opened again."""
    model = random_model(SD, seed=1)
    name = model.identity
    assert name != random_model(SD, seed=2).identity
    model.save(tmp_path / "a.safetensors")
    found = minidiff.load(tmp_path / "a.safetensors", "cpu")
    assert found.identity == name
    Trainer(found, None, TrainConfig(batch=1))  # type: ignore[arg-type]
    assert found.identity == name
    with torch.no_grad():
        found.unet.conv_in.weight.mul_(2)
    assert found.identity != name
    assert found.hash == ""


def test_learned_words_make_another_model(tmp_path: Path) -> None:
    path = minidiff_file(tmp_path)
    names = set()
    for dtype in (torch.float32, torch.bfloat16):
        for vectors in (torch.ones(1, 16), torch.zeros(1, 16)):
            model = minidiff.load(path, "cpu", dtype)
            names.add(model.identity)
            embeddings.add(model, embeddings.Word("cat", {"text_encoder": vectors}))  # type: ignore[arg-type]
            names.add(model.identity)
    assert len(names) == 3
    assert {len(name) for name in names} == {DIGITS}


def test_parts_from_elsewhere_make_another_model(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    path, other = single_file(tmp_path), single_file(tmp_path / "other", 1.5)
    told = convert_sources.OVERRIDE
    plain, swapped = (weights_convert.load(path, "cpu", config=told, swap=s) for s in ({}, {"vae": other}))
    assert plain.identity != swapped.identity


def test_only_samples_are_read(tmp_path: Path) -> None:
    """Of a mapped file, pages that are looked at: all in all far less than the file."""
    status = Path("/proc/self/smaps_rollup")
    if not status.exists():
        pytest.skip("this system does not tell")
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({f"t{k}": torch.ones(4 << 20) for k in range(4)}, path)  # 64 MB
    file = TensorFile(path)

    def resident() -> int:
        return int(next(line for line in status.read_text().splitlines() if line.startswith("Rss")).split()[1]) << 10

    before = resident()
    identify(SD, file.lazy)
    assert resident() - before < 16 << 20


def test_from_parts_has_no_source() -> None:
    model = tiny_sd()
    assert from_parts(model.config, model.parts).identity == model.identity
