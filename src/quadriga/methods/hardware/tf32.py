"""TF32: float32 products on tensor cores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from quadriga.core import cuda
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._measured import faster
from quadriga.methods.hardware._needs import gpu


@dataclass(frozen=True, kw_only=True)
class TF32(Method):
    """Round the factors of float32 products to 11 bits and multiply on tensor cores: matrices, convolutions, LSTMs.

    In training and in the finished model. Sums stay float32; an output errs by about 1e-3, ten times what passes as equal
    float32, so the change is judged by quality. The settings of the process are put back after training.

    Args:
        keep: "always", or "faster": before a train step, only if a few training steps in the recipe's own runtime are measured
            to be faster with it, else the step is refused.

    Source: NVIDIA 2020, "NVIDIA A100 Tensor Core GPU Architecture"; PyTorch, "CUDA semantics".
    """

    family = Family.HARDWARE
    numerics = Numerics.CHANGED
    trains = True
    common = True
    source = "docs.pytorch.org/docs/stable/notes/cuda.html"
    requires = frozenset({"CUDA"})
    name = "tf32"

    keep: Literal["always", "faster"] = "always"

    @classmethod
    def unsearched(cls) -> str:
        state = cuda.found()
        return state.reason if state.used is None or state.used["tf32"] else f"{state.used['name']} has no TF32"

    def apply(self, setup: Setup) -> Setup:
        """Set the precision. NotApplicable on the CPU, on a GPU older than Ampere, or where it is set already."""
        row = gpu()
        if not row["tf32"]:
            raise NotApplicable(f"{row['name']} (capability {row['capability']}) has no TF32", "Ampere, 8.0, and later do")
        if setup.runtime.matmul != "highest":
            raise NotApplicable(f"the matmul precision is {setup.runtime.matmul} already", "keep one tf32 step")
        if self.keep == "faster" and {"TRAIN_DATA"} <= setup.traits and "TRAINED" not in setup.traits:
            faster(setup, "training in TF32", matmul="high")
        return replace(setup, runtime=replace(setup.runtime, matmul="high"))
