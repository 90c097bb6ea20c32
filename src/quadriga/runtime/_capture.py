"""Capture a model once: torch.export over flat tensors, with the structure of inputs and outputs as plain data."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.batch import Batch, Tree, call, evaluating, storable, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.half import HALF, halved, in_float, in_half
from quadriga.core.quiet import quiet
from quadriga.core.setup import Context
from quadriga.runtime.standalone import rebuild


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Args:
        program: operations, from flat input tensors to a tuple of flat output tensors.
        inputs, outputs: their structure: {"kind": "tensor", "index"}, "tuple" or "dict" with "items", or a "value".
        names: of the input tensors, in order: the forward's argument names.
        output_names: of the output tensors, in order.
        rank: dimensions of the first output.
        calibration: batches of inputs for int8 ranges.
        example: the flat input tensors it was captured with.
    """

    program: torch.export.ExportedProgram
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    names: list[str]
    output_names: list[str]
    rank: int
    calibration: tuple[Batch, ...]
    example: tuple[Tensor, ...]

    @property
    def sample(self) -> tuple[Tensor, ...]:
        """Flat inputs of the first calibration batch, or the example."""
        return tuple(tensors(self.calibration[0].inputs)) if self.calibration else self.example


def describe(tree: Tree, count: list[int] | None = None) -> dict[str, Any]:
    """The structure of a tree as plain data; tensors are numbered in order.

    Raises:
        TypeError: a leaf is neither a tensor nor None, a number or a string.

    Example:
        >>> describe({"a": torch.ones(1), "b": None})["items"]["b"]
        {'kind': 'value', 'value': None}
    """
    count = [0] if count is None else count
    if isinstance(tree, Tensor):
        count[0] += 1
        return {"kind": "tensor", "index": count[0] - 1}
    if isinstance(tree, Mapping):
        return {"kind": "dict", "items": {str(k): describe(v, count) for k, v in tree.items()}}
    if isinstance(tree, tuple | list):
        return {"kind": "tuple", "items": [describe(v, count) for v in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"kind": "value", "value": tree}
    raise TypeError(f"a {type(tree).__name__}")


def capture(model: nn.Module, context: Context, weights: str = "fp32") -> Capture:
    """Trace a model with a dynamic batch dimension; dimensions that vary between calibration batches are dynamic too.

    Args:
        model: is not changed.
        context: gives the example and the calibration batches.
        weights: "bf16" or "fp16" traces a copy with such weights, between float32 inputs and outputs.

    What it returns besides tensors, numbers and strings, such as a cache, is None in the outputs.

    Raises:
        NotApplicable: it cannot be traced, its batch size is fixed, or it returns no tensor.
    """
    example = context.example
    leaves = tuple(t.detach() for t in tensors(example))
    inputs = describe(example)
    dtype = HALF.get(weights)
    model = model if dtype is None else halved(model, dtype)
    flat = _Flat(model, inputs, dtype)
    with evaluating(model), torch.no_grad(), quiet():
        left: list[str] = []
        output = storable(_output(flat, model, leaves), left)
        outputs = describe(output)
        found = tensors(output)
        if not found:
            raise NotApplicable(f"the model returns {', '.join(left) or 'nothing'}, no tensor", "return tensors")
        shapes = _dynamic(leaves, context.calibration)
        try:
            program = torch.export.export(flat, leaves, dynamic_shapes=(shapes,), strict=False)
        except Exception as error:  # whatever a user's forward can raise while it is traced
            raise NotApplicable(
                f"the model cannot be exported: {reason(error)}", "make the forward traceable, or use eager"
            ) from error
    return Capture(
        program,
        inputs,
        outputs,
        _input_names(model, inputs),
        _output_names(outputs),
        found[0].dim(),
        context.calibration,
        leaves,
    )


class _Flat(nn.Module):
    def __init__(self, model: nn.Module, inputs: dict[str, Any], half: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.inputs, self.half = model, inputs, half
        self.training = False

    def output(self, leaves: tuple[Tensor, ...]) -> Tree:
        inputs = rebuild(self.inputs, list(leaves))
        return call(self.model, inputs) if self.half is None else in_float(call(self.model, in_half(inputs, self.half)))

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(self.output(leaves)))


def _output(flat: _Flat, model: nn.Module, leaves: tuple[Tensor, ...]) -> Tree:
    """Call the model, and refuse one that changes its buffers when it runs; they are put back."""
    before = {name: (b, b._version, b.clone()) for name, b in model.named_buffers()}
    output = flat.output(leaves)
    for name, b in model.named_buffers():
        old, version, values = before.get(name, (None, 0, None))
        if b is not old or b._version != version:
            if old is not None and values is not None:
                old.copy_(values)
            raise NotApplicable(f"the model changes its buffer {name} when it runs", "make it stateless in eval mode")
    return output


def _dynamic(leaves: tuple[Tensor, ...], calibration: tuple[Batch, ...]) -> tuple[dict[int, Any], ...]:
    others = [tensors(batch.inputs) for batch in calibration]
    batch, sizes = torch.export.Dim("batch"), []
    for number, leaf in enumerate(leaves):
        vary = {d for d in range(1, leaf.dim()) if any(o[number].shape[d] != leaf.shape[d] for o in others)}
        sizes.append({0: batch, **{d: torch.export.Dim.AUTO for d in sorted(vary)}})
    return tuple(sizes)


def _input_names(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    if inputs["kind"] == "dict":
        top = list(inputs["items"].items())
    else:
        parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
        items = inputs["items"] if inputs["kind"] == "tuple" else [inputs]
        known = [p.name for p in parameters if p.kind != p.VAR_POSITIONAL]
        top = [(known[i] if i < len(known) else f"input_{i}", item) for i, item in enumerate(items)]
    return [name for key, item in top for name in _leaf_names(key, item)]


def _output_names(outputs: dict[str, Any]) -> list[str]:
    if outputs["kind"] == "dict":
        return [
            name for key, item in outputs["items"].items() for name in _leaf_names(f"out.{key}" if key == "" else key, item)
        ]
    return _leaf_names("output", outputs)


def _leaf_names(key: str, item: dict[str, Any]) -> list[str]:
    key = re.sub(r"\W", "_", key)
    if item["kind"] == "tensor":
        return [key]
    if item["kind"] == "value":
        return []
    pairs = item["items"].items() if item["kind"] == "dict" else enumerate(item["items"])
    return [name for k, v in pairs for name in _leaf_names(f"{key}_{k}", v)]


def reason(error: BaseException) -> str:
    """One line for people: what export said, and the line of the model where it happened."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = next((line for line in lines if not line.startswith(("Failed to export", "⬆", "="))), type(error).__name__)
    if "specialized" in text and "batch" in text:
        first = "its batch size is fixed in the code (a view or a constant)"
    strangers = (str(Path(torch.__file__).parent), str(Path(__file__).parent), str(Path(traceback.__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(strangers)]
    found = [(f.filename, f.lineno) for f in frames] or re.findall(r'File "([^"]+)", line (\d+), in forward', text)
    place = f"{Path(found[-1][0]).name}:{found[-1][1]}" if found else ""
    return f"{first[:300]} (at {place})" if place else first[:300]
