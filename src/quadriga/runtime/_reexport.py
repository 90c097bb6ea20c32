"""A changed module of a captured program as a captured program again, with bounds for its sizes where a runtime wants them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from quadriga.core.batch import resize, tensors
from quadriga.core.errors import NotApplicable
from quadriga.core.quiet import quiet
from quadriga.runtime._capture import Capture, reason

LONGER = 4  # an input may be that many times longer than the longest one seen; memory is planned for it


def reexport(taken: Capture, module: fx.GraphModule, most: int | None = None) -> Capture:
    """Export a module that takes the flat inputs of a capture, its dynamic sizes dynamic again.

    Args:
        taken: what was captured; it stays.
        module: what is to take its place: a form of `taken.program.module()`.
        most: the largest batch that will be given; other dynamic sizes are bounded too then, at `LONGER` times the
            longest example and calibration input.

    Raises:
        NotApplicable: it cannot be exported with these sizes.
    """
    # The largest batch is the example: choices inside PyTorch (NNPACK takes 16 and more) narrow the sizes to its side of them.
    example = tuple(resize(list(taken.sample), most or 2))
    shapes = tuple(_sizes(taken, most))
    with torch.no_grad(), quiet():
        try:
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # as in `capture`
            raise NotApplicable(
                f"the model cannot be exported: {reason(error)}", "use eager, or inductor without int8 activations"
            ) from error
    return replace(taken, program=program)


def batch_places(taken: Capture) -> list[int | None]:
    """For each output the dimension that is the batch; None where none is, or more than one."""
    batch = str(_inputs(taken)[0].shape[0])
    outputs = next(iter(reversed(taken.program.graph.nodes))).args[0]
    sizes = [[str(size) for size in node.meta["val"].shape] for node in outputs]  # type: ignore[union-attr]
    return [row.index(batch) if row.count(batch) == 1 else None for row in sizes]


def _sizes(taken: Capture, most: int | None) -> Iterator[dict[int, Any]]:
    batch = torch.export.Dim("batch") if most is None else torch.export.Dim("batch", max=most)
    seen = [tuple(taken.example), *(tuple(tensors(b.inputs)) for b in taken.calibration)]
    for number, value in enumerate(_inputs(taken)):
        free = [d for d, size in enumerate(value.shape) if d and isinstance(size, torch.SymInt)]
        longest = {d: max(leaves[number].shape[d] for leaves in seen) for d in free}
        yield {0: batch, **{d: _bounded(value.shape[d], longest[d], taken, most) for d in free}}


def _bounded(size: Any, longest: int, taken: Capture, most: int | None) -> Any:
    if most is None:
        return torch.export.Dim.AUTO
    limits = taken.program.range_constraints.get(size.node.expr)
    upper = getattr(limits, "upper", None)
    known = int(upper) if upper is not None and str(upper).isdigit() else LONGER * longest
    return torch.export.Dim.AUTO(max=min(LONGER * longest, known))


def _inputs(taken: Capture) -> list[Any]:
    """The flat inputs as fake tensors, whose dynamic sizes are symbols."""
    values = {node.name: node.meta["val"] for node in taken.program.graph.nodes if node.op == "placeholder"}
    return [values[name] for name in taken.program.graph_signature.user_inputs]
