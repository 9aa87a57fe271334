"""``minidiff info``: the page about a model or a picture, ``--check``, and files that are damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import minidiff
from minidiff.cli import description
from minidiff.pipeline import random_model
from minidiff.pipeline.estimate import shown
from minidiff.storage import checkpoint, files
from tests.support.command import PLAIN, TEXT, Run, one_error


def test_info_of_a_model(run: Run, models: Path) -> None:
    ended = run("info", "text", "--check")
    assert ended.status == 0
    assert ended.err == []
    page = "\n".join(ended.out)
    file = checkpoint.open_checkpoint(models / "text.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        tensors = [t for name, t in file.file.lazy.items() if name.startswith(part + ".")]
        count = sum(torch.Size(t.shape).numel() for t in tensors)
        assert re.search(rf"^{part} +{len(tensors):,} +{count:,} +\S+ [kM]B  float32$", page, re.MULTILINE)
    total = sum(p.numel() for part in random_model(TEXT).parts.values() for p in part.parameters())
    assert re.search(rf"^total +{len(file.file.lazy):,} +{total:,} ", page, re.MULTILINE)
    assert f"{total * 4 / 1e6:.2f} MB" in page
    own = minidiff.estimate(models / "text.safetensors", minidiff.Request(""), "cpu")
    for line in (
        "family        sd1",
        f"hash          {file.hash}",
        f"identity      {minidiff.load(models / 'text.safetensors').identity}",
        "sampler       pndm",
        "picture       32 x 32 by default",
        f"memory        about {shown(own.peak)} on a CPU for a picture of 32 x 32 in float32; "
        "`minidiff generate --estimate` says it of others",
        "schedule      1000 timesteps, scaled_linear betas from 0.00085 to 0.012; the model predicts epsilon",
        "tokenizer     CLIP's public table; 77 ids a prompt, filled up with id 49407",
    ):
        assert line in ended.out
    assert ended.out[-1] == f"checked: the hash fits, and all {len(file.file.lazy):,} tensors are finite"


def test_info_of_a_model_without_text(run: Run) -> None:
    page = "\n".join(run("info", "plain").out)
    assert "no prompt" in page
    assert "tokenizer" not in page
    assert "picture   8 x 8 by default" in page
    assert re.search(r"^memory    about \d\S* [kM]B on a CPU for a picture of 8 x 8 in float32; ", page, re.MULTILINE)


def test_info_tells_dtypes_apart() -> None:
    tensors = {"unet.a": files.lazy(torch.zeros(3, 5)), "unet.b": files.lazy(torch.zeros(7).half())}
    lines = description.size_table(tensors).splitlines()
    assert lines[1].split() == ["unet", "2", "22", "74", "B", "float16,", "float32"]


def test_info_of_a_picture(run: Run) -> None:
    made = run("generate", "ein Füchslein", "--model", "text", "--steps", 2, "--seed", 7, "--quiet")
    ended = run("info", made.out[0])
    assert ended.status == 0
    found = json.loads("\n".join(ended.out))
    assert found == minidiff.read_recipe(made.out[0])
    assert found["prompt"] == "ein Füchslein"


def test_check_finds_a_changed_byte(run: Run, models: Path, tmp_path: Path) -> None:
    data = bytearray((models / "text.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    assert run("info", "bad.safetensors").status == 0
    ended = run("info", "bad.safetensors", "--check")
    assert ended.status == 2
    assert len(ended.err) == 1
    assert "the file was changed" in ended.err[0]


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "1 NaN and 0 inf"), (float("-inf"), "0 NaN and 1 inf")])
def test_check_names_the_first_tensor_that_is_not_finite(value: float, said: str, run: Run, tmp_path: Path) -> None:
    model = random_model(PLAIN)
    state = dict(model.unet.named_parameters())
    first, second = sorted(state)[3], sorted(state)[5]
    with torch.no_grad():
        state[first].view(-1)[1] = value
        state[second].view(-1)[1] = value
    model.save(tmp_path / "nan.safetensors")
    ended = run("info", "nan.safetensors", "--check")
    assert ended.status == 2
    assert len(ended.err) == 1
    assert f"tensor 'unet.{first}' holds {said}" in ended.err[0]
    assert second not in ended.err[0]
    assert "changed" not in ended.err[0]


def damaged(models: Path, how: str) -> bytes:
    """The bytes of a model's file with something wrong."""
    data = (models / "text.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(n for n in header if n.startswith("unet."))
    if how == "cut":
        return data[: len(data) // 2]
    if how == "empty":
        return b""
    if how == "text":
        return b"this is no model, whatever its name may say"
    if how == "header longer than the file":
        return (2**62).to_bytes(8, "little") + data[8:]
    if how == "another shape":
        header[name]["shape"] = [*header[name]["shape"], 1]
    elif how == "no tensor":
        del header[name]
    elif how == "offsets beyond the end":
        header[name]["data_offsets"] = [2**40, 2**40 + 4]
    elif how == "config":
        header["__metadata__"]["minidiff.config"] = '{"family": "\\u001b[31m", "heads": 3}'
    elif how == "version":
        header["__metadata__"]["minidiff.version"] = "99"
    changed = json.dumps(header).encode()
    return len(changed).to_bytes(8, "little") + changed + data[8 + size :]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "how",
    [
        "cut",
        "empty",
        "text",
        "header longer than the file",
        "another shape",
        "no tensor",
        "offsets beyond the end",
        "config",
        "version",
    ],
)
@pytest.mark.parametrize("command", [("info",), ("generate", "a fox", "--quiet", "--model")])
def test_damaged_model(how: str, command: tuple[str, ...], models: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(damaged(models, how))
    ended = run(*command, "bad.safetensors")
    one_error(ended, "bad.safetensors")
    assert ended.err[0].isprintable()


def test_files_that_are_something_else(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    one_error(run("info", "plain.png"), "plain.png", "no recipe")
    one_error(run("generate", "--model", "text", "--recipe", "plain.png"), "plain.png", "no recipe")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")
    one_error(run("info", "broken.png"), "broken.png")
