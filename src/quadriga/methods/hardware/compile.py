"""Compile the training step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._measured import faster
from quadriga.methods.hardware._needs import compiler, ends_on


@dataclass(frozen=True, kw_only=True)
class Compile(Method):
    """Train through torch.compile: operations of a step are fused. The first steps cost seconds to minutes.

    Small models lose by it on a CPU (LeNet trained at 0.54× here); the runtime `inductor` compiles inference.

    Args:
        mode: "default", or "reduce-overhead", on a GPU: the kernels of a step's forward and backward pass are recorded and
            replayed as CUDA graphs, which small models gain most from, since launching their kernels takes longer than
            running them. It needs batches of one size, and gradients that are not accumulated.
        keep: "faster": only if a few training steps in the recipe's own runtime are measured to be faster once compiled, else
            the step is refused; "always".

    Source: Ansel et al. 2024, "PyTorch 2", ASPLOS, doi:10.1145/3620665.3640366.
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "doi:10.1145/3620665.3640366"
    requires = frozenset({"TRAIN_DATA"})
    trains = True

    mode: Literal["default", "reduce-overhead"] = "default"
    keep: Literal["faster", "always"] = "faster"

    def apply(self, setup: Setup) -> Setup:
        """Ask for compilation. NotApplicable without a compiler, or where the mode cannot work."""
        if setup.runtime.compile:
            raise NotApplicable("the training step is compiled already")
        compiler(device := ends_on(setup))
        if self.mode == "reduce-overhead" and device == "cpu":
            raise NotApplicable("CUDA graphs need a GPU, and training is on the CPU", "put cuda before it")
        if self.mode == "reduce-overhead" and setup.training.micro is not None:
            raise NotApplicable("CUDA graphs overwrite the gradients that accumulate", 'use mode = "default"')
        fields: dict[str, Any] = {"compile": True, "compile_mode": self.mode}
        if self.keep == "faster":
            faster(setup, "a compiled training step", **fields)
        return replace(setup, runtime=replace(setup.runtime, **fields))
