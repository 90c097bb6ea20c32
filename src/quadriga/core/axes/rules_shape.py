"""Rules of operators that move, join or drop axes, and of those that act element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from quadriga.core.axes.reshape import reshaped
from quadriga.core.axes.units import FREE, Axes, Dim, Mismatch
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


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def reshape(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Any change of shape that keeps the order of the numbers."""
    walk.numbers = walk.numbers or op_name(node) == "unflatten"
    return reshaped(walk.units, walk.axes(a["self"]), walk.shape(a["self"]), walk.shape(node), walk.where(node))


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


@rule("cat", "concat", "concatenate")
def cat(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One axis after the other; the remaining axes are joined."""
    parts = [p for p in a["tensors"] if walk.shape(p) != (0,)]  # torch ignores an empty tensor here
    dim = a["dim"] % len(walk.shape(node))
    pieces: list[Tensor] = []
    known = False
    result: Axes = walk.axes(parts[0])
    for number, part in enumerate(parts):
        axes = walk.axes(part)
        along = axes[dim]
        wide = isinstance(along, Tensor) and len(along) > 1  # a single unit cannot be cut anyway
        known = known or wide
        pieces.append(along if wide else _fixed(walk, walk.shape(part)[dim], node))
        if number:
            result = [walk.units.join(r, x) if k != dim else None for k, (r, x) in enumerate(zip(result, axes, strict=True))]
    result[dim] = torch.cat(pieces) if known else None
    return result


@rule("hstack", "vstack")
def stacked(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """`cat` along axis 1 or 0, of tensors with two axes or more."""
    if len(walk.shape(a["tensors"][0])) < 2:
        return None
    return cat(walk, node, {**a, "dim": int(op_name(node) == "hstack")})


def _fixed(walk: Walk, size: int, node: fx.Node) -> Tensor:
    units = walk.units.fresh(size)
    walk.units.pin(units, f"it meets a fixed size at {walk.where(node)}")
    return units


@rule("stack")
def stack(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Equal tensors along a new axis."""
    axes = broadcast(walk, a["tensors"], walk.where(node))
    axes.insert(a["dim"] % len(walk.shape(node)), None)
    return axes


@rule("chunk", "tensor_split")
def chunk(walk: Walk, node: fx.Node, a: dict[str, Any]) -> list[Axes] | None:
    """Equal parts: to stay equal, they lose the same positions."""
    axes, count = walk.axes(a["self"]), len(node.meta["val"])
    dim = a["dim"] % len(axes)
    along = axes[dim]
    if not isinstance(along, Tensor):
        return [list(axes) for _ in range(count)]
    if len(along) % count:
        raise Mismatch
    parts = along.chunk(count)
    for part in parts[1:]:
        walk.units.unite(parts[0], part)
    return [[part if k == dim else x for k, x in enumerate(axes)] for part in parts]


@rule("glu")
def glu(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Half of the channels gate the other half."""
    axes = walk.axes(a["self"])
    dim = a["dim"] % len(axes)
    along = axes[dim]
    if isinstance(along, Tensor):
        first, second = along.chunk(2)
        axes[dim] = walk.units.join(first, second)
    return axes


@rule("split", "split_with_sizes")
def split(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """Equal parts lose the same positions, as with `chunk`; their size is named in the code and has to follow."""
    axes, sizes = walk.axes(a["self"]), [v.shape[a["dim"]] for v in node.meta["val"]]
    along = axes[a["dim"]]
    if not isinstance(along, Tensor) or len(set(sizes)) > 1 or len(sizes) == 1:
        return along_one(walk, node, a)
    walk.numbers = True
    return chunk(walk, node, a)


@rule("unbind", "slice", "narrow", "select", "pad", "constant_pad_nd", "roll", "flip")
@rule(
    "rot90",
    "index_select",
    "tril",
    "triu",
    "topk",
    "sort",
    "argsort",
    "diff",
    "cumprod",
    "logcumsumexp",
    "kthvalue",
    "median",
    "mode",
)
def along_one(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """Parts of one or a few axes: harmless without units; elsewhere the user's code names positions, so it is fixed."""
    axes = walk.axes(a["self"])
    value = node.meta["val"]
    shapes = [v.shape for v in value] if isinstance(value, tuple | list) else [value.shape]
    if "pad" in a:
        touched = {len(axes) - 1 - k // 2 for k, n in enumerate(a["pad"]) if n}
    elif "dims" in a:
        touched = {d % len(axes) for d in a["dims"]}
    else:
        touched = {a.get("dim", 0) % len(axes)}
    if _whole(a, shapes[0], walk.shape(a["self"])):
        return axes
    for d in touched:
        walk.units.pin(axes[d], f"{walk.where(node)} names positions along it")
    axes = [None if d in touched else x for d, x in enumerate(axes)]
    drop = len(shapes[0]) < len(axes)
    kept = [x for k, x in enumerate(axes) if not (drop and k in touched)]
    return [list(kept) for _ in shapes] if isinstance(value, tuple | list) else kept


def _whole(a: dict[str, Any], new: torch.Size, old: tuple[int, ...]) -> bool:
    return "start" in a and "step" in a and a["step"] == 1 and tuple(new) == old  # x[:], which keeps any size


@rule("index")
def index(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Tensors as indices of some axes, such as a table of relative positions: those keep their sizes."""
    axes, rows = walk.axes(a["self"]), list(a["indices"])
    given = [k for k, r in enumerate(rows) if r is not None]
    if any(rows[k].meta["val"].dtype in (torch.bool, torch.uint8) for k in given):
        return None
    walk.pin([rows[k] for k in given], "it holds indices")
    for k in given:
        walk.units.pin(axes[k], "indices name its rows")
    kept = [x for k, x in enumerate(axes) if k not in given]
    together = given == list(range(given[0], given[-1] + 1))
    start = given[0] if together else 0  # where torch puts the axes of the indices
    return [*kept[:start], *([None] * (len(walk.shape(node)) - len(kept))), *kept[start:]]


@rule("mean", "sum", "amax", "amin", "max", "min", "std", "var", "logsumexp", "norm", "linalg_vector_norm", "any", "all")
@rule("prod", "argmax", "argmin", "var_mean", "std_mean", "nansum", "nanmean", "count_nonzero")
def reduce(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """Axes summed away."""
    source = next(v for v in a.values() if isinstance(v, fx.Node))
    if isinstance(a.get("other"), fx.Node):  # max(a, b) is element by element
        return broadcast(walk, [source, a["other"]], walk.where(node))
    axes = walk.axes(source)
    dims = a.get("dim")
    gone = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % len(axes) for d in gone}
    kept: Axes = [None if k in gone else x for k, x in enumerate(axes) if a.get("keepdim") or k not in gone]
    value = node.meta["val"]
    return [list(kept) for _ in value] if isinstance(value, tuple | list) else kept


@rule("gather")
def gather(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Values picked along an axis; only where no weight decides any axis."""
    return None if any(isinstance(d, Tensor) for d in walk.axes(a["self"])) else [None] * len(walk.shape(node))
