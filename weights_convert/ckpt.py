"""Pickled checkpoints (``.ckpt``, ``.bin``, ``.pt``), read without ever running what a pickle asks for.

A pickle is a program, and loading one carelessly runs it. ``torch.load(weights_only=True)`` executes only what tensors
need, and refuses any other name. Real checkpoints hold a few more, put there by the trainers of their day: the original
sd-v1-4.ckpt carries callbacks of pytorch_lightning with numpy scalars inside. Those names, a fixed list, are answered
with empty stand-ins that ignore whatever is done to them; none of those packages is imported.
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.config import quote
from minidiff.errors import CheckpointError
from minidiff.files import NAMES, Lazy, lazy

# Full names that are answered with a stand-in. They come from training loops; no tensor of a model is behind them.
HARMLESS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf)\.[\w.]+"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray|dtypes\.\w+)"
    r"|builtins\.(bool|dict|float|int|list|object|set|str|tuple)|typing\.Any|collections\.defaultdict"
    r"|torch\.nn\.modules\.container\.ParameterDict"
    r"|pathlib\.\w*Path|argparse\.Namespace"
)
LEGACY_PICKLES = 5  # torch before 1.6 wrote five in a row: magic number, version, system, the object, storage keys


class Inert:
    """Stands in for an object of training: takes any arguments and any state, and does nothing with them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def inert_dict(*args: Any) -> dict[Any, Any]:
    """Stands in for a defaultdict: the unpickler puts items into plain dicts only."""
    return {}


class Parameters(dict[str, Tensor]):
    """Stands in for a ParameterDict, which the first learned words came in: keeps its tensors and nothing else."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state["_parameters"])


STAND_INS: dict[str, Any] = {
    "collections.defaultdict": inert_dict,
    "builtins.dict": inert_dict,
    "torch.nn.modules.container.ParameterDict": Parameters,
}


def read_pickle(path: Path) -> tuple[dict[str, Lazy], list[str]]:
    """The tensors of a pickled checkpoint, mapped rather than read where the format allows, and what else is in it.

    A wrapping ``state_dict`` is opened; the names of everything that is no tensor (``optimizer_states``, ``epoch``)
    come second. Raises as :func:`read_object` does.
    """
    found = read_object(path)
    others = []
    if isinstance(found.get("state_dict"), dict):
        others = [str(k) for k in found if k != "state_dict"]
        found = found["state_dict"]
    others += [str(k) for k, v in found.items() if not isinstance(v, Tensor)]
    return {str(k): _lazy(path, str(k), v) for k, v in found.items() if isinstance(v, Tensor)}, others


def read_object(path: Path) -> dict[Any, Any]:
    """The dict that a pickle holds, as it is.

    Raises :class:`CheckpointError` for a file that is missing or damaged, or that holds any object beyond tensors and
    the stand-ins' list, named in the message; nothing in it is executed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    names = _global_names(path)
    refused = sorted(n for n in names if not (_allowed_by_torch(n) or HARMLESS.fullmatch(n)))
    if refused:
        raise CheckpointError(f"{path}: refused, its pickle asks for {', '.join(refused[:3])}; only tensors are loaded")
    stand_ins: list[Any] = [(STAND_INS.get(n, Inert), n) for n in names if HARMLESS.fullmatch(n)]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd protocols: it loads, or what it lacks is said below
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as e:  # a damaged pickle can raise anything
        # Torch's message begins with advice to load it without the guard; the reason stands behind these words.
        reason = " ".join(str(e).split()).rpartition("WeightsUnpickler error: ")[2]
        raise CheckpointError(f"{path}: not loaded, a damaged or unsafe pickle ({reason[:200]})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, expected tensors by name")
    return found


def _lazy(path: Path, name: str, tensor: Tensor) -> Lazy:
    if tensor.layout != torch.strided or tensor.dtype not in NAMES:
        raise CheckpointError(f"{path}: tensor {name!r} is {tensor.layout} of {tensor.dtype}, not one minidiff reads")
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise CheckpointError(f"{path}: tensor {name!r} has strides {tensor.stride()}; the pickle is damaged")
    return lazy(tensor.detach())


def _allowed_by_torch(name: str) -> bool:
    """Whether ``weights_only`` may answer this name by itself; what it does not know it refuses later."""
    return name.startswith(("torch.", "collections.OrderedDict", "_codecs.encode"))


def _global_names(path: Path) -> set[str]:
    """Every "module.name" that the pickle refers to, by disassembling it, not by running it."""
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return set().union(*(_names_in(file) for _ in range(LEGACY_PICKLES)))
        with zipfile.ZipFile(path) as archive:
            packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
            if packed:  # torch.save never compresses; what does may unpack to anything
                raise CheckpointError(
                    f"{path}: {quote(packed[0])} in it is compressed; torch.save writes no such archive"
                )
            inner = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
            if not inner:
                raise CheckpointError(f"{path}: a zip archive, but none that torch.save writes")
            return _names_in(io.BytesIO(archive.read(inner[0])))
    except CheckpointError:
        raise
    except Exception as e:  # zipfile and pickletools raise many kinds for damaged bytes
        raise CheckpointError(f"{path}: neither safetensors nor a readable pickle ({type(e).__name__}: {e})") from None


def _names_in(file: Any) -> set[str]:
    """The names in the next pickle of ``file``, as Python 3 calls them: protocol 2 still writes Python 2's."""
    names = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
    return names
