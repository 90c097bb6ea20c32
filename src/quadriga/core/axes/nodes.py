"""What a node of a traced graph calls, with which arguments."""

from __future__ import annotations

from typing import Any

from torch import fx

TURNED = ("t", "transpose", "permute", "numpy_T", "mT")  # of a matrix: its other dimension first


def op_name(node: fx.Node) -> str:
    """The operator's name without name space and overload, such as "conv2d"."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", str(node.target))


def bind(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator by name, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update({a.name: v for a, v in zip(schema.arguments, node.args, strict=False)})
    return {**bound, **node.kwargs}


def flat(node: Any) -> list[fx.Node]:
    """All nodes in nested arguments, in order."""
    found: list[fx.Node] = []
    fx.node.map_arg(node, found.append)
    return found
