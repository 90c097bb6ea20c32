"""Compute on an NVIDIA GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quadriga.core import cuda
from quadriga.core.errors import NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.hardware._needs import on_gpu


@dataclass(frozen=True, kw_only=True)
class CUDA(Method):
    """Train on the GPU, and run there what PyTorch runs: eager, inductor, cuda_graphs. ONNX Runtime and the others stay put.

    Products are float32's, those of convolutions too, which PyTorch by itself rounds to TF32; the method `tf32` allows that.
    A finished model takes inputs from either memory and gives outputs back where its first input lies; its artifact needs a
    GPU. What it gains depends on the model: one of a few thousand products is faster on the CPU.

    Source: PyTorch, "CUDA semantics".
    """

    family = Family.HARDWARE
    numerics = Numerics.CLOSE
    trains = True
    common = True
    source = "docs.pytorch.org/docs/stable/notes/cuda.html"
    adds = frozenset({"CUDA"})
    name = "cuda"

    @classmethod
    def unsearched(cls) -> str:
        return cuda.found().reason

    def apply(self, setup: Setup) -> Setup:
        """Choose the device. NotApplicable without a GPU that this PyTorch can use, or where it is chosen already."""
        if setup.runtime.device != "cpu":
            raise NotApplicable("the device is the GPU already", "keep one cuda step")
        return replace(setup, runtime=on_gpu(setup))
