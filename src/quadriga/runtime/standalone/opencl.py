"""OpenCL, through tinygrad."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quadriga.runtime.standalone.folder import RUNTIMES, inside, needs
from quadriga.runtime.standalone.trees import Tree, shaped, single_tensor

OPENCL_REMEDY = "apt-get install pocl-opencl-icd ocl-icd-libopencl1 (the CPU), or the OpenCL driver of your GPU's vendor"
SHAPES = 16  # of inputs, for which a recorded network is kept


def opencl_model(folder: Path, entry: Mapping[str, Any], threads: int | None) -> Callable[..., Tree]:
    """Run model.onnx with tinygrad on an OpenCL device, and nowhere else.

    Kernels are compiled at the first call of each shape of inputs, and recorded at the second; the weights are there once.
    """
    cl_device(entry, threads)
    runner = opencl_runner(inside(folder, entry["files"][0]))
    ready: dict[tuple[torch.Size, ...], Callable[..., list[Any]]] = {}

    def call(leaves: list[Tensor]) -> list[Tensor]:
        key = tuple(x.shape for x in leaves)
        if key not in ready:
            while len(ready) >= SHAPES:  # each keeps its intermediate results on the device
                ready.pop(next(iter(ready)))
            ready[key] = opencl_shape(runner, entry["names"])
        return [from_cl(y) for y in on_cl(ready[key], *map(to_cl, leaves))]

    def single(x: Tensor) -> Tensor:
        return call([x])[0]

    return single if single_tensor(entry) else shaped(entry, call)


def cl_device(entry: Mapping[str, Any], threads: int | None = None) -> Any:
    """tinygrad's OpenCL device, opened.

    Args:
        entry: its "needs" are what pip installs.
        threads: of a device that is the CPU, through PoCL; counts if this is the first use in the process.

    Raises:
        ImportError: there is no tinygrad.
        RuntimeError: there is no OpenCL device; the text says what to install.
    """
    try:
        from tinygrad import Device
    except ImportError as error:
        raise needs(error, entry) from error
    for name in ("POCL_MAX_PTHREAD_COUNT", "POCL_CPU_MAX_CU_COUNT"):  # by PoCL's version; read when the device is opened
        if threads is not None:
            os.environ.setdefault(name, str(threads))
    try:
        return Device["CL"]
    except Exception as error:  # AttributeError without a library, RuntimeError without a driver, IndexError without a device
        raise RuntimeError(f"there is no OpenCL device ({error}); install a driver: {OPENCL_REMEDY}") from error


def opencl_runner(path: Path) -> Any:
    """The ONNX file as tinygrad reads it, its weights on the OpenCL device."""
    from tinygrad.nn.onnx import OnnxRunner

    return on_cl(lambda: OnnxRunner(str(path)).to("CL"))


def opencl_shape(runner: Any, names: list[str]) -> Callable[..., list[Any]]:
    """The network for inputs of one shape, recorded as one list of kernels; what the runner learned of a shape stays here."""
    from tinygrad import TinyJit

    own = copy(runner)
    own.graph_values, own.variable_dims, own._python_const_cache = dict(runner.graph_values), {}, {}

    def forward(*leaves: Any) -> list[Any]:
        given = {name: x for name, x in zip(names, leaves, strict=True) if name in own.graph_inputs}
        outputs = own(given)
        return [outputs[name].contiguous().realize() for name in own.graph_outputs]

    return TinyJit(forward)


def on_cl(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call with the OpenCL device as the one where new tensors go, whatever the environment says."""
    from tinygrad.helpers import Context

    with Context(DEV="CL"):
        return function(*arguments)


def to_cl(x: Tensor) -> Any:
    """A copy on the OpenCL device; of no dimensions too, which tinygrad would make a constant of no device."""
    import tinygrad

    return (
        tinygrad.Tensor(x.reshape(x.shape or (1,)).contiguous().numpy(force=True), device="CL")
        .reshape(tuple(x.shape))
        .realize()
    )


def from_cl(y: Any) -> Tensor:
    """A copy in memory of its own. Never of a tensor that lies elsewhere: the model would not have run on the device."""
    if y.device != "CL":
        raise RuntimeError(f"the output lies on {y.device}, not on the OpenCL device CL")
    return torch.from_numpy(y.numpy().copy())


RUNTIMES["opencl"] = opencl_model
