"""PyTorch compiled by TorchInductor with frozen weights: eager's files, compiled at the first call (seconds to minutes)."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from quadriga.core.slots import RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._program import write_program
from quadriga.runtime._types import Probe, package_probe

NAME = "inductor"


def probe() -> Probe:
    """It needs a C++ compiler and Python's header files."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return Probe(False, "", "there is no C++ compiler", "install g++ (apt-get install g++)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return Probe(False, "", "Python.h is missing", "install Python's header files (apt-get install python3-dev)")
    return package_probe("torch", "torch")


def write(taken: Capture, spec: RuntimeSpec, folder: Path, batches: list[int]) -> dict[str, Any]:
    """Write the program and the weights; the compilation happens where it is loaded."""
    return {**write_program(taken, spec, folder), "compiles": True}
