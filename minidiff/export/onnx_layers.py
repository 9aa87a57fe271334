"""The layers of an ONNX graph: which value is the output of which module, and all of them in one run.

The exporter notes for every node the modules that it was inside. A module's output is what its nodes compute and other
nodes read; where that is a single value, the module can be compared.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.export.formats import package, run_onnx, session
from minidiff.export.programs import Program, Tensors

SCOPES = "pkg.torch.onnx.name_scopes"


class Layers:
    """The ONNX program of a file with its layers as further outputs. ``names``: module -> value of the graph."""

    def __init__(self, path: Path, program: Program, modules: Iterable[str]) -> None:
        onnx = package("onnx")
        model = onnx.load(path, load_external_data=False)
        self.program = program
        self.names = {name: value for name, value in module_outputs(model.graph).items() if name in set(modules)}
        outputs = {value.name for value in model.graph.output}
        for value in dict.fromkeys(self.names.values()):
            if value not in outputs:
                model.graph.output.append(onnx.ValueInfoProto(name=value))
        self.session = session(model.SerializeToString(), path.parent)

    def run(self, inputs: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the values of the modules, and the outputs, by name."""
        wanted = list(dict.fromkeys([*self.names.values(), *self.program.outputs]))
        found = run_onnx(self.session, wanted)(inputs)
        return {name: found[v] for name, v in self.names.items()}, {k: found[k] for k in self.program.outputs}


def module_outputs(graph: Any) -> dict[str, str]:
    """Return {module: value} for the modules with a single output, in the order of their last node."""
    scopes: list[list[str]] = []
    for node in graph.node:
        noted = next((p.value for p in node.metadata_props if p.key == SCOPES), "[]")
        scopes.append([name for name in ast.literal_eval(noted)[:-1] if name])
    made = {value: k for k, node in enumerate(graph.node) for value in node.output}
    read_outside: dict[str, dict[str, int]] = {}

    def read(value: str, inside: Iterable[str]) -> None:
        if value in made:
            for module in set(scopes[made[value]]) - set(inside):
                read_outside.setdefault(module, {})[value] = made[value]

    for k, node in enumerate(graph.node):
        for value in node.input:
            read(value, scopes[k])
    for output in graph.output:
        read(output.name, ())
    single: Mapping[str, dict[str, int]] = {m: values for m, values in read_outside.items() if len(values) == 1}
    order = sorted(single, key=lambda module: next(iter(single[module].values())))
    return {module: next(iter(single[module])) for module in order}
