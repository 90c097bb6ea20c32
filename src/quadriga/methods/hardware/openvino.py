"""Execute with OpenVINO."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import one_runtime, packages


@dataclass(frozen=True, kw_only=True)
class OpenVINO(Method):
    """Run as one ONNX file with OpenVINO in float32, tuned for latency; strong on transformers and int8.

    Source: OpenVINO, "CPU device".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html"
    adds = frozenset({"RUNTIME"})
    name = "openvino"

    def apply(self, setup: Setup) -> Setup:
        """Choose it. NotApplicable when a runtime is chosen already, or the packages are absent."""
        one_runtime(setup)
        packages("openvino", "onnx", "onnxscript", "onnxruntime", extra="onnx,openvino")
        return replace(setup, runtime=replace(setup.runtime, name=self.name))
