"""How a reshape maps axes: the finest blocks of old and new dimensions that hold the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from quadriga.core.axes.units import FREE, Axes, Dim, Free, Units

Block = tuple[list[int], list[int]]


def blocks(old: Sequence[int], new: Sequence[int]) -> list[Block] | None:
    """Pair up dimensions of equal product, as finely as can be; None if a size is 0.

    Example:
        >>> blocks((2, 16, 5, 5), (2, 400))
        [([0], [0]), ([1, 2, 3], [1])]
        >>> blocks((7, 64), (7, 4, 16))
        [([0], [0]), ([1], [1, 2])]
    """
    if 0 in old or prod(old) != prod(new):
        return None
    found: list[Block] = []
    i = j = 0
    while i < len(old) or j < len(new):
        one_in, one_out = i < len(old) and old[i] == 1, j < len(new) and new[j] == 1
        if one_in != one_out:  # a dimension of size 1 comes or goes
            found.append(([i], []) if one_in else ([], [j]))
            i, j = i + one_in, j + one_out
            continue
        ins, outs = [i], [j]
        left, right = old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
                ins.append(i - 1)
            else:
                right, j = right * new[j], j + 1
                outs.append(j - 1)
        found.append((ins, outs))
    return found


def reshaped(
    units: Units, axes: Axes, old: Sequence[int], new: Sequence[int], where: str, channels: int | None = None
) -> Axes | None:
    """The axes after a reshape from `old` to `new` sizes; None if it is not understood.

    Args:
        channels: the new axis that is known to hold channels, if any.
    """
    pairs = blocks(old, new)
    if pairs is None:
        return None
    result: Axes = [None] * len(new)
    for ins, outs in pairs:
        merged = merge(units, [axes[i] for i in ins], [old[i] for i in ins], where)
        if len(outs) == 1:
            result[outs[0]] = merged
        elif isinstance(merged, Tensor) and outs:
            carrier = outs.index(channels) if channels in outs else None
            for out, dim in zip(outs, split(units, merged, [new[o] for o in outs], where, carrier), strict=True):
                result[out] = dim
        elif isinstance(merged, Free):
            for out in outs:
                result[out] = FREE
    return result


def merge(units: Units, dims: Axes, sizes: Sequence[int], where: str) -> Dim:
    """One axis out of several: every element carries the unit of the outermost axis that has any.

    A channel of [channels, height, width] thus becomes a block of height·width features.
    """
    owners = [k for k, d in enumerate(dims) if isinstance(d, Tensor)]
    if not owners:
        return FREE if dims and all(isinstance(d, Free) for d in dims) else None
    for k in owners[1:]:
        units.pin(dims[k], f"it is flattened together with another width at {where}")
    first = dims[owners[0]]
    assert isinstance(first, Tensor)
    shape = [1] * len(sizes)
    shape[owners[0]] = len(first)
    return first.reshape(shape).expand(*sizes).reshape(-1)


def split(units: Units, dim: Tensor, sizes: Sequence[int], where: str, carrier: int | None = None) -> Axes:
    """Several axes out of one.

    If the units vary along one of them only (a flattened map seen as a map again), that one carries them; so does the
    carrier, if one is known (the channels of features seen as a map). A width cut into two (heads of an attention) is
    carried by the first: whole heads are cut. An axis of three or two beside these holds projections (queries, keys,
    values), which lose the same heads. Anything else is fixed.
    """
    result: Axes = [None] * len(sizes)
    table = torch.tensor(units.roots(dim)).reshape(tuple(sizes))
    for k, size in enumerate(sizes):
        line = table.movedim(k, 0).reshape(size, -1)
        if bool((line == line[:, :1]).all()):
            result[k] = dim.reshape(tuple(sizes)).movedim(k, 0).reshape(size, -1)[:, 0]
            return result
    if carrier is not None:
        result[carrier] = whole(units, dim, sizes, carrier)
        return result
    wide = [k for k, s in enumerate(sizes) if s > 1]
    heads = [k for k in wide if k != _projections(sizes, wide)]
    if len(heads) != 2:
        units.pin(dim, f"it is split into {len(wide)} axes at {where}")
        return result
    result[heads[0]] = parts = whole(units, dim, sizes, heads[0])
    for root in set(units.roots(parts)):
        units.split.setdefault(root, f"it is split into {sizes[heads[0]]} parts at {where}")
    return result


def whole(units: Units, dim: Tensor, sizes: Sequence[int], carrier: int) -> Tensor:
    """The units of one of the axes that a width is cut into, each united with all that lies at its place."""
    grid = dim.reshape(tuple(sizes)).movedim(carrier, 0).reshape(sizes[carrier], -1)
    for column in grid.unbind(1)[1:]:
        units.unite(grid[:, 0], column)
    return grid[:, 0]


def _projections(sizes: Sequence[int], wide: Sequence[int]) -> int | None:
    """Of three axes, the one that holds queries, keys and values, or keys and values."""
    return next((k for size in (3, 2) for k in wide if sizes[k] == size), None) if len(wide) == 3 else None
