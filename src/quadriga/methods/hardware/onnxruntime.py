"""Execute with ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import one_runtime, packages


@dataclass(frozen=True, kw_only=True)
class ONNXRuntime(Method):
    """Run as one ONNX file with ONNX Runtime: operators fused, weights packed, little overhead per call.

    Source: ONNX Runtime, "Graph optimizations in ONNX Runtime".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "onnxruntime.ai/docs/performance/model-optimizations/graph-optimizations.html"
    adds = frozenset({"RUNTIME"})
    name = "onnxruntime"

    def apply(self, setup: Setup) -> Setup:
        """Choose it. NotApplicable when a runtime is chosen already, or the packages are absent."""
        one_runtime(setup)
        packages("onnxruntime", "onnx", "onnxscript", extra="onnx")
        return replace(setup, runtime=replace(setup.runtime, name=self.name))
