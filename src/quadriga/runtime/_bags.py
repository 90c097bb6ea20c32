"""Embedding bags in operators that every reader of an ONNX file has; the exporter's own form is a loop over sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Four = tuple[Tensor, Tensor, Tensor, Tensor]
SUM, MEAN, MAX = range(3)


def embedding_bag(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = SUM, sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Four:  # fmt: skip
    """`torch.ops.aten.embedding_bag` by gathering rows and adding them up by bag; of its four results the first is used.

    Args:
        weight: [rows, width].
        indices: [n] int64.
        offsets: [bags], or [bags + 1] with `include_last_offset`: where each bag begins, ascending.
        scale_grad_by_freq, sparse: of the gradient, which is not taken here.
        mode: 0 sum, 1 mean, 2 max.
        per_sample_weights: [n], a factor of each row; for sums.
        include_last_offset: the last offset is the end.
        padding_idx: an index that counts for nothing.

    Example:
        >>> table, indices, offsets = torch.randn(9, 4), torch.tensor([1, 2, 4, 5, 4]), torch.tensor([0, 2, 2])
        >>> found = embedding_bag(table, indices, offsets, mode=1)[0]
        >>> torch.allclose(found, torch.nn.functional.embedding_bag(indices, table, offsets))
        True
    """
    starts = offsets[:-1] if include_last_offset else offsets
    begun = torch.zeros(indices.size(0) + 1, dtype=torch.int64).scatter_add(0, starts, torch.ones_like(starts))
    bag = begun[:-1].cumsum(0) - 1  # [n]: an empty bag at the end begins at n
    rows = functional.embedding(indices, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    counts = torch.ones_like(rows[:, :1])
    if padding_idx is not None and padding_idx >= 0:
        real = (indices != padding_idx)[:, None]
        counts = real.to(rows.dtype)
        rows = torch.where(real, rows, float("-inf") if mode == MAX else 0.0)
    place, shape = bag[:, None].expand(-1, weight.size(1)), (starts.size(0), weight.size(1))
    number = torch.zeros(starts.size(0), 1, dtype=rows.dtype).scatter_add(0, bag[:, None], counts)  # [bags, 1]
    if mode == MAX:
        most = torch.full(shape, float("-inf"), dtype=rows.dtype).scatter_reduce(0, place, rows, "amax")
        out = torch.where(number > 0, most, 0.0)  # an empty bag is zero
    else:
        out = torch.zeros(shape, dtype=rows.dtype).scatter_add(0, place, rows)
        out = out / number.clamp_min(1.0) if mode == MEAN else out
    return out, bag, number, number


BAGS: dict[Any, Any] = {
    torch.ops.aten.embedding_bag.padding_idx: embedding_bag,
    torch.ops.aten.embedding_bag.default: embedding_bag,
    torch.ops.aten._embedding_bag.default: embedding_bag,
    torch.ops.aten._embedding_bag_forward_only.default: embedding_bag,
}


def opened(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with its embedding bags, if it has any, in plain operators."""
    bags = any(node.target in BAGS for node in program.graph.nodes)
    return program.run_decompositions(BAGS) if bags else program
