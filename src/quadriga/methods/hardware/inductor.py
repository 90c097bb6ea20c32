"""Execute with PyTorch, compiled with frozen weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import compiler, ends_on, int8_runs, one_runtime


@dataclass(frozen=True, kw_only=True)
class Inductor(Method):
    """Compile the exported operations with TorchInductor, weights frozen in, where the model is loaded: seconds to minutes.

    Source: Ansel et al. 2024, "PyTorch 2", ASPLOS, doi:10.1145/3620665.3640366.
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "doi:10.1145/3620665.3640366"
    adds = frozenset({"RUNTIME"})
    name = "inductor"

    def apply(self, setup: Setup) -> Setup:
        """Choose it. NotApplicable when a runtime is chosen already, int8 lacks torchao, or there is no compiler."""
        one_runtime(setup)
        chosen = replace(setup.runtime, name=self.name)
        int8_runs(chosen)
        compiler(ends_on(setup))
        return replace(setup, runtime=chosen)
