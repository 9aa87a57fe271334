"""Writer for OpenVINO: the operation that ends each module becomes a further output of the graph.

    graph = openvino.convert_model(unet, example_input=(x, t, context))
    with Writer("mine.safetensors", "openvino", dtype="float32") as writer:
        record(graph, [x, t, context], writer, "step.0/unet/")

A graph that was converted from PyTorch keeps the modules' names (``__module.down.0.res.0.conv1/aten::_convolution``).
Another one, read from a file, is recorded by its operations' own names, for ``minidiff parity compare --names auto``.
Needs openvino and ``minidiff/parity/writer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minidiff.parity.writer import Writer

MODULE = "__module."
VALUES = ("Constant", "Parameter", "Result")  # compute nothing


def layers(graph: Any) -> dict[str, Any]:
    """Return {module, or operation of a graph without modules: its output}, in the order of computation.

    What is computed inside a module goes into its output, which is therefore the last.
    """
    operations = [op for op in graph.get_ordered_ops() if op.get_type_name() not in VALUES]
    traced = any(op.get_friendly_name().startswith(MODULE) for op in operations)
    found: dict[str, Any] = {}
    for op in operations:
        names = [op.get_friendly_name()]
        if traced:
            inside, _, _ = names[0].removeprefix(MODULE).partition("/")
            parts = inside.split(".") if names[0].startswith(MODULE) else []
            names = [".".join(parts[:k]) for k in range(len(parts), 0, -1)]
        for name in names:
            found.pop(name, None)
            found[name] = op.output(0)
    return found


def record(graph: Any, inputs: Sequence[Any], writer: Writer, section: str = "", device: str = "CPU") -> None:
    """Run ``graph``, which gets further outputs, on ``inputs`` in float32, and add the value of every layer."""
    import openvino

    found = layers(graph)
    for name, output in found.items():
        output.get_tensor().add_names({f"layer {name}"})
    graph.add_outputs(list(found.values()))
    results = openvino.compile_model(graph, device, {"INFERENCE_PRECISION_HINT": "f32"})(list(inputs))
    for name in found:
        writer.add(section + name, results[f"layer {name}"])
