"""Pickled checkpoints: what training left in them is passed over, and nothing in them is ever run."""

from __future__ import annotations

import collections
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weights_convert
from minidiff import CheckpointError
from weights_convert.ckpt import read_pickle

FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Hostile:
    """Calls ``function(*arguments)`` when it is unpickled by a careless reader."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The classes that sd-v1-4.ckpt and its kin hold objects of; they are gone again before the file is read."""
    made = {}
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.nodes.AnyNode",
    ):
        module_name, _, class_name = name.rpartition(".")
        parts = module_name.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[: i + 1])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or types.ModuleType(name))
        cls = type(class_name, (), {"__module__": module_name})
        setattr(sys.modules[module_name], class_name, cls)
        made[class_name] = cls
    return types.SimpleNamespace(**made)


def trainers() -> list[str]:
    """The modules that stand for the trainers' packages."""
    return [m for m in sys.modules if m.split(".")[0] in ("pytorch_lightning", "omegaconf")]


@FORMS
def test_what_trainers_left_behind(tmp_path: Path, trainer: Any, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    """As sd-v1-4.ckpt: a callback with numpy scalars, omegaconf nodes, a defaultdict; tensors come out, they do not."""
    node = trainer.AnyNode()
    node.metadata = trainer.ContainerMetadata()
    node.metadata.ref_type = Any
    node.metadata.kinds = collections.defaultdict(list, {"a": [dict, int]})
    config = trainer.ListConfig()
    config.content = [node, node]
    found = {
        "state_dict": {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.nn.Parameter(torch.ones(2)), "n": 3},
        "callbacks": {trainer.ModelCheckpoint: {"best_model_score": np.float64(0.25), "config": config}},
        "global_step": 470000,
    }
    torch.save(found, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=zipped)
    for module in trainers():
        monkeypatch.delitem(sys.modules, module)
    tensors, others = read_pickle(tmp_path / "sd.ckpt")
    assert torch.equal(tensors["a.weight"].load(), torch.arange(6.0).reshape(2, 3))
    assert tensors["a.weight"].shape == (2, 3)
    assert not tensors["b"].load().requires_grad
    assert set(tensors) == {"a.weight", "b"}
    assert others == ["callbacks", "global_step", "n"]
    assert not trainers()


@FORMS
@pytest.mark.parametrize("where", ["beside", "inside", "instead"])
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool, where: str) -> None:
    mark = tmp_path / "mark"
    hostile = Hostile(os.mkdir, str(mark))
    found: Any = {
        "beside": {"state_dict": {"a": torch.ones(2)}, "callbacks": hostile},
        "inside": {"state_dict": {"a": torch.ones(2), "b": hostile}},
        "instead": hostile,
    }[where]
    path = tmp_path / "sd.ckpt"
    torch.save(found, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused, its pickle asks for (posix|nt)\.mkdir") as caught:
        weights_convert.convert(path, tmp_path / "out.safetensors")
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["sd.ckpt"]
    torch.load(path, weights_only=False)  # it really is malicious: the careless way runs it
    assert mark.exists()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (eval, ("1 + 1",)),
        (getattr, (1, "real")),
        (print, ("hello",)),
        (__import__, ("antigravity",)),
        (torch.load, ("x",)),
        (torch.hub.load, ("x", "y")),
    ],
    ids=["eval", "getattr", "print", "__import__", "torch.load", "torch.hub.load"],
)
@FORMS
def test_other_functions_are_refused(tmp_path: Path, zipped: bool, function: Any, arguments: tuple[Any, ...]) -> None:
    """Those under torch's own roof too: `weights_only` has its list, and nothing here widens it."""
    path = tmp_path / "sd.ckpt"
    torch.save({"a": Hostile(function, *arguments)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=function.__name__):
        read_pickle(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_plain_pickles_are_refused(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Hostile(os.mkdir, str(mark)), protocol=protocol))
    with pytest.raises(CheckpointError):
        weights_convert.convert(tmp_path / "plain.ckpt", tmp_path / "out.safetensors")
    assert not mark.exists()


def test_newer_protocols_hide_no_names(tmp_path: Path) -> None:
    """From protocol 4 on names come from the stack, where no disassembly finds them; torch refuses those opcodes."""
    mark = tmp_path / "mark"
    path = tmp_path / "sd.ckpt"
    torch.save({"a": Hostile(os.mkdir, str(mark))}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError):
        read_pickle(path)
    assert not mark.exists()


def test_damaged_archives(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "good.ckpt")
    data = (tmp_path / "good.ckpt").read_bytes()
    for cut in (0, 10, 100, len(data) // 2, len(data) - 30):
        (tmp_path / "bad.ckpt").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
            read_pickle(tmp_path / "bad.ckpt")
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("holiday.txt", "sun")
    with pytest.raises(CheckpointError, match=r"torch\.save"):
        read_pickle(tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.ckpt"):
        read_pickle(tmp_path / "text.ckpt")


@pytest.mark.parametrize("found", [[torch.ones(2)], torch.ones(2), 3])
def test_something_else_than_named_tensors(tmp_path: Path, found: Any) -> None:
    torch.save(found, tmp_path / "sd.ckpt")
    with pytest.raises(CheckpointError, match="expected tensors by name"):
        read_pickle(tmp_path / "sd.ckpt")


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, dtype=torch.complex64), torch.eye(2).to_sparse()], ids=["complex", "sparse"]
)
def test_tensors_of_another_kind(tmp_path: Path, tensor: Any) -> None:
    torch.save({"a": tensor}, tmp_path / "sd.ckpt")
    with pytest.raises(CheckpointError, match="'a'"):
        read_pickle(tmp_path / "sd.ckpt")


def test_zip_files_are_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or real(*a, **k))
    torch.save({"a": torch.ones(2)}, tmp_path / "sd.ckpt")
    read_pickle(tmp_path / "sd.ckpt")
    assert calls[0]["mmap"] is True
    assert calls[0]["weights_only"] is True


def test_a_compressed_archive_is_refused_unread(tmp_path: Path) -> None:
    """torch.save stores, and never compresses; a few kilobytes could unpack to any size."""
    torch.save({"a": torch.zeros(4)}, plain := tmp_path / "plain.ckpt")
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert list(read_pickle(plain)[0]) == ["a"]
    with pytest.raises(CheckpointError, match="is compressed"):
        read_pickle(tmp_path / "bomb.ckpt")


@FORMS
def test_a_tensor_whose_entries_share_memory_is_refused(tmp_path: Path, zipped: bool) -> None:
    torch.save(
        {"a": torch.arange(12.0).as_strided((3, 4), (3, 1))}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError, match="strides"):
        read_pickle(tmp_path / "a.ckpt")
