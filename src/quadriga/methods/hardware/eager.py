"""Execute with PyTorch, operation by operation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import int8_runs, one_runtime


@dataclass(frozen=True, kw_only=True)
class Eager(Method):
    """Run the exported operations with PyTorch as it is; weights in safetensors, int8 ones made float when loaded.

    Source: Paszke et al. 2019, arXiv:1912.01703.
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "arXiv:1912.01703"
    adds = frozenset({"RUNTIME"})
    name = "eager"

    def apply(self, setup: Setup) -> Setup:
        """Choose it. NotApplicable when a runtime is chosen already, or activations are int8."""
        one_runtime(setup)
        chosen = replace(setup.runtime, name=self.name)
        int8_runs(chosen)
        return replace(setup, runtime=chosen)
