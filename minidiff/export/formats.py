"""The three formats: how a program is written in each, and how it is read back and run.

* torch: programs of ``torch.export``, which any PyTorch of the same or a later release runs, with equal bits.
* onnx: for ONNX Runtime and whatever else reads ONNX. The weights lie beside the graph, in a file of their own.
* aoti: AOTInductor's packages, compiled for this processor, which C++ loads without Python.

All are made from one program of ``torch.export``. onnx, onnxscript and onnxruntime are imported when they are needed.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import CheckpointError, ConfigError, MinidiffError
from minidiff.export.programs import Program, Tensors

Format = Literal["torch", "onnx", "aoti"]
Runner = Callable[[Tensors], "dict[str, Tensor]"]
"""A program that was read back: inputs by name to outputs by name."""


class Bound(NamedTuple):
    """Largest difference from the model that is delivered, of an output's largest value, and its cause."""

    relative: float
    cause: str


BOUNDS: dict[str, Bound] = {
    "torch": Bound(0.0, "the same operations in the same order"),
    "onnx": Bound(5e-5, "float32 kernels that sum in another order, through up to 100 layers"),
    "aoti": Bound(5e-5, "float32 kernels that are fused and sum in another order, through up to 100 layers"),
}
FILES: dict[str, str] = {"torch": "{}.pt2", "onnx": "{}.onnx", "aoti": "{}.aoti.pt2"}
OPSET = 20
LONGEST = 300  # characters of another library's message


def need(to: str) -> None:
    """Raise :class:`ConfigError` unless everything that the format needs is here, before anything is computed."""
    if to == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            package(name)
    if to == "aoti":
        from minidiff.fast.compile import check_compiler

        check_compiler()


def hush() -> None:
    """Let exporters keep their remarks to themselves. For the command line alone: it is for the whole process."""
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)  # which else has a traceback of every damaged file
    warnings.filterwarnings("ignore", module=r"(torch|onnx\w*|copyreg|minidiff\.export\.formats)(\.|$)")


def package(name: str) -> Any:
    """Return a package that ONNX needs. Raises :class:`ConfigError` if it can't be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        why = (
            "is not installed" if isinstance(e, ModuleNotFoundError) and e.name == name else f"can't be imported ({e})"
        )
        raise ConfigError(f"for ONNX: {name} {why}; pip install 'minidiff[export]'") from None


@torch.no_grad()
def traced(program: Program) -> Any:
    """Return the program of ``torch.export``, with all named axes of any size."""
    free = torch.export.Dim.DYNAMIC
    shapes = {
        name: {k: free for k, axis in enumerate(axes) if isinstance(axis, str)} for name, axes in program.inputs.items()
    }
    example = program.example(*program.sizes[0])
    return torch.export.export(program.module.eval(), (), example, dynamic_shapes=shapes, strict=False)


def write(to: str, program: Program, made: Any, folder: Path) -> Path:
    """Write the traced program ``made`` into ``folder``; return the file that is opened to run it."""
    path = folder / FILES[to].format(program.name)
    if to == "torch":
        torch.export.save(made, path)
    elif to == "aoti":
        torch._inductor.aoti_compile_and_package(made, package_path=str(path))
    else:
        _write_onnx(program, made, path)
    return path


def _write_onnx(program: Program, made: Any, path: Path) -> None:
    names: Any = {"input_names": list(program.inputs), "output_names": list(program.outputs)}
    found = torch.onnx.export(made, (), dynamo=True, verbose=False, opset_version=OPSET, **names)
    assert found is not None
    _name_axes(found.model.graph, program)
    found.save(path, external_data=True)


def _name_axes(graph: Any, program: Program) -> None:
    """Put the names of the axes into the places of the tracer's symbols."""
    ir: Any = importlib.import_module("onnx_ir")
    names: dict[str | None, str] = {}
    for value, axes in zip(graph.inputs, program.inputs.values(), strict=True):
        for dim, axis in zip(value.shape, axes, strict=True):
            if isinstance(axis, str) and isinstance(dim, ir.SymbolicDim):
                names[dim.value] = axis
    values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        for k, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim):
                value.shape[k] = names.get(dim.value)


def reading(to: str, program: Program, path: Path) -> Runner:
    """Read a program back. Raises :class:`CheckpointError` for a file that is missing or damaged."""
    with blaming(path, "read"):
        return {"torch": _read_torch, "aoti": _read_aoti, "onnx": _read_onnx}[to](program, path)


def tried(to: str, program: Program, path: Path) -> Runner:
    """Read a program back, and run it once. Raises :class:`CheckpointError` for a program of other inputs or outputs
    than the network's, too."""
    run, inputs = reading(to, program, path), program.example(*program.sizes[0], seed=1)
    with blaming(path, f"run as the model's {program.name}"):
        found = run(inputs)
    for name, value in program.eager(inputs).items():
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, and the model's has {tuple(value.shape)}"
            raise CheckpointError(f"{path}: its {name!r} has the shape {shapes}; export the model again")

    def blamed(inputs: Tensors) -> dict[str, Tensor]:
        with blaming(path, f"run as the model's {program.name}"):
            return run(inputs)

    return blamed


@contextmanager
def blaming(path: Path, what: str) -> Iterator[None]:
    """Return a context in which whatever another library raises is an error of the file."""
    try:
        yield
    except (MinidiffError, MemoryError):
        raise
    except Exception as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0][:LONGEST]
        raise CheckpointError(f"{path}: can't be {what} ({why}); export the model again") from None


def _read_torch(program: Program, path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda inputs: program.named(module(**inputs))


def _read_aoti(program: Program, path: Path) -> Runner:
    module = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: program.named(module(**{name: x.contiguous() for name, x in inputs.items()}))


def _read_onnx(program: Program, path: Path) -> Runner:
    return run_onnx(session(path), list(program.outputs))


def session(model: Path | bytes, weights: Path | None = None) -> Any:
    """Return an ONNX Runtime session on the CPU, with as many threads as torch has. ``weights``: the folder of the
    files that a graph in memory names."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    where = model if isinstance(model, bytes) else str(model)
    return runtime.InferenceSession(where, options, providers=["CPUExecutionProvider"])


def run_onnx(session: Any, outputs: list[str]) -> Runner:
    """Return a function that runs an ONNX session for ``outputs``."""

    def run(inputs: Tensors) -> dict[str, Tensor]:
        arrays = {name: x.detach().numpy() for name, x in inputs.items()}
        return {k: torch.from_numpy(v) for k, v in zip(outputs, session.run(outputs, arrays), strict=True)}

    return run


def gap(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float:
    """Return the largest difference of any output, relative to that output's largest value; infinite for other shapes
    and for what is not finite."""
    largest = 0.0
    for name, value in want.items():
        if value.shape != got[name].shape or not bool(got[name].isfinite().all()):
            return float("inf")
        apart = (value.double() - got[name].double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
        largest = max(largest, apart.item())
    return largest


def measured(program: Program, run: Runner) -> float:
    """Return the largest :func:`gap` between the network and its export, over several sizes."""
    found = 0.0
    for k, size in enumerate(program.sizes):
        inputs = program.example(*size, seed=k + 1)
        found = max(found, gap(program.eager(inputs), run(inputs)))
    return found
