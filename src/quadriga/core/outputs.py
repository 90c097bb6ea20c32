"""Outputs of several batches as those of the whole split."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quadriga.core.batch import Fields, Tree, storable, tree_map
from quadriga.core.errors import BadInput


def join(trees: list[Tree]) -> Tree:
    """Concatenate batches of trees along dimension 0; mappings keep their type (a `ModelOutput` stays one).

    Raises:
        BadInput: shapes differ between batches, so that they cannot be joined.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        try:
            return torch.cat(trees) if first.dim() else torch.stack(trees)
        except RuntimeError as error:
            raise BadInput(
                f"outputs of different batches cannot be joined: {error}", "pad them, or return [n] values"
            ) from error
    if isinstance(first, Mapping):
        joined = {k: join([t[k] for t in trees]) for k in first}
        return joined if type(first) is dict else Fields(joined) if type(first) is Fields else type(first)(**joined)
    if isinstance(first, tuple | list):
        parts = [join(list(part)) for part in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return first


def rowwise(output: Tree, count: int) -> Tree:
    """The part of an output, in main memory, that can be joined over batches: tensors of one row per example; else None."""
    return tree_map(lambda t: t.cpu() if t.dim() and len(t) == count else None, storable(output))
