"""Execute as recorded CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.core import cuda
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import int8_runs, on_gpu, one_runtime


@dataclass(frozen=True, kw_only=True)
class CUDAGraphs(Method):
    """Record the model's kernels once for each shape of inputs and replay them with one launch: eager's kernels and values.

    For small models on a GPU, whose kernels run in less time than it takes to launch them one by one. Each shape keeps
    buffers of its own on the GPU, the last 16 of them. A model that reads values back while it runs, such as a loop that
    goes by them, is refused when it is built.

    Source: PyTorch, "CUDA semantics: CUDA Graphs".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    source = "docs.pytorch.org/docs/stable/notes/cuda.html"
    adds = frozenset({"RUNTIME", "CUDA"})
    name = "cuda_graphs"

    @classmethod
    def unsearched(cls) -> str:
        return cuda.found().reason

    def apply(self, setup: Setup) -> Setup:
        """Choose it and its device. NotApplicable with a runtime chosen already, int8 activations, or no GPU."""
        one_runtime(setup)
        chosen = replace(on_gpu(setup), name=self.name)
        int8_runs(chosen)
        return replace(setup, runtime=chosen)
