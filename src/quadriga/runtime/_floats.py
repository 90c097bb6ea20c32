"""Floating-point types of a model: the coarsest that it computes in, and how far outputs may be apart for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quadriga.core.errors import NotApplicable
from quadriga.runtime._capture import Capture

# Largest error / largest magnitude when built; sums in another order cost some roundings of the type each.
TOLERANCE = {"float64": 1e-10, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
STORED = {"float64": 1e-10, "float32": 1e-4}  # when loaded again, elsewhere; that of a half type is the one above
SMALLEST = 256  # elements of a weight that is worth a scale


def coarsest(values: Iterable[Tensor]) -> str:
    """The coarsest floating-point type of some tensors, complex ones by their parts; float32 where there is none.

    Example:
        >>> coarsest([torch.ones(1), torch.ones(1).half(), torch.ones(1).double()])
        'float16'
    """
    kinds = [t.real.dtype if t.is_complex() else t.dtype for t in values if t.is_floating_point() or t.is_complex()]
    names = [str(kind).removeprefix("torch.") for kind in kinds]
    return max((n for n in names if n in TOLERANCE), key=list(TOLERANCE).index, default="float32")


def nothing_to_round(kinds: Iterable[str], to: str) -> NotApplicable:
    """The refusal where no weight could be stored in fewer bits: too small, or of a type that the tools leave alone."""
    if others := sorted(set(kinds) - {"float32"}):
        remedy = "give the model in float32 (model.float()); half_weights stores such a model in bfloat16 or float16"
        return NotApplicable(f"{to} weights are made of float32 ones, and these are {' and '.join(others)}", remedy)
    return NotApplicable(f"no weight matrix has {SMALLEST} elements, from which on {to} pays")


def computes(taken: Capture) -> str:
    """The coarsest type of a captured model's inputs, outputs and weights."""
    kept = [t for t in taken.program.state_dict.values() if isinstance(t, Tensor)]
    return coarsest([*kept, *taken.example, *_outputs(taken)])


def stored_tolerance(computed: str) -> float:
    """How far a loaded model's outputs may be from those that it gave when it was written, in that type."""
    return STORED.get(computed, TOLERANCE[computed])


def without_bfloat16(taken: Capture) -> None:
    """Refuse inputs and outputs of a type that NumPy lacks, through which the runtimes of an ONNX file are called."""
    ends = [*zip(taken.names, taken.example, strict=True), *zip(taken.output_names, _outputs(taken), strict=False)]
    for name, value in ends:
        if value.dtype == torch.bfloat16:
            raise NotApplicable(
                f'"{name}" is bfloat16, which NumPy lacks, through which the runtimes of an ONNX file are called',
                "use eager or inductor; or let the forward take float32, convert it, and return float32",
            )


def _outputs(taken: Capture) -> list[Any]:
    """The flat outputs, as the fake tensors that the export saw."""
    nodes: Any = next(iter(reversed(taken.program.graph.nodes))).args[0]
    return [node.meta["val"] for node in nodes if "val" in getattr(node, "meta", {})]


def matrix_types(proto: Any) -> list[str]:
    """Names of the floating-point types of an ONNX model's weight matrices."""
    from onnx import TensorProto

    names = {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64", TensorProto.FLOAT16: "float16"}
    names[TensorProto.BFLOAT16] = "bfloat16"
    return [names[t.data_type] for t in proto.graph.initializer if len(t.dims) >= 2 and t.data_type in names]
