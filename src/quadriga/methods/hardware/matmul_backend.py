"""Which library multiplies float32 matrices: PyTorch's default, or oneDNN through the precision "medium"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup

LIMIT = 1e-5  # float32 products of this size err by about 4e-7; bfloat16 ones by 4e-3


def product_error(multiply: Callable[[Tensor, Tensor], Tensor], size: int = 192) -> float:
    """‖multiply(a, b) − ab‖ / ‖ab‖ with ab in float64, for normal matrices [size, size].

    Example:
        >>> product_error(torch.matmul) < LIMIT < product_error(lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
        True
    """
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(size, size, generator=draw), torch.randn(size, size, generator=draw)
    exact = a.double() @ b.double()
    return float((multiply(a, b).double() - exact).norm() / exact.norm())


def medium_error() -> float:
    """The error of this processor's products at the precision "medium"; the process's precision is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return product_error(torch.matmul)
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, kw_only=True)
class MatmulBackend(Method):
    """Multiply float32 matrices through oneDNN, which is about twice as fast as MKL on AMD processors.

    Refused where the processor rounds to bfloat16 at this setting (AMX): the product is compared with float64.

    Args:
        precision: "medium" goes through oneDNN; "highest" is PyTorch's default.

    Source: PyTorch, torch.set_float32_matmul_precision.
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    trains = True
    source = "docs.pytorch.org/docs/stable/generated/torch.set_float32_matmul_precision.html"
    search: ClassVar = {"precision": ("medium",)}

    precision: Literal["highest", "medium"] = "medium"

    def apply(self, setup: Setup) -> Setup:
        """Set the precision. NotApplicable when it is set already, or products would not be float32."""
        if setup.runtime.matmul == self.precision:
            raise NotApplicable(f"the matmul precision is {self.precision} already")
        if self.precision == "medium" and (error := medium_error()) > LIMIT:
            raise NotApplicable(f"this processor's products err by {error:.1g} at medium, more than {LIMIT:g}", "keep highest")
        return replace(setup, runtime=replace(setup.runtime, matmul=self.precision))
