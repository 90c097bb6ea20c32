"""OpenCL through tinygrad: model.onnx runs on the first GPU of the first OpenCL platform, or on its default device.

That device may be the CPU, through PoCL: right, and several times slower than PyTorch. `Trainer` trains there.
"""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import Any

from quadriga.core import opencl
from quadriga.core.errors import NotApplicable
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._opencl_train import Trainer
from quadriga.runtime._types import Probe, package_probe

__all__ = ["NAME", "Trainer", "probe", "write"]

NAME = "opencl"


def probe() -> Probe:
    """It needs tinygrad to run, onnx and onnxscript to export, and a driver with a device; nothing of tinygrad is imported."""
    packages = package_probe("tinygrad", "opencl", also=("onnx", "onnxscript"))
    if not packages.ok:
        return packages
    state = opencl.found()
    return packages if state.used is not None else Probe(False, packages.version, state.reason, state.remedy)


def write(taken: Capture, spec: RuntimeSpec, folder: Path, batches: list[int]) -> dict[str, Any]:
    """Write model.onnx, quantized as asked, of operators that tinygrad has; half weights become float32 when they are loaded.

    Raises:
        NotApplicable: tinygrad lacks an operator, such as LSTM; or quantization without ONNX Runtime's tools.
    """
    from quadriga.runtime._onnx import write_onnx

    if spec.quant is not None and util.find_spec("onnxruntime") is None:
        raise NotApplicable("int8 needs ONNX Runtime's tools", "pip install quadriga[onnx]")
    write_onnx(taken, spec, folder / "model.onnx", dynamic_operators=True)
    _known(folder / "model.onnx")
    quantized = spec.quant is not None and spec.quant.activations != "none"
    return {
        "files": ["model.onnx"],
        "session": {},
        "tolerance": 0.1 if quantized else 1e-4,
        "needs": ["torch", "safetensors", "numpy", f"tinygrad>={metadata.version('tinygrad')}"],
    }


def _known(path: Path) -> None:
    """Refuse operators that tinygrad does not have, before anything is compiled."""
    import onnx
    from tinygrad.nn.onnx import onnx_ops

    if absent := sorted({node.op_type for node in onnx.load(path).graph.node} - set(onnx_ops)):
        raise NotApplicable(f"tinygrad has no ONNX operator {', '.join(absent)}", "use onnxruntime or openvino")
