"""Which library multiplies float32 matrices: PyTorch's default, or oneDNN through the precision "medium"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.products import LIMIT, medium_error
from quadriga.core.setup import Setup


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
    common = True
    source = "docs.pytorch.org/docs/stable/generated/torch.set_float32_matmul_precision.html"
    search: ClassVar = {"precision": ("medium",)}

    precision: Literal["highest", "medium"] = "medium"

    def apply(self, setup: Setup) -> Setup:
        """Set the precision. NotApplicable when it is set already, on a GPU, or where products would not be float32."""
        if setup.runtime.device != "cpu":
            raise NotApplicable("the GPU multiplies, and not a library of the CPU", "use tf32 there")
        if setup.runtime.matmul == self.precision:
            raise NotApplicable(f"the matmul precision is {self.precision} already")
        if self.precision == "medium" and (error := medium_error()) > LIMIT:
            raise NotApplicable(f"this processor's products err by {error:.1g} at medium, more than {LIMIT:g}", "keep highest")
        return replace(setup, runtime=replace(setup.runtime, matmul=self.precision))
