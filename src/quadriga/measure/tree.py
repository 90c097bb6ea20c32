"""Trees of tensors as files: tensors flat in one safetensors file, the structure as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quadriga.core.batch import Tree


def flatten(tree: Tree) -> tuple[list[Tensor], Any]:
    """Tensors in order, and the structure as plain data; `unflatten` is the inverse (mappings become dicts, lists tuples).

    Raises:
        TypeError: a leaf is neither a tensor nor plain data.

    Example:
        >>> import torch
        >>> flatten({"x": torch.zeros(2), "deep": (torch.ones(1), None)})[1]
        {'dict': {'x': 0, 'deep': {'tuple': [1, {'plain': None}]}}}
    """
    leaves: list[Tensor] = []

    def walk(node: Tree) -> Any:
        if isinstance(node, Tensor):
            leaves.append(node)
            return len(leaves) - 1
        if isinstance(node, Mapping):
            return {"dict": {str(k): walk(v) for k, v in node.items()}}
        if isinstance(node, tuple | list):
            return {"tuple": [walk(v) for v in node]}
        if node is None or isinstance(node, bool | int | float | str):
            return {"plain": node}
        raise TypeError(f"a {type(node).__name__} in a tree is neither a tensor nor plain data")

    structure = walk(tree)
    return leaves, structure


def unflatten(leaves: list[Any], structure: Any) -> Tree:
    """Put leaves back into a structure of `flatten`."""
    if isinstance(structure, int):
        return leaves[structure]
    if "dict" in structure:
        return {k: unflatten(leaves, v) for k, v in structure["dict"].items()}
    if "tuple" in structure:
        return tuple(unflatten(leaves, v) for v in structure["tuple"])
    return structure["plain"]


def save_tree(path: str | Path, tree: Tree) -> None:
    """Write a tree to one safetensors file."""
    leaves, structure = flatten(tree)
    named = {str(i): t.detach().cpu().clone().contiguous() for i, t in enumerate(leaves)}
    save_file(named, path, metadata={"structure": json.dumps(structure)})


def load_tree(path: str | Path) -> Tree:
    """Read back what `save_tree` wrote."""
    with safe_open(path, framework="pt") as file:
        leaves = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        return unflatten(leaves, json.loads(file.metadata()["structure"]))
