"""ONNX Runtime on the CPU: one model.onnx with the weights inside."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from quadriga.core.slots import RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._types import Probe, package_probe

NAME = "onnxruntime"
DYNAMIC_OPERATORS = True  # dynamic int8 is realised with operators of the file


def probe() -> Probe:
    """It needs onnxruntime to run, onnx and onnxscript to export."""
    return package_probe("onnxruntime", "onnx", also=("onnx", "onnxscript"))


def write(taken: Capture, spec: RuntimeSpec, folder: Path, batches: list[int]) -> dict[str, Any]:
    """Write model.onnx, quantized as asked. Weights stored in half precision become float32 when they are loaded."""
    from quadriga.runtime._onnx import write_onnx

    write_onnx(taken, spec, folder / "model.onnx", dynamic_operators=DYNAMIC_OPERATORS)
    quantized = spec.quant is not None and spec.quant.activations != "none"
    return {
        "files": ["model.onnx"],
        "session": session(spec),
        "tolerance": 0.1 if quantized else 1e-4,
        "needs": ["torch", "safetensors", f"onnxruntime>={metadata.version('onnxruntime')}"],
    }


def session(spec: RuntimeSpec) -> dict[str, str]:
    """Settings of its session. Weights only: the stored int8 becomes float once, at load, so that products are in float."""
    return {"session.disable_quant_qdq": "1"} if spec.quant is not None and spec.quant.activations != "static" else {}
