"""timm, on a machine whose Python has no torchvision that fits its PyTorch."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

APART = Path(__file__).resolve().parents[2] / "out/timm"  # a torchvision of another build; see `make bench-timm`
KEPT: list[torch.library.Library] = []  # names are gone with their library


def load_timm() -> Any:
    """The package. Two operators that a torchvision of another build lacks are declared first.

    That build is seen while timm is imported, and not by what looks for torchvision later.
    """
    if "timm" not in sys.modules and find_spec("torchvision") is None:
        _declare()
        sys.path.insert(0, str(APART))
        try:
            import timm
        finally:
            sys.path.remove(str(APART))
        return timm
    import timm

    return timm


def _declare() -> None:
    try:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)
    except RuntimeError:  # they are there
        pass
