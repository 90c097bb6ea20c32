"""Execute with ExecuTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import half_runs, int8_runs, one_runtime, packages


@dataclass(frozen=True, kw_only=True)
class ExecuTorch(Method):
    """Run as one .pte file with ExecuTorch and XNNPACK: the runtime of phones and small boards, strong on small CNNs.

    Source: ExecuTorch, "XNNPACK Backend".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-overview.html"
    adds = frozenset({"RUNTIME"})
    name = "executorch"

    def apply(self, setup: Setup) -> Setup:
        """Choose it. NotApplicable when a runtime is chosen already, weights are half or int8 only, or packages are absent."""
        one_runtime(setup)
        chosen = replace(setup.runtime, name=self.name)
        int8_runs(chosen)
        half_runs(chosen)
        packages("executorch", "torchao", "flatbuffers", "ruamel", "tabulate", extra="executorch")
        return replace(setup, runtime=chosen)
