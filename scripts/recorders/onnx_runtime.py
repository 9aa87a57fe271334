"""Writer for ONNX Runtime: the values inside an ONNX graph become further outputs, all in one run.

    with Writer("mine.safetensors", "onnxruntime", dtype="float32") as writer:
        record("unet.onnx", {"x": x, "t": t, "context": context}, writer, "step.0/unet/")

A graph by torch's exporter notes the modules that each node was inside, and is recorded by their names. Another one is
recorded by the names of its values, for ``minidiff parity compare --names auto``. Needs onnx, onnxruntime and
``minidiff/parity/writer.py``.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping
from typing import Any

from minidiff.parity.writer import Writer

SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the modules around it, from the whole to the innermost, and its own


def layers(graph: Any) -> dict[str, str]:
    """Return {module, or value of a graph without modules: the value}, in the order of computation.

    What is computed inside a module goes into its output, which is therefore the last.
    """
    noted = [next((p.value for p in node.metadata_props if p.key == SCOPES), None) for node in graph.node]
    found: dict[str, str] = {}
    for node, scopes in zip(graph.node, noted, strict=True):
        names = ast.literal_eval(scopes)[-2::-1] if scopes is not None else []
        for name in names if any(noted) else node.output[:1]:
            if name:
                found.pop(name, None)
                found[name] = node.output[0]
    return found


def record(
    path: str | os.PathLike[str], inputs: Mapping[str, Any], writer: Writer, section: str = "", **session: Any
) -> None:
    """Run the graph of a file on ``inputs`` (name -> array), and add the value of every layer.

    ``session``: options of onnxruntime's ``InferenceSession`` (``providers=[...]``).
    """
    import onnx
    import onnxruntime

    model = onnx.load(path)
    found = layers(model.graph)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in set(found.values()) - outputs)
    running = onnxruntime.InferenceSession(
        model.SerializeToString(), **{"providers": ["CPUExecutionProvider"], **session}
    )
    values = running.run(list(found.values()), dict(inputs))
    for name, value in zip(found, values, strict=True):
        writer.add(section + name, value)
