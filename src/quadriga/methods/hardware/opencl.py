"""Execute on an OpenCL device."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.core import opencl
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import one_runtime, packages


@dataclass(frozen=True, kw_only=True)
class OpenCL(Method):
    """Run as one ONNX file on an OpenCL device with tinygrad: for devices that no other runtime here reaches.

    The device is the first GPU of the first OpenCL platform, else that platform's default device; nothing falls back to
    another. Where it is the CPU itself (PoCL), the outputs are right and come several times later than PyTorch's, so a search
    proposes this only where the device is something else; a recipe may name it anywhere.

    Source: Khronos, "The OpenCL Specification"; tinygrad, "Runtimes".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "docs.tinygrad.org/runtime"
    adds = frozenset({"RUNTIME"})
    name = "opencl"

    @classmethod
    def unsearched(cls) -> str:
        used = opencl.found().used
        if used is None:
            return "there is no OpenCL device"
        return "the OpenCL device here is the CPU, which other runtimes use better" if used["kind"] == "cpu" else ""

    def apply(self, setup: Setup) -> Setup:
        """Choose it. NotApplicable when a runtime is chosen already, or a package or the device is absent."""
        one_runtime(setup)
        packages("tinygrad", "onnx", "onnxscript", extra="opencl")
        state = opencl.found()
        if state.used is None:
            raise NotApplicable(state.reason, state.remedy)
        return replace(setup, runtime=replace(setup.runtime, name=self.name))
