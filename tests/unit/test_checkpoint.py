"""minidiff's own file format: the round trip, errors in one line for damaged files, and no needless copies."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from minidiff.config import CLIP_L, SD15, VAE_SD, ModelConfig, to_json
from minidiff.errors import CheckpointError, ConfigError, UnsupportedError
from minidiff.pipeline import StableDiffusion, Unconditional, assemble, load, random_model
from minidiff.storage import checkpoint
from minidiff.storage.checkpoint import CONFIG_KEY, VERSION_KEY, build, fill, is_minidiff, open_checkpoint
from minidiff.storage.files import ALIGNMENT, HASH_KEY, HEADER_KEY, Lazy, TensorFile, content_hash, lazy, write_tensors
from tests.support import tiny

METADATA = {VERSION_KEY: checkpoint.VERSION, CONFIG_KEY: to_json(tiny.DDPM)}


def tensors_of(model: StableDiffusion | Unconditional) -> dict[str, Tensor]:
    return {f"{n}.{k}": t for n, part in model.parts.items() for k, t in part.state_dict().items()}


def lazies(tensors: dict[str, Tensor]) -> dict[str, Lazy]:
    return {k: lazy(t) for k, t in tensors.items()}


@pytest.mark.parametrize("make", [tiny.tiny_sd, tiny.tiny_ddpm])
def test_save_and_load_give_the_same_model(tmp_path: Path, make: Callable[[], StableDiffusion | Unconditional]) -> None:
    model, path = make(), tmp_path / "model.safetensors"
    told = model.save(path)
    found = load(path, device="cpu")
    assert type(found) is type(model)
    assert found.config == model.config
    assert found.hash == told == model.hash == content_hash(path)
    ours, theirs = tensors_of(model), tensors_of(found)
    assert list(ours) == list(theirs)
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype
        assert torch.equal(t, theirs[name]), name
    for part in found.parts.values():
        assert not part.training
        assert all(not p.requires_grad and p.is_leaf and not p.is_meta for p in part.parameters())
    metadata = TensorFile(path).metadata
    assert metadata.keys() == {"format", VERSION_KEY, CONFIG_KEY, HASH_KEY, HEADER_KEY}
    assert json.loads(metadata[CONFIG_KEY])["family"] == model.config.family


def test_one_model_is_one_file_whatever_the_order(tmp_path: Path, ddpm: Unconditional) -> None:
    entries = lazies(tensors_of(ddpm))
    one = checkpoint.write_checkpoint(tmp_path / "a", tiny.DDPM, entries)
    other = checkpoint.write_checkpoint(tmp_path / "b", tiny.DDPM, dict(reversed(entries.items())))
    assert one == other
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_what_was_loaded_changes_nothing(tmp_path: Path, ddpm: Unconditional) -> None:
    ddpm.save(tmp_path / "a")
    load(tmp_path / "a", "cpu").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_float32_weights_are_the_mapped_ones(ddpm: Unconditional) -> None:
    """No copy: each parameter is the very memory that was handed in."""
    given = tensors_of(ddpm)
    found = tensors_of(assemble(tiny.DDPM, lazies(given), device="cpu"))
    for name, t in given.items():
        assert found[name].data_ptr() == t.data_ptr(), name


def test_a_weight_that_begins_off_a_cache_line_is_moved_to_one(ddpm: Unconditional) -> None:
    """Where a matrix begins decides how its products are summed, and with it the bits."""

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1), t.flatten()])[1:].reshape(t.shape)

    given = {k: shifted(t) for k, t in tensors_of(ddpm).items()}
    assert all(t.data_ptr() % ALIGNMENT for t in given.values())
    found = tensors_of(assemble(tiny.DDPM, lazies(given), device="cpu"))
    for name, t in given.items():
        assert found[name].data_ptr() % ALIGNMENT == 0, name
        assert torch.equal(found[name], t)


def test_a_saved_model_is_mapped_and_not_copied(tmp_path: Path, ddpm: Unconditional) -> None:
    """All that fills whole cache lines lies on them in the file, and stays there."""
    ddpm.save(tmp_path / "a")
    entries = TensorFile(tmp_path / "a").lazy
    held = {k: e.load() for k, e in entries.items()}
    found = tensors_of(assemble(tiny.DDPM, lazies(held), device="cpu"))
    kept = [k for k, t in found.items() if t.data_ptr() == held[k].data_ptr()]
    assert {k for k, e in entries.items() if e.nbytes % ALIGNMENT == 0} <= set(kept)


def test_loading_reads_each_tensor_once_and_meta_holds_no_memory(ddpm: Unconditional) -> None:
    counts: dict[str, int] = {}

    def counting(name: str, t: Tensor) -> Lazy:
        def read_it() -> Tensor:
            counts[name] = counts.get(name, 0) + 1
            return t

        return Lazy(tuple(t.shape), t.dtype, read_it)

    parts = build(tiny.DDPM)
    assert all(p.is_meta for part in parts.values() for p in part.parameters())
    entries = {k: counting(k, t) for k, t in tensors_of(ddpm).items()}
    checkpoint.account(parts, entries, "x")
    assert counts == {}
    fill(parts, entries)
    assert set(counts.values()) == {1}
    assert counts.keys() == entries.keys()


def test_no_module_has_state_beyond_its_parameters() -> None:
    """assign=True and the meta device leave buffers behind; so there are none, but for the rows of kept ids."""
    full = ModelConfig(
        family="x",
        unet=SD15,
        schedule=tiny.SD.schedule,
        vae=VAE_SD,
        text_encoder=CLIP_L,
        tokenizer=tiny.SD.tokenizer,
    )
    for config in (full, tiny.SD, tiny.DDPM):
        for part in build(config).values():
            assert list(part.buffers()) == []
            assert part.state_dict().keys() == dict(part.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path: Path, ddpm: Unconditional, dtype: torch.dtype) -> None:
    want = tensors_of(ddpm)
    ddpm.save(tmp_path / "full")
    converted = load(tmp_path / "full", "cpu", dtype)
    assert converted.dtype == dtype
    assert all(torch.equal(t, want[k].to(dtype)) for k, t in tensors_of(converted).items())
    converted.save(tmp_path / "other")
    again = load(tmp_path / "other", "cpu")  # on the CPU float32, whatever the file holds
    assert again.dtype == torch.float32
    assert all(torch.equal(t, want[k].to(dtype).float()) for k, t in tensors_of(again).items())
    as_is = build(tiny.DDPM)
    fill(as_is, TensorFile(tmp_path / "other").lazy)  # None: as they are
    assert all(p.dtype == dtype for part in as_is.values() for p in part.parameters())


def test_another_device(tmp_path: Path, ddpm: Unconditional) -> None:
    ddpm.save(tmp_path / "a")
    found = load(tmp_path / "a", device="meta")
    assert found.device == torch.device("meta")
    assert all(p.is_meta for part in found.parts.values() for p in part.parameters())


# --- what is wrong with a file ---------------------------------------------------------------------------------------

NAME = "unet.down.0.res.0.conv1.weight"


def _without(t: dict[str, Tensor]) -> None:
    del t[NAME]


def _without_three(t: dict[str, Tensor]) -> None:
    del t[NAME], t["unet.conv_in.weight"], t["unet.conv_out.bias"]


def _extra(t: dict[str, Tensor]) -> None:
    t["unet.surprise"] = torch.ones(1)


def _long(t: dict[str, Tensor]) -> None:
    t["unet.x\n" + "y" * 10_000] = torch.ones(1)


def _part(t: dict[str, Tensor]) -> None:
    t["vae.decoder.conv_in.weight"] = torch.ones(1)


def _shape(t: dict[str, Tensor]) -> None:
    t[NAME] = t[NAME][..., :1].clone()


def _rank(t: dict[str, Tensor]) -> None:
    t[NAME] = t[NAME].flatten()


def _whole(t: dict[str, Tensor]) -> None:
    t[NAME] = t[NAME].to(torch.int8)


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (_without, f"tensor '{NAME}' is missing; the file"),
    "three missing": (_without_three, "tensor 'unet.conv_in.weight' is missing (and 2 more)"),
    "extra": (_extra, "tensor 'unet.surprise' does not belong to this model"),
    "a long name": (_long, "does not belong to this model"),
    "a part that the config lacks": (_part, "tensor 'vae.decoder.conv_in.weight' does not belong"),
    "misshapen": (_shape, f"tensor '{NAME}' has shape (16, 16, 3, 1), the config says (16, 16, 3, 3)"),
    "flat": (_rank, f"tensor '{NAME}' has shape (2304,), the config says (16, 16, 3, 3)"),
    "whole numbers": (_whole, f"tensor '{NAME}' has dtype torch.int8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_do_not_fit(tmp_path: Path, ddpm: Unconditional, wrong: str) -> None:
    """Neither read nor written: one line that names the file and the tensor."""
    change, words = WRONG[wrong]
    tensors = tensors_of(ddpm)
    change(tensors)
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError) as caught:
        checkpoint.write_checkpoint(path, tiny.DDPM, lazies(tensors))
    assert list(tmp_path.iterdir()) == []
    write_tensors(path, lazies(tensors), METADATA)
    messages = [str(caught.value)]
    for device in ("cpu", "meta"):
        with pytest.raises(CheckpointError) as caught:
            load(path, device)
        messages.append(str(caught.value))
    for message in messages:
        assert message.startswith(f"{path}: ")
        assert words in message
        assert "\n" not in message
        assert len(message) < 300 + len(str(path))


def test_files_that_are_not_minidiffs(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"model.weight": torch.ones(1)}, path, {"format": "pt"})
    assert not is_minidiff(TensorFile(path).metadata)
    with pytest.raises(CheckpointError, match=r"other\.safetensors: .* not minidiff's; `minidiff convert`"):
        load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a folder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({VERSION_KEY: "2"}, "format version '2', this minidiff reads '1'"),
        ({VERSION_KEY: ""}, "format version ''"),
        ({VERSION_KEY: "9" * 10_000}, "format version"),
        ({CONFIG_KEY: to_json(tiny.SD).replace('"end_token":49407', f'"end_token":{10**30}')}, "end_token=1000"),
        (
            {CONFIG_KEY: to_json(tiny.SD).replace('"added_sinusoid":256', f'"added_sinusoid":{2**63}')},
            "added_sinusoid=9",
        ),
        ({CONFIG_KEY: ""}, "its config cannot be used (ModelConfig: not valid JSON"),
        ({CONFIG_KEY: "[" * 100_000}, "its config cannot be used"),
        ({CONFIG_KEY: "{}"}, "field family, schedule, unet is missing"),
        ({CONFIG_KEY: to_json(tiny.DDPM).replace('"groups":8', '"groups":7')}, "groups=7 does not divide channels=16"),
        ({CONFIG_KEY: to_json(tiny.DDPM).replace('"layers":1', '"layers":1000000000')}, "layers=1000000000"),
        ({CONFIG_KEY: to_json(replace(tiny.SD, text_encoder=None, tokenizer=None))}, "is missing"),
        ({CONFIG_KEY: to_json(replace(tiny.DDPM, vae=tiny.SD.vae))}, "is missing"),
    ],
)
def test_headers_that_lie(tmp_path: Path, ddpm: Unconditional, change: dict[str, str], words: str) -> None:
    path = tmp_path / "a"
    write_tensors(path, lazies(tensors_of(ddpm)), METADATA | change)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def test_a_header_without_a_config_or_hash(tmp_path: Path, ddpm: Unconditional) -> None:
    path = tmp_path / "a"
    safetensors.torch.save_file(tensors_of(ddpm), path, {VERSION_KEY: "1"})
    with pytest.raises(CheckpointError, match="its config cannot be used"):
        open_checkpoint(path)
    safetensors.torch.save_file(tensors_of(ddpm), path, METADATA)
    assert open_checkpoint(path).hash == ""
    assert load(path, "cpu").hash == ""


def test_read_opens_without_reading(tmp_path: Path, ddpm: Unconditional) -> None:
    told = ddpm.save(tmp_path / "a")
    found = open_checkpoint(tmp_path / "a")
    assert (found.config, found.hash) == (tiny.DDPM, told)
    assert found.file.lazy.keys() == tensors_of(ddpm).keys()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(tiny.SD, text_encoder=None, tokenizer=None), "no text encoder"),
        (replace(tiny.DDPM, vae=tiny.SD.vae), "no text encoder"),
        (replace(tiny.SD, unet=replace(tiny.UNET, in_channels=7)), "in_channels=7"),
        (replace(tiny.SD, unet=replace(tiny.UNET, added_dim=2000)), "second text encoder"),
    ],
)
def test_models_that_no_pipeline_runs(config: ModelConfig, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        checkpoint_to_pipeline(config)


def checkpoint_to_pipeline(config: ModelConfig) -> Any:
    from minidiff.pipeline import from_parts

    return from_parts(config, build(config))


def test_a_sampler_or_table_that_is_nonsense(ddpm: Unconditional) -> None:
    config = replace(tiny.DDPM, sampler={"name": "magic"})
    model = assemble(config, lazies(tensors_of(ddpm)), "cpu")
    with pytest.raises(ConfigError, match="magic"):
        model.generate(steps=1, progress=False)


def test_a_text_encoder_with_few_rows_comes_back(tmp_path: Path) -> None:
    """Which id reads which row is no tensor of the file: it must be there after a build without memory all the same."""
    config = replace(tiny.SD, text_encoder=replace(tiny.SD.text_encoder, kept=(320, 736, 49406, 49407)))
    model = random_model(config, seed=3)
    assert isinstance(model, StableDiffusion)
    model.save(tmp_path / "few.safetensors")
    back = load(tmp_path / "few.safetensors")
    assert isinstance(back, StableDiffusion)
    assert back.text_encoder.token.weight.shape == (5, 16)
    assert torch.equal(back.encode_prompt("a red a")[0], model.encode_prompt("a red a")[0])
    assert not torch.equal(back.encode_prompt("a red a")[0], back.encode_prompt("a a a")[0])


def test_a_changed_header_is_seen_when_it_was_written_anew(tmp_path: Path, ddpm: Unconditional) -> None:
    """With the spaces of another program's JSON."""
    ddpm.save(path := tmp_path / "m.safetensors")
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + size])
    table["__metadata__"]["minidiff.config"] = table["__metadata__"]["minidiff.config"].replace(
        '"heads":3', '"heads":1'
    )
    header = json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with pytest.raises(CheckpointError, match="header is not what minidiff wrote"):
        load(path)


def test_a_changed_header_is_seen_when_the_file_is_opened(tmp_path: Path, ddpm: Unconditional) -> None:
    """A digit of the config changed by a bad disk is another model, which would load and paint nonsense."""
    ddpm.save(path := tmp_path / "m.safetensors")
    data = path.read_bytes()
    assert data.count(b'\\"heads\\":3') == 1
    path.write_bytes(data.replace(b'\\"heads\\":3', b'\\"heads\\":1'))
    with pytest.raises(CheckpointError, match="header is not what minidiff wrote"):
        open_checkpoint(path)
