"""What the runtime choosers and `compile` check before they write the slot."""

from __future__ import annotations

import os
import shutil
from importlib import util

from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup


def one_runtime(setup: Setup) -> None:
    """Refuse a second runtime: the trait RUNTIME says that one was chosen."""
    if "RUNTIME" in setup.traits:
        raise NotApplicable(f"the runtime is {setup.runtime.name} already", "keep one runtime step")


def float_activations(setup: Setup) -> None:
    """Refuse PyTorch's runtimes after a quantization of activations."""
    quant = setup.runtime.quant
    if quant is not None and quant.activations != "none":
        raise NotApplicable(f"PyTorch does not run {quant.activations} int8 here", "use onnxruntime or openvino")


def compiler() -> None:
    """Refuse without a C++ compiler."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise NotApplicable("there is no C++ compiler", "install g++ (apt-get install g++)")


def packages(*names: str, extra: str) -> None:
    """Refuse where a package is absent; none is imported."""
    if missing := [name for name in names if util.find_spec(name) is None]:
        raise NotApplicable(f"the package {missing[0]} is not installed", f"pip install quadriga[{extra}]")
