"""What the runtime choosers and `compile` check before they write the slot."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from importlib import util
from typing import Any

from quadriga.core import cuda
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import RuntimeSpec


def one_runtime(setup: Setup) -> None:
    """Refuse a second runtime: the trait RUNTIME says that one was chosen."""
    if "RUNTIME" in setup.traits:
        raise NotApplicable(f"the runtime is {setup.runtime.name} already", "keep one runtime step")


def int8_runs(spec: RuntimeSpec) -> None:
    """Refuse a runtime and a quantization of which one cannot do with the other, whichever came first."""
    if spec.quant is None:
        return
    activations = spec.quant.activations
    if activations not in spec.int8:
        kind = "weights" if activations == "none" else activations
        raise NotApplicable(f"{spec.name} does not run {kind} int8", "use onnxruntime or openvino")
    if spec.by_torch and activations != "none":
        packages("torchao", extra="pt2e")


def half_runs(spec: RuntimeSpec) -> None:
    """Refuse half weights where the runtime stores none, whichever came first."""
    if spec.weights != "fp32" and spec.name == "executorch":
        raise NotApplicable(f"executorch stores no {spec.weights} weights here", "use onnxruntime, openvino or inductor")


def gpu() -> dict[str, Any]:
    """The GPU that PyTorch would use, as a row of `cuda.Found`. Refuse where there is none."""
    state = cuda.found()
    if state.used is None:
        raise NotApplicable(state.reason, state.remedy)
    return state.used


def on_gpu(setup: Setup) -> RuntimeSpec:
    """The runtime slot with the GPU as its device. Refuse without one, or where products would lose bits unasked."""
    gpu()
    if setup.runtime.matmul == "medium":
        raise NotApplicable("the matmul precision medium, meant for the CPU, is TF32 on a GPU", "use tf32, not matmul_backend")
    return replace(setup.runtime, device="cuda")


def ends_on(setup: Setup) -> str:
    """Where PyTorch computes in this recipe: the device that was chosen so far, or will be."""
    return "cpu" if {setup.runtime.device, setup.ending.device} == {"cpu"} else "cuda"


def compiler(device: str = "cpu") -> None:
    """Refuse without a C++ compiler; for a GPU, without Triton."""
    if device != "cpu" and util.find_spec("triton") is None:
        raise NotApplicable("the package triton is not installed, which compiles for GPUs", "pip install triton")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise NotApplicable("there is no C++ compiler", "install g++ (apt-get install g++)")


def packages(*names: str, extra: str) -> None:
    """Refuse where a package is absent; none is imported."""
    if missing := [name for name in names if util.find_spec(name) is None]:
        raise NotApplicable(f"the package {missing[0]} is not installed", f"pip install quadriga[{extra}]")
