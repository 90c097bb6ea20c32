"""What an artifact's `load.py` consists of. Each of these files is a part of it, and none needs anything else of Quadriga.

`source` puts the parts that a runtime needs together in one file; in this process they are imported as modules.
"""

from __future__ import annotations

import ast
from pathlib import Path

from quadriga.runtime.standalone import cuda_graphs, executorch, folder, onnxruntime, opencl
from quadriga.runtime.standalone.folder import (
    FORMAT,
    PACKED,
    RUNTIMES,
    Damaged,
    check_files,
    inside,
    keep_memory,
    read_entry,
    runtimes,
)
from quadriga.runtime.standalone.main import load
from quadriga.runtime.standalone.opencl import cl_device, from_cl, on_cl, to_cl
from quadriga.runtime.standalone.openvino import openvino_core, openvino_request
from quadriga.runtime.standalone.pytorch import channels_last, gpu_of, load_weights, torch_settings, unpack4
from quadriga.runtime.standalone.trees import difference, flatten, rebuild

__all__ = [
    "FORMAT", "PACKED", "RUNTIMES", "Damaged", "channels_last", "check_files", "cl_device", "cuda_graphs", "difference",
    "executorch", "flatten", "folder", "from_cl", "gpu_of", "inside", "keep_memory", "load", "load_weights", "on_cl",
    "onnxruntime", "opencl", "openvino_core", "openvino_request", "read_entry", "rebuild", "runtimes", "source", "to_cl",
    "torch_settings", "unpack4",
]  # fmt: skip

PARTS = {"eager": ("pytorch",), "inductor": ("pytorch",), "cuda_graphs": ("pytorch", "cuda_graphs")}
HERE = Path(__file__).parent
TOLD = '''"""Run this model without Quadriga: `load()` returns a callable on torch tensors; `python load.py` checks the folder.

    from load import load
    model = load()
    outputs = model(inputs)  # the same tensors, tuple or dict that the original model took

It reads only files of its own folder, by plain names. Errors name the damaged file.
"""
'''


def source(*used: str) -> str:
    """The text of `load.py` for runtimes.

    Args:
        used: keys of `RUNTIMES`.

    Example:
        >>> "def openvino_model(" in source("openvino"), "quadriga.runtime" in source("openvino")
        (True, False)
    """
    names = dict.fromkeys(["trees", "folder", *(part for one in used for part in PARTS.get(one, (one,))), "main"])
    parts = [_part((HERE / f"{name}.py").read_text(encoding="utf-8")) for name in names]
    imports = sorted({line for found, _ in parts for line in found}, key=_place)
    head = "\n".join([TOLD, "from __future__ import annotations", "", *imports])
    return "\n\n\n".join([head, *(body for _, body in parts)]) + "\n"


def _part(text: str) -> tuple[list[str], str]:
    """What a part imports from elsewhere, and all that stands below its imports."""
    found, last = [], 0
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            last = node.end_lineno or last
            if not ast.unparse(node).startswith(("from __future__", "from quadriga")):
                found.append(ast.unparse(node))
    return found, "\n".join(text.splitlines()[last:]).strip()


def _place(line: str) -> tuple[bool, str]:
    """The standard library first."""
    return "torch" in line, line
