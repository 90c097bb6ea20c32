"""Trees of tensors in the recorded order, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tree = Any
Leaves = Callable[[list[Tensor]], list[Tensor]]


def flatten(shape: Mapping[str, Any], tree: Tree) -> list[Tensor]:
    """The tensors of a tree in the recorded order.

    Raises:
        ValueError: the tree has another structure than the model was exported with.
    """
    leaves: list[Tensor] = []
    _flatten(shape, tree, leaves)
    return leaves


def _flatten(shape: Mapping[str, Any], tree: Tree, leaves: list[Tensor]) -> None:
    kind = shape["kind"]
    if kind == "tensor":
        if not isinstance(tree, Tensor):
            raise ValueError(f"expected a tensor, got {type(tree).__name__}")
        leaves.append(tree)
    elif kind == "value":
        if tree != shape["value"]:
            raise ValueError(f"the model was exported with {shape['value']!r}, got {tree!r}")
    elif kind == "dict":
        if not isinstance(tree, Mapping) or set(tree) != set(shape["items"]):
            got = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree).__name__
            raise ValueError(f"expected a dict of {', '.join(shape['items'])}; got {got}")
        for key, item in shape["items"].items():
            _flatten(item, tree[key], leaves)
    else:
        if not isinstance(tree, tuple | list) or len(tree) != len(shape["items"]):
            raise ValueError(f"expected a tuple of {len(shape['items'])}, got {type(tree).__name__}")
        for item, part in zip(shape["items"], tree, strict=True):
            _flatten(item, part, leaves)


def rebuild(shape: Mapping[str, Any], leaves: list[Tensor]) -> Tree:
    """The tree that holds these tensors."""
    kind = shape["kind"]
    if kind == "tensor":
        return leaves[shape["index"]]
    if kind == "value":
        return shape["value"]
    if kind == "dict":
        return {key: rebuild(item, leaves) for key, item in shape["items"].items()}
    return tuple(rebuild(item, leaves) for item in shape["items"])


def shaped(entry: Mapping[str, Any], call: Leaves) -> Callable[..., Tree]:
    """From tree to tree, around a call from tensors to tensors; a dict may be given as keywords, a tuple as arguments."""
    inputs, outputs = entry["inputs"], entry["outputs"]

    def run(tree: Tree = None, *more: Tree, **named: Tree) -> Tree:
        given = named if tree is None else (tree, *more) if more else tree
        return rebuild(outputs, call(flatten(inputs, given)))

    return run


def single_tensor(entry: Mapping[str, Any]) -> bool:
    """One tensor in, one tensor of at least one dimension out: the case with the shortest way."""
    return bool(entry["inputs"]["kind"] == entry["outputs"]["kind"] == "tensor" and entry["rank"] > 0)


def difference(expected: Tensor, found: Tensor) -> float:
    """max |found − expected| / max |expected|; infinite where shapes or NaNs differ.

    For integers: the share that differs, where it is above 1 % (an argmax of near equals may fall either way).
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        share = float((expected != found).double().mean())
        return share if share > 0.01 else 0.0
    same = (expected == found) | (expected.isnan() & found.isnan())  # equal infinities too
    gap = torch.where(same, 0.0, (expected.double() - found.double()).abs())
    scale = expected.double().abs().nan_to_num(0.0, 0.0).max().clamp_min(1e-30)
    return float((gap.max() / scale).nan_to_num(float("inf")))
