"""What the runtime choosers and `compile` check before they write the slot."""

from __future__ import annotations

import os
import shutil
from importlib import util

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


def compiler() -> None:
    """Refuse without a C++ compiler."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise NotApplicable("there is no C++ compiler", "install g++ (apt-get install g++)")


def packages(*names: str, extra: str) -> None:
    """Refuse where a package is absent; none is imported."""
    if missing := [name for name in names if util.find_spec(name) is None]:
        raise NotApplicable(f"the package {missing[0]} is not installed", f"pip install quadriga[{extra}]")
