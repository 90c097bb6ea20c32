"""PyTorch compiled by TorchInductor with frozen weights: eager's files, compiled at the first call (seconds to minutes)."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from importlib import util
from pathlib import Path
from typing import Any

import torch

from quadriga.core.errors import NotApplicable
from quadriga.core.quiet import quiet
from quadriga.core.slots import QuantSpec, RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._program import float_products, write_program
from quadriga.runtime._pt2e import needs_torchao, observed, quantize
from quadriga.runtime._types import Probe, package_probe

NAME = "inductor"


def probe() -> Probe:
    """It needs a C++ compiler and Python's header files."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return Probe(False, "", "there is no C++ compiler", "install g++ (apt-get install g++)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return Probe(False, "", "Python.h is missing", "install Python's header files (apt-get install python3-dev)")
    return package_probe("torch", "torch")


def write(taken: Capture, spec: RuntimeSpec, folder: Path, batches: list[int]) -> dict[str, Any]:
    """Write the program and the weights; the compilation happens where it is loaded.

    Raises:
        NotApplicable: int8 activations on a GPU, without torchao, on a processor that is no x86, or with one scale per
            tensor; no Triton for a GPU.
    """
    if spec.device != "cpu":
        if util.find_spec("triton") is None:
            raise NotApplicable("the package triton is not installed, which compiles for GPUs", "pip install triton")
        float_products(spec)
    elif spec.quant is not None and spec.quant.activations != "none":
        taken = _int8(taken, spec.quant)
    return {**write_program(taken, spec, folder), "compiles": True, "each_size": _each_size(taken)}


def _each_size(taken: Capture) -> bool:
    """Whether each batch size is compiled for itself: in a dynamic one PyTorch 2.13 mistakes strides of int8 convolutions."""
    targets = [str(node.target) for node in taken.program.graph.nodes if node.op == "call_function"]
    return any("quantized_decomposed" in t for t in targets) and any(t.startswith("aten.conv") for t in targets)


def _int8(taken: Capture, quant: QuantSpec) -> Capture:
    """The program with unsigned activations and signed weights around its products, which TorchInductor gives to oneDNN.

    Where the processor has no VNNI, activations have 7 bits: 2 · 127 · 128 fits into 16 bits.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise NotApplicable(f"inductor runs {quant.activations} int8 on x86, not on {platform.machine()}", "use onnxruntime")
    if not quant.per_channel:
        raise NotApplicable("inductor multiplies int8 weights with a scale per output channel only", "use per_channel = true")
    needs_torchao()
    with quiet("torchao"):
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        narrow = not torch.cpu.get_capabilities().get("avx512_vnni") and not torch.cpu.get_capabilities().get("avx_vnni")
        config = x86.get_default_x86_inductor_quantization_config(
            is_dynamic=quant.activations == "dynamic", reduce_range=narrow
        )
        return quantize(taken, quant, x86.X86InductorQuantizer().set_global(observed(config, quant)))
