"""Pickled checkpoints: objects left by training are skipped, and no code in them is ever run."""

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


@FORMS
def test_files_are_mapped_not_read(tmp_path: Path, zipped: bool) -> None:
    """What is written into the file after it was opened, and before a tensor is used, is seen."""
    path = tmp_path / "sd.ckpt"
    torch.save({"a": torch.full((4096,), 3.0)}, path, _use_new_zipfile_serialization=zipped)
    at = path.read_bytes().index(torch.full((4096,), 3.0).numpy().tobytes())
    tensors, _ = read_pickle(path)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(torch.full((4096,), 5.0).numpy().tobytes())
    assert torch.equal(tensors["a"].load(), torch.full((4096,), 5.0))
    tensors["a"].load().zero_()  # its pages are the process's own
    assert path.read_bytes()[at : at + 4] == np.float32(5).tobytes()


@FORMS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_kind_of_tensor(tmp_path: Path, zipped: bool, protocol: int) -> None:
    """As torch reads them: dtypes, shared storages, views, transposed and empty ones, parameters, attributes."""
    base, attributed = torch.arange(24.0), torch.ones(3)
    attributed.note = "kept in a slot of its own"  # type: ignore[attr-defined]
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
    dtypes += [torch.uint8, torch.bool]
    found: dict[Any, Any] = {str(d).partition(".")[2]: torch.arange(5).to(d) for d in dtypes}
    found |= {"base": base, "view": base[6:12].view(2, 3), "transposed": base.view(4, 6).T, "scalar": base[7]}
    found |= {"empty": torch.empty(0, 4), "parameter": torch.nn.Parameter(base[:2]), "attributed": attributed}
    path = tmp_path / "sd.ckpt"
    torch.save(collections.OrderedDict(found), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    tensors, others = read_pickle(path)
    assert others == []
    assert tensors.keys() == found.keys()
    for name, want in found.items():
        got = tensors[name].load()
        assert (tensors[name].shape, tensors[name].dtype) == (tuple(want.shape), want.dtype), name
        assert torch.equal(got, want), name
        assert got.stride() == want.stride(), name
        assert type(got) is torch.Tensor, name
        assert not got.requires_grad, name


@FORMS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_float16(tmp_path: Path, zipped: bool, dtype: torch.dtype) -> None:
    every = torch.arange(256).to(torch.uint8).view(dtype)
    torch.save({"a": every}, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=zipped)
    got = read_pickle(tmp_path / "sd.ckpt")[0]["a"]
    assert got.dtype == got.load().dtype == torch.float16
    assert torch.equal(got.load().float().nan_to_num(7), every.float().nan_to_num(7))


def test_nothing_of_the_process_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: Any) -> None:
    """Torch's list of what other threads may unpickle is not touched, nor its default device heeded."""

    def touched(*_: Any, **__: Any) -> Any:
        raise AssertionError("torch's own reader was asked")

    torch.save({"a": torch.ones(2), "callback": trainer.ModelCheckpoint()}, tmp_path / "sd.ckpt")
    for name in ("load", "serialization.safe_globals", "serialization.add_safe_globals"):
        monkeypatch.setattr(f"torch.{name}", touched)
    with torch.device("meta"):
        tensors, others = read_pickle(tmp_path / "sd.ckpt")
        assert torch.equal(tensors["a"].load(), torch.ones(2, device="cpu"))
    assert others == ["callback"]


# --- pickles written by hand -----------------------------------------------------------------------------------------


