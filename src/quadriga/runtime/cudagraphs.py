"""CUDA graphs: eager's files, whose kernels `load.py` records once for each shape of inputs and replays with one launch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

from quadriga.core import cuda
from quadriga.core.errors import NotApplicable
from quadriga.core.slots import RuntimeSpec
from quadriga.runtime._capture import Capture
from quadriga.runtime._program import float_products, write_program
from quadriga.runtime._types import Probe, package_probe

NAME = "cuda_graphs"
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # operators that wait for the GPU to go by values
BRANCHES = ("cond", "while_loop")
MASKS = (torch.bool, torch.uint8)


def probe() -> Probe:
    """It needs a GPU, and a PyTorch that can use it."""
    state = cuda.found()
    return package_probe("torch", "torch") if state.used is not None else Probe(False, "", state.reason, state.remedy)


def write(taken: Capture, spec: RuntimeSpec, folder: Path, batches: list[int]) -> dict[str, Any]:
    """Write the program and the weights; they are recorded where they are loaded.

    Raises:
        NotApplicable: the device is the CPU, activations are int8, or the program reads values back, so that no fixed list of
            kernels computes it.
    """
    if spec.device == "cpu":
        raise NotApplicable("cuda_graphs runs on a GPU, and the device is the CPU", 'use device = "cuda"')
    float_products(spec)
    if found := next(obstacles(taken.program.graph_module), None):
        raise NotApplicable(f"no CUDA graph can be recorded: {found}", "use eager on the GPU (cuda)")
    return write_program(taken, spec, folder)


def obstacles(module: fx.GraphModule) -> Iterator[str]:
    """The operators whose results decide what is computed next, or how much, for people.

    Example:
        >>> list(obstacles(fx.symbolic_trace(torch.nn.ReLU())))
        []
    """
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            target = node.target
            if isinstance(target, torch._ops.HigherOrderOperator) and target.name() in BRANCHES:
                yield f"{target.name()} goes by values"
            elif isinstance(target, torch._ops.OpOverload) and _reads(target, node):
                yield f"{target} waits for values"


def _reads(target: torch._ops.OpOverload, node: fx.Node) -> bool:
    """Whether an operator waits for values; indexing does so where an index is a mask, whose ones it has to count."""
    if target._overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
        indices = [i.meta.get("val") for i in node.args[1] if isinstance(i, fx.Node)]  # type: ignore[union-attr]
        return any(isinstance(i, torch.Tensor) and i.dtype in MASKS for i in indices)
    return bool(READS & set(target.tags))
