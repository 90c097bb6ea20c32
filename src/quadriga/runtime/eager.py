"""PyTorch without a compiler: program.py and weights.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quadriga.core.slots import RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._program import float_products, write_program
from quadriga.runtime._types import Probe, package_probe

NAME = "eager"


def probe() -> Probe:
    """PyTorch is always there."""
    return package_probe("torch", "torch")


def write(taken: Capture, spec: RuntimeSpec, folder: Path, batches: list[int]) -> dict[str, Any]:
    """Write the program and the weights.

    Raises:
        NotApplicable: int8 activations, which it could only imitate in float.
    """
    float_products(spec)
    return write_program(taken, spec, folder)