def written(path: Path, program: bytes, *, zipped: bool, data: bytes = bytes(16)) -> Path:
    """A checkpoint with that pickle, and one storage "0" of four float32 whose bytes are ``data``."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", "3")
            archive.writestr("archive/data/0", data)
        return path
    program = program.replace(b"tQ", b"NtQ")  # there was one field more
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    parts = [*(pickle.dumps(x, 2) for x in head), program, pickle.dumps(["0"], 2)]
    path.write_bytes(b"".join(parts) + (4).to_bytes(8, "little") + data)
    return path


def named(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def number(value: int) -> bytes:
    return b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=True)


def storage(count: int = 4, kind: str = "torch.FloatStorage", key: bytes = b"0") -> bytes:
    text = b"X\7\0\0\0storage" + named(kind) + b"X\1\0\0\0" + key + b"X\3\0\0\0cpu" + number(count)
    return b"(" + text + b"tQ"


def rebuilt(place: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    shape = b"".join(b"(" + b"".join(map(number, numbers)) + b"t" for numbers in (size, stride))
    return named("torch._utils._rebuild_tensor_v2") + b"(" + place + number(offset) + shape + b"\x89}tR"


def holding(value: bytes) -> bytes:
    return b"\x80\2}X\1\0\0\0a" + value + b"s."


def nested(depth: int) -> bytes:
    return b")" + b"q\0h\0\x86" * depth


WHOLE = rebuilt(storage(), 0, (4,), (1,))


@FORMS
def test_what_is_written_by_hand_is_read(tmp_path: Path, zipped: bool) -> None:
    """The sound one, of which the hostile ones differ in one place."""
    data = torch.arange(4.0).numpy().tobytes()
    path = written(tmp_path / "sd.ckpt", holding(WHOLE), zipped=zipped, data=data)
    assert torch.equal(read_pickle(path)[0]["a"].load(), torch.arange(4.0))
    assert torch.equal(torch.load(path)["a"], torch.arange(4.0))


@FORMS
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (named("torch.FloatTensor") + b"K\4\x85R", r"asks for torch\.FloatTensor"),  # memory that nobody has written
        (named("torch.FloatTensor") + b"K\4\x85\x81", r"asks for torch\.FloatTensor"),
        (named("torch.Tensor") + b"K\4\x85R", r"calls torch\.Tensor"),
        (named("torch.Tensor") + b"K\4\x85\x81", r"calls torch\.Tensor"),
        (named("torch.storage.UntypedStorage") + b"K\4\x85R", r"calls torch\.storage\.UntypedStorage"),
        (named("torch.FloatStorage") + b"K\4\x85R", r"calls torch\.FloatStorage"),
        (named("torch._utils._rebuild_meta_tensor_no_storage") + b")R", "_rebuild_meta_tensor_no_storage"),
        (named("torch._utils._rebuild_device_tensor_from_numpy") + b")R", "_rebuild_device_tensor_from_numpy"),
        (WHOLE + b"(" + storage() + number(0) + b"K\1\x85K\1\x85tb", "sets the state of a Tensor"),
        (rebuilt(storage(), 1, (4,), (1,)), "reaches beyond its storage of 16 bytes"),
        (rebuilt(storage(), 0, (5,), (1,)), "reaches beyond its storage of 16 bytes"),
        (rebuilt(storage(), 0, (2,), (4,)), "reaches beyond its storage of 16 bytes"),
        (rebuilt(storage(), -1, (4,), (1,)), "offset are"),
        (rebuilt(storage(), 0, (4,), (-1,)), "strides or"),
        (rebuilt(storage(), 0, (-4,), (1,)), "whose shape"),
        (rebuilt(storage(), 0, (4,), ()), "strides or"),
        (rebuilt(storage(), 0, (2**61, 2**61), (0, 0)), "damaged"),
        (rebuilt(storage(), 0, (2**62, 0), (1, 1)), "whose shape"),
        (rebuilt(storage(), 0, (1,) * 100, (1,) * 100), "whose shape"),
        (rebuilt(storage(2**59), 0, (4,), (1,)), "damaged"),
        (rebuilt(storage(2**63 - 1), 0, (4,), (1,)), "entries"),
        (rebuilt(storage(-4), 0, (4,), (1,)), "entries"),
        (rebuilt(storage(8), 0, (4,), (1,)), "damaged"),
        (rebuilt(storage(2), 0, (2,), (1,)), "damaged"),
        (rebuilt(storage(4, "torch.DoubleStorage"), 0, (4,), (1,)), "damaged"),
        (rebuilt(storage(key=b"1"), 0, (4,), (1,)), "damaged"),
        (WHOLE + b"0" + rebuilt(storage(4, "torch.IntStorage"), 0, (4,), (1,)), "in two ways"),
        (WHOLE + b"0" + rebuilt(storage(2), 0, (2,), (1,)), "damaged|in two ways"),
        (rebuilt(storage(), 0, (4,), (1,))[:-5] + nested(60) + b"t\x89}tR", "strides or"),  # to quote it takes for ever
        (rebuilt(named("torch.float32"), 0, (4,), (1,)), "without a storage"),
        (number(0) + b"Q", "no storage of torch's"),
        (b"(X\7\0\0\0storagetQ", "no storage of torch's"),
        (storage().replace(b"storage", b"staging"), "no storage of torch's"),
        (storage()[:-2] + number(0) + b"tQ", "no storage of torch's"),  # a view of another one, in ancient files
        (storage(kind="torch.float32"), "in a way that torch.save does not"),
        (named("collections.OrderedDict") + b"(]]]]]e]ttR", "damaged|appends|calls|takes"),
    ],
)
def test_tensors_of_other_memory_are_refused(tmp_path: Path, zipped: bool, value: bytes, said: str) -> None:
    """Bytes that are not in the file must not become weights."""
    path = written(tmp_path / "sd.ckpt", holding(value), zipped=zipped)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_pickle(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("length", [0, 8, 12, 15, 20])
@FORMS
def test_a_record_of_another_size_than_its_storage(tmp_path: Path, zipped: bool, length: int) -> None:
    path = written(tmp_path / "sd.ckpt", holding(WHOLE), zipped=zipped, data=bytes(length))
    if not zipped and length > 16:  # what comes after the last storage is nobody's
        assert read_pickle(path)[0]["a"].load().sum() == 0
        return
    with pytest.raises(CheckpointError, match="damaged"):
        read_pickle(path)


def test_a_record_that_is_not_there_has_no_size(tmp_path: Path) -> None:
    path = written(tmp_path / "sd.ckpt", holding(rebuilt(storage(key=b"1"), 0, (4,), (1,))), zipped=True)
    with pytest.raises(CheckpointError, match="storage '1' of 16 bytes has a record of 0; it is damaged"):
        read_pickle(path)


@FORMS
@pytest.mark.parametrize(
    ("program", "kind"),
    [
        (b"\x80\2}" + nested(22) + b"Ns.", "tuple"),  # each level hashes the one below twice
        (b"\x80\2}(" + nested(22) + b"Nu.", "tuple"),
        (b"\x80\2" + named("collections.OrderedDict") + b"]" + nested(22) + b"N\x86a\x85R.", "tuple"),
        (b"\x80\2}" + number(2**61 - 1) + b"Ns.", "int"),  # whole numbers that are chosen to collide
        (b"\x80\2}G" + bytes(8) + b"Ns.", "float"),
        (b"\x80\4}\x8f(" + nested(60) + b"\x90Ns.", "list"),
    ],
)
def test_keys_that_cost_more_than_their_bytes(tmp_path: Path, zipped: bool, program: bytes, kind: str) -> None:
    path = written(tmp_path / "sd.ckpt", program, zipped=zipped)
    with pytest.raises(CheckpointError, match=f"refused, a {kind} is the key of a dict"):
        read_pickle(path)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\2" + b"]" * 1_100_000 + b".",
        b"\x80\2" + b"(" * 1_100_000 + b".",
        b"\x80\2]q\0" + b"(h\0e" * 400_000 + b".",
        b"\x80\2}" + b"r\xff\xff\xff\x7f" * 1_100_000 + b".",
    ],
    ids=["lists", "marks", "references", "memo"],
)
def test_the_number_of_instructions_is_bounded(tmp_path: Path, program: bytes) -> None:
    path = written(tmp_path / "sd.ckpt", program, zipped=True)
    with pytest.raises(CheckpointError, match=r"more than 1,000,000 instructions"):
        read_pickle(path)


@FORMS
@pytest.mark.parametrize(
    "program",
    [
        b"\x80\2L" + b"7" * 5_000_000 + b"L\n.",  # whole numbers in decimal, which take the square of their length
        b"\x80\2I" + b"7" * 5_000_000 + b"\n.",
        b"\x80\2(ios\nsystem\n.",
        b"\x80\2P0\n.",
    ],
    ids=["LONG", "INT", "INST", "PERSID"],
)
def test_instructions_that_torch_does_not_write(tmp_path: Path, zipped: bool, program: bytes) -> None:
    path = written(tmp_path / "sd.ckpt", program, zipped=zipped)
    with pytest.raises(CheckpointError, match="an instruction that torch"):
        read_pickle(path)


@FORMS
def test_a_name_that_is_no_text(tmp_path: Path, zipped: bool) -> None:
    """Written out or hashed, it takes for ever."""
    path = written(tmp_path / "sd.ckpt", b"\x80\4" + nested(60) + nested(60) + b"\x93.", zipped=zipped)
    with pytest.raises(CheckpointError, match="a name that is no text"):
        read_pickle(path)


@pytest.mark.parametrize(
    "system", [{"little_endian": False}, {"little_endian": 1}, {}, None, [("little_endian", True)]]
)
def test_big_endian_numbers_of_an_old_file_are_refused(tmp_path: Path, system: object) -> None:
    path = written(tmp_path / "sd.ckpt", holding(rebuilt(storage(), 0, (4,), (1,))), zipped=False)
    whole = path.read_bytes()
    said = pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
    assert whole.count(said) == 1
    path.write_bytes(whole.replace(said, pickle.dumps(system, 2)))
    with pytest.raises(CheckpointError, match=r"a pickle, but none that torch\.save writes"):
        read_pickle(path)


def test_big_endian_numbers_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "sd.ckpt", holding(WHOLE), zipped=True)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(CheckpointError, match="big-endian"):
        read_pickle(path)


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
