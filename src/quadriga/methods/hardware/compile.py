"""Compile the training step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._measured import faster
from quadriga.methods.hardware._needs import compiler


@dataclass(frozen=True, kw_only=True)
class Compile(Method):
    """Train through torch.compile: operations of a step are fused. The first steps cost seconds to minutes.

    Small models lose by it (LeNet trained at 0.54× here); the runtime `inductor` compiles inference.

    Args:
        keep: "faster": only if a few training steps in the recipe's own runtime are measured to be faster once compiled, else
            the step is refused; "always".

    Source: Ansel et al. 2024, "PyTorch 2", ASPLOS, doi:10.1145/3620665.3640366.
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "doi:10.1145/3620665.3640366"
    requires = frozenset({"TRAIN_DATA"})
    trains = True

    keep: Literal["faster", "always"] = "faster"

    def apply(self, setup: Setup) -> Setup:
        """Ask for compilation. NotApplicable without a C++ compiler."""
        if setup.runtime.compile:
            raise NotApplicable("the training step is compiled already")
        compiler()
        if self.keep == "faster":
            faster(setup, "a compiled training step", compile=True)
        return replace(setup, runtime=replace(setup.runtime, compile=True))
