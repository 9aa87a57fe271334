"""Export of a model's networks for other programs, each program checked against the model before it is delivered.

from minidiff.export import export
export(sd, "out", to="onnx")        # "torch" (torch.export), "onnx" or "aoti" (AOTInductor)
"""

from minidiff.export.folder import export
from minidiff.export.manifest import Export, open_export

__all__ = ["Export", "export", "open_export"]
