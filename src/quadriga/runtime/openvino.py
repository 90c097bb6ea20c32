"""OpenVINO on the CPU: reads the same model.onnx. Nothing is reported to anyone: its telemetry package is kept out."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from quadriga.core.errors import BadInput
from quadriga.core.setup import RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._types import Probe, package_probe

NAME = "openvino"


def probe() -> Probe:
    """It needs openvino to run, onnx and onnxscript to export, and ONNX Runtime's tools for int8."""
    return package_probe("openvino", "openvino", also=("onnx", "onnxscript", "onnxruntime"))


def write(taken: Capture, spec: RuntimeSpec, folder: Path) -> dict[str, Any]:
    """Write model.onnx. Products are float32 unless `options` has precision = "bf16" (OpenVINO's own default on some CPUs)."""
    from quadriga.runtime._onnx import write_onnx

    precision = spec.options.get("precision", "f32")
    if precision not in ("f32", "bf16"):
        raise BadInput(f"precision is {precision!r}", 'give "f32" or "bf16"')
    write_onnx(taken, spec.quant, folder / "model.onnx", dynamic_operators=False)
    activations = spec.quant.activations if spec.quant is not None else "none"
    group = "32" if activations == "dynamic" else "0"  # its own dynamic int8 acts on compressed weights
    return {
        "files": ["model.onnx"],
        "session": {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group},
        "tolerance": 1e-4 if precision == "f32" and activations == "none" else 0.1,
        "needs": ["torch", "safetensors", f"openvino>={metadata.version('openvino').split('-')[0]}"],
    }
