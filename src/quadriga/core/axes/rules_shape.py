"""Rules of operators that move, join or drop axes, and of those that act element by element."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from quadriga.core.axes.reshape import reshaped
from quadriga.core.axes.units import FREE, Axes, Dim
from quadriga.core.axes.walk import Walk, op_name, rule


def broadcast(walk: Walk, nodes: list[fx.Node], where: str) -> Axes:
    """Join tensors aligned at their last axis; sizes of 1 take their partner's axis."""
    rank = max(len(walk.shape(n)) for n in nodes)
    result: list[tuple[int, Dim] | None] = [None] * rank
    for node in nodes:
        for back, (size, dim) in enumerate(zip(reversed(walk.shape(node)), reversed(walk.axes(node)), strict=True), 1):
            known = result[-back]
            if known is None or known[0] == 1:
                result[-back] = (size, dim)
            elif size != 1:
                result[-back] = (size, walk.units.join(known[1], dim, f"it meets a fixed size at {where}"))
    return [r[1] if r else None for r in result]


@rule("pointwise", "dropout", "feature_dropout", "alpha_dropout", "contiguous", "detach", "type_as", "lift_fresh_copy", "alias")
@rule("to", "_to_copy", "clone", "softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "masked_fill", "where", "copy")
@rule(
    "hardswish",
    "log_sigmoid",
    "special_erf",
    "fill",
    "zero",
    "rrelu",
    "bernoulli",
    "float",
    "requires_grad",
    "nan_to_num",
    "dropout_",
    "native_dropout",
    "gelu",
    "lerp",
)
def pointwise(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """Element by element, or along one axis without changing its size."""
    skip = ("other",) if node.target in TYPE_ONLY else ()
    nodes = [v for k, v in a.items() if isinstance(v, fx.Node) and isinstance(v.meta.get("val"), Tensor) and k not in skip]
    axes = broadcast(walk, nodes, walk.where(node))
    many = isinstance(node.meta.get("val"), tuple | list)
    return [list(axes) for _ in node.meta["val"]] if many else axes


TYPE_ONLY = (torch.ops.aten.type_as.default,)


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def like(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A constant with the axes of another tensor."""
    return walk.axes(a["self"])


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty", "new_empty", "scalar_tensor")
def constant(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """A constant: equal along every axis, so it takes any size."""
    return [FREE] * len(walk.shape(node))


@rule("arange", "sym_size", "_assert_tensor_metadata", "_assert_async", "randint", "rand", "randn", "linspace")
def neutral(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """No weight decides these."""
    value = node.meta.get("val")
    return [None] * value.dim() if isinstance(value, Tensor) else []


REACH = 20  # operators
ON_MAPS = {
    "conv", "conv_transpose", "batch_norm", "instance_norm", "group_norm", "max_pool", "avg_pool", "adaptive_avg_pool",
    "pixel_shuffle", "upsample_nearest", "upsample_bilinear", "upsample_bicubic", "_upsample_nearest_exact",
}  # fmt: skip


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def reshape(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Any change of shape that keeps the order of the numbers."""
    walk.numbers = walk.numbers or op_name(node) == "unflatten"
    channels = channel_axis(node, len(walk.shape(node)))
    return reshaped(walk.units, walk.axes(a["self"]), walk.shape(a["self"]), walk.shape(node), walk.where(node), channels)


def channel_axis(node: fx.Node, rank: int) -> int | None:
    """The axis of a tensor that the first operator on maps after it takes for channels; None if there is none."""
    waiting = [(node, list(range(rank)))]  # and which of the tensor's axes stands where
    for now, order in waiting:
        for user in now.users if len(waiting) < REACH else ():
            name = op_name(user)
            if name.rstrip("123d") in ON_MAPS and user.args[0] is now and len(order) > 2:
                return order[1]
            if name == "permute":
                waiting.append((user, [order[d] for d in cast("list[int]", user.args[1])]))
            elif isinstance(value := user.meta.get("val"), Tensor) and value.shape == now.meta["val"].shape:
                waiting.append((user, order))
    return None


@rule("permute")
def permute(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Axes in another order."""
    axes = walk.axes(a["self"])
    return [axes[d] for d in a["dims"]]


@rule("movedim", "moveaxis")
def movedim(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Axes in another order, named by where they come from and go to."""
    axes = walk.axes(a["self"])
    sizes = torch.empty(tuple(range(1, len(axes) + 1)), device="meta").movedim(a["source"], a["destination"]).shape
    return [axes[size - 1] for size in sizes]


@rule("transpose", "swapaxes", "swapdims")
def transpose(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Two axes exchanged."""
    axes = walk.axes(a["self"])
    i, j = (a["dim0"], a["dim1"]) if "dim0" in a else (a["axis0"], a["axis1"])
    axes[i], axes[j] = axes[j], axes[i]
    return axes


@rule("t", "numpy_T", "mT", "matrix_H", "adjoint", "numpy_t")
def reverse(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """The last two axes exchanged."""
    axes = walk.axes(a["self"])
    return axes if len(axes) < 2 else [*axes[:-2], axes[-1], axes[-2]]


@rule("expand", "broadcast_to", "expand_as")
def expand(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Sizes of 1 repeated, or as many as another tensor has; the others stay."""
    if isinstance(a.get("other"), fx.Node):
        return broadcast(walk, [a["self"], a["other"]], walk.where(node))
    old, axes, new = walk.shape(a["self"]), walk.axes(a["self"]), walk.shape(node)
    front: Axes = [None] * (len(new) - len(old))
    return front + [d if n == m else None for d, n, m in zip(axes, old, new[len(front) :], strict=True)]


@rule("repeat", "tile")
def repeat(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Whole axes repeated: each copy of a unit is the unit."""
    axes, old, new = walk.axes(a["self"]), walk.shape(a["self"]), walk.shape(node)
    front: Axes = [None] * (len(new) - len(old))
    body = [d.repeat(m // n) if isinstance(d, Tensor) else d for d, n, m in zip(axes, old, new[len(front) :], strict=True)]
    return front + body


@rule("repeat_interleave")
def repeat_interleave(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Every position of one axis repeated in place, the same number of times."""
    axes = walk.axes(a["self"])
    if not isinstance(a.get("repeats"), int) or a.get("dim") is None:
        return None
    dim = a["dim"] % len(axes)
    along = axes[dim]
    axes[dim] = along.repeat_interleave(a["repeats"]) if isinstance(along, Tensor) else along
    return axes
