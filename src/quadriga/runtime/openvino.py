"""OpenVINO on the CPU: reads the same model.onnx. Nothing is reported to anyone: its telemetry package is kept out."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from quadriga.core.batch import resize
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._floats import computes, stored_tolerance
from quadriga.runtime._types import Probe, package_probe
from quadriga.runtime.standalone import difference, openvino_core, openvino_request

NAME = "openvino"
DYNAMIC_OPERATORS = False  # dynamic int8 is its own setting


def probe() -> Probe:
    """It needs openvino to run, onnx and onnxscript to export, and ONNX Runtime's tools for int8."""
    return package_probe("openvino", "onnx,openvino", also=("onnx", "onnxscript", "onnxruntime"))


def write(taken: Capture, spec: RuntimeSpec, folder: Path, batches: list[int]) -> dict[str, Any]:
    """Write model.onnx."""
    from quadriga.runtime._onnx import write_onnx

    write_onnx(taken, spec, folder / "model.onnx", dynamic_operators=DYNAMIC_OPERATORS)
    exact = spec.weights != "bf16" and (spec.quant is None or spec.quant.activations == "none")
    entry = {
        "files": ["model.onnx"],
        "session": session(spec),
        "tolerance": stored_tolerance(computes(taken)) if exact else 0.1,
        "needs": ["torch", "safetensors", f"openvino>={metadata.version('openvino').split('-')[0]}"],
    }
    _readable(folder / "model.onnx", entry)
    return {**entry, "batches": _agreeing(folder, entry, taken, batches)}


def session(spec: RuntimeSpec) -> dict[str, str]:
    """Settings of its session. Products are float32, and bfloat16 for such weights (OpenVINO's own default on some CPUs)."""
    dynamic = spec.quant is not None and spec.quant.activations == "dynamic"  # its own, which acts on compressed weights
    precision = "bf16" if spec.weights == "bf16" else "f32"
    return {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32" if dynamic else "0"}


def _readable(path: Path, entry: dict[str, Any]) -> None:
    """Have OpenVINO say which operators it cannot convert, before it reads the model as it is.

    OpenVINO 2026.4 ends the process (a segmentation fault) where a Clip follows such an operator; without the Clips it raises.
    """
    import onnx

    proto = onnx.load(path)
    clips = [node for node in proto.graph.node if node.op_type == "Clip"]
    for node in clips:
        node.op_type = "Identity"
        del node.input[1:]
    if clips:
        openvino_core(entry).read_model(proto.SerializeToString())


def _agreeing(folder: Path, entry: dict[str, Any], taken: Capture, batches: list[int]) -> list[int]:
    """The batch sizes whose specialised graph computes what the dynamic one does.

    OpenVINO 2026.4 gave wrong outputs for an int8 BERT whose shapes were made static; the dynamic graph was right.
    """
    good = []
    for batch in batches:
        leaves = resize(taken.sample, batch)
        feed = dict(zip(taken.names, (t.contiguous().numpy() for t in leaves), strict=True))
        found = []
        for size in (batch, None):
            request = openvino_request(folder, entry, size, 1)
            used = {i.any_name for i in request.model_inputs}
            request.infer({name: x for name, x in feed.items() if name in used})
            found.append([torch.as_tensor(t.data.copy()) for t in request.output_tensors])
        if all(difference(y, x) <= 0.3 * entry["tolerance"] for x, y in zip(*found, strict=True)):
            good.append(batch)
    return good
