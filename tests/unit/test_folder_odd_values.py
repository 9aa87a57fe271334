"""Odd values in a folder's JSON files (wrong types, NaN, huge numbers, FIFOs): a model or an error of one line."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import weights_convert
from minidiff.errors import CheckpointError, MinidiffError
from minidiff.models.tokenizer import END, START
from minidiff.models.tokenizer_files import tokenizer_config
from minidiff.samplers import Scheduler, sampler_from_diffusers
from minidiff.samplers.diffusers.classes import READERS, SCHEDULE
from weights_convert import configs_diffusers as configs
from weights_convert import single_schedule
from weights_convert.component import read_component

ODD: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 0.5, 2**70, 10**400, "8", "", [], {}, [[1]], [8, 8], [None], {"a": 1}, [1] * 99),
    *(float("nan"), float("inf"), -float("inf"), [float("nan")] * 2, "\u202e\x1b[31m", "x" * 9999),
)
FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)
TINY = ("a", "b", "a</w>", "b</w>", "ab</w>", "!", START, END)
# Options that the small folder does not mention, and that are read all the same.
MORE: dict[str, list[str]] = {
    "model_index.json": ["add_watermarker", "force_zeros_for_empty_prompt", "requires_aesthetics_score"],
    "unet/config.json": [*configs.UNET_ONLY, "only_cross_attention", "_diffusers_version", "mid_block_type"],
    "vae/config.json": [*configs.VAE_ONLY, "force_upcast", "mid_block_add_attention"],
    "text_encoder/config.json": [*configs.CLIP_ONLY, "eos_token_id", "architectures"],
    "scheduler/scheduler_config.json": ["thresholding", "my_extra", "_class_name"],
    "tokenizer/tokenizer_config.json": [
        *("padding_side", "init_inputs", "pad_token", "mask_token", "model_max_length", "added_tokens_decoder"),
        *("extra_special_tokens", "additional_special_tokens", "tokenizer_class", "split_special_tokens"),
    ],
}


@contextlib.contextmanager
def changed(file: Path, content: str) -> Iterator[None]:
    before = file.read_text() if file.exists() else None
    file.write_text(content)
    yield
    file.unlink() if before is None else file.write_text(before)


def fails_well(action: Any, where: str) -> bool:
    """True if the action is refused; any error but one of minidiff's, in one short line, ends the test."""
    try:
        action()
    except MinidiffError as e:
        message = str(e)
    except Exception as e:
        raise AssertionError(f"{where}: {type(e).__name__}: {str(e)[:200]}") from e
    else:
        return False
    assert "\n" not in message, where
    assert len(message) < 1000, where
    return True


@pytest.mark.parametrize("name", FILES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_option_with_odd_values(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = folder / "tokenizer"
    (table / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TINY)}))  # sooner read than CLIP's
    (table / "merges.txt").write_text("a b</w>\n")
    file = folder / name
    found = json.loads(file.read_text()) if file.exists() else {}
    reads: dict[str, Any] = {"tokenizer": lambda: tokenizer_config(table)}
    reads |= {part: lambda part=part: read_component(folder / part) for part in ("unet", "vae", "text_encoder")}
    read = reads.get(name.split("/")[0], lambda: weights_convert.open_source(folder))
    monkeypatch.setattr("weights_convert.folder.read_component", functools.cache(read_component))  # read once
    refused = 0
    for key in dict.fromkeys([*found, *MORE[name]]):
        for value in ODD:
            with changed(file, json.dumps(found | {key: value})):
                where = f"{name} {key}={str(value)[:40]}"
                refused += fails_well(read, where)
    assert refused > len(found) * len(ODD) / 4


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_field_of_a_scheduler_with_odd_values(name: str) -> None:
    for key in SCHEDULE | READERS[name].fields:
        for value in ODD:
            config = {"_class_name": name, key: value}
            fails_well(lambda config=config: Scheduler.from_diffusers(config), f"{name} {key}={str(value)[:40]}")


@pytest.mark.parametrize("value", [2**63, -(2.0**63), True, "1", float("nan"), 10**400])
def test_numbers_have_a_limit(value: Any) -> None:
    most = 2**63 - 2**10  # the float before
    assert configs.Options({"eps": -most}, "config.json").number("eps", 0) == -most
    with pytest.raises(CheckpointError, match="a number"):
        configs.Options({"eps": value}, "config.json").number("eps", 0)


@pytest.mark.parametrize(("said", "read"), [(2, None), (3, 3), (1, 1), (49407, 49407)])
def test_the_end_of_a_prompt_where_old_configs_are_wrong(said: int, read: int | None) -> None:
    assert configs.clip(configs.Options({"eos_token_id": said}, "config.json")).end_token == read
    assert configs.clip(configs.Options({}, "config.json")).end_token == 49407


@pytest.mark.parametrize(
    ("family", "prediction", "name"),
    [
        ("sd1", "epsilon", "PNDMScheduler"),
        ("sd1", "v_prediction", "PNDMScheduler"),
        ("sd2", "epsilon", "PNDMScheduler"),
        ("sd2", "v_prediction", "DDIMScheduler"),
        ("sdxl", "epsilon", "EulerDiscreteScheduler"),
        ("sdxl", "v_prediction", "EulerDiscreteScheduler"),
    ],
)
def test_the_scheduler_of_a_single_file_is_the_published_one(family: str, prediction: str, name: str) -> None:
    found = single_schedule.scheduler({}, family, {"schedule": {"prediction": prediction}}, "a file")
    assert (found["_class_name"], found["prediction_type"]) == (name, prediction)


def test_an_unknown_field_of_a_scheduler_is_a_warning() -> None:
    config = {"_class_name": "DDIMScheduler", "my_extra": 1, "solver_order": 3}
    with pytest.warns(
        UserWarning, match="DDIMScheduler has no option 'my_extra'; passed over, as in diffusers"
    ) as told:
        assert sampler_from_diffusers(config) == sampler_from_diffusers({"_class_name": "DDIMScheduler"})
    assert len(told) == 1
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="my_extra") as told:
        Scheduler.from_diffusers(config)
    assert len(told) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("name", [*FILES, "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json"])
def test_what_is_no_regular_file(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / name
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    with pytest.raises(CheckpointError, match=f"{file.name}: is a .*; name a regular file"):
        weights_convert.open_source(tmp_path / "copy")
