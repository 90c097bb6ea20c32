"""Rules of operators that join tensors, cut them into parts, pick positions, or sum axes away."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from quadriga.core.axes.rules_shape import broadcast
from quadriga.core.axes.units import Axes, Mismatch
from quadriga.core.axes.walk import Walk, op_name, rule


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
