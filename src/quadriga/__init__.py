"""Quadriga makes a PyTorch model cheaper to train, to store and to run, and proves it.

    quadriga.optimize(workload, floor="-0.5pt", minimize="latency", budget="10m", out="out")

Names are loaded when they are first used, so that `import quadriga` costs no `import torch`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quadriga import methods
    from quadriga.artifact import load
    from quadriga.core.recipe import Recipe, step
    from quadriga.core.workload import Workload
    from quadriga.study import optimize

__version__ = "0.1.0"
__all__ = ["Recipe", "Workload", "load", "methods", "optimize", "step"]

_HOMES = {
    "Recipe": "quadriga.core.recipe",
    "Workload": "quadriga.core.workload",
    "load": "quadriga.artifact",
    "optimize": "quadriga.study",
    "step": "quadriga.core.recipe",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name == "methods":
        return import_module("quadriga.methods")
    if name not in _HOMES:
        raise AttributeError(f"module 'quadriga' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
