"""Rules of layers: products, convolutions, norms, embeddings, recurrent layers, attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, fx

from quadriga.core.axes.units import Axes, Dim
from quadriga.core.axes.walk import Walk, op_name, rule


@rule("linear")
def linear(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """input[..., in] · weight[out, in]."""
    axes, (out, inside) = walk.axes(a["input"]), walk.axes(a["weight"])
    walk.units.join(axes[-1], inside, "it reads a fixed size")
    walk.read(a["weight"], 1)
    _bias(walk, a.get("bias"), out)
    walk.produce(a["weight"], 0, "linear")
    return [*axes[:-1], out]


@rule("addmm", "baddbmm")
def addmm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """self + mat1 · mat2."""
    left, right = (a["mat1"], a["mat2"]) if "mat1" in a else (a["batch1"], a["batch2"])
    axes = _product(walk, left, right)
    for dim, mine, size in zip(reversed(axes), reversed(walk.axes(a["self"])), reversed(walk.shape(a["self"])), strict=False):
        if size > 1:
            walk.units.join(dim, mine)
    return axes


@rule("matmul", "mm", "bmm", "mv", "dot", "linalg_matmul")
def matmul(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Batch axes are joined, the inner axes too; the outer ones stay."""
    left, right = [v for v in a.values() if isinstance(v, fx.Node)][:2]
    return _product(walk, left, right)


def _product(walk: Walk, left: fx.Node, right: fx.Node) -> Axes:
    a, b = walk.axes(left), walk.axes(right)
    walk.units.join(a[-1], b[-2] if len(b) > 1 else b[-1], "it is multiplied with a fixed size")
    if len(b) == 2:
        walk.produce(right, 1, "linear")
        walk.read(right, 0)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    sizes_a, sizes_b = walk.shape(left)[:-2], walk.shape(right)[:-2]
    rank = max(len(sizes_a), len(sizes_b))
    batch: Axes = []
    for k in range(-rank, 0):
        x = (sizes_a[k], a[:-2][k]) if -k <= len(sizes_a) else (1, None)
        y = (sizes_b[k], b[:-2][k]) if -k <= len(sizes_b) else (1, None)
        batch.append(walk.units.join(x[1], y[1]) if x[0] == y[0] else (x if y[0] == 1 else y)[1])
    return [*batch, *rows, *columns]


def _bias(walk: Walk, bias: Any, out: Dim) -> None:
    if isinstance(bias, fx.Node):
        walk.units.join(walk.axes(bias)[0], out)


@rule("einsum")
def einsum(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Equal letters are one axis."""
    inside, arrow, outside = a["equation"].replace(" ", "").partition("->")
    if not arrow or "." in inside or not inside.replace(",", "").isalpha():
        return None
    letters: dict[str, Dim] = {}
    for term, tensor in zip(inside.split(","), a["tensors"], strict=True):
        for letter, dim in zip(term, walk.axes(tensor), strict=True):
            letters[letter] = walk.units.join(letters[letter], dim) if letter in letters else dim
        for k, letter in enumerate(term):
            if letter in outside:
                walk.produce(tensor, k, "linear")
            else:
                walk.read(tensor, k)
    return [letters[letter] for letter in outside]


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """weight[out, in / groups, kernel…]. In groups, the same position is cut in every group; depthwise, whole groups are."""
    if a.get("transposed"):
        return None
    axes, (out, inside, *kernel) = walk.axes(a["input"]), walk.axes(a["weight"])
    batched = len(axes) == len(kernel) + 2
    channels, groups = axes[1 if batched else 0], a["groups"]
    for extent in kernel:
        walk.units.pin(extent, "it is a kernel's extent")
    single = walk.shape(a["weight"])[1] == 1  # an axis of one unit may be lost where the weight is computed
    if not isinstance(out, Tensor) or not (isinstance(inside, Tensor) or single):
        return None  # a weight that is computed in a way that is not understood
    if groups == 1:
        if isinstance(inside, Tensor):
            walk.units.join(channels, inside, "it reads a fixed size")
            walk.read(a["weight"], 1)
    elif single:
        walk.units.join(channels, out[:: len(out) // groups], "it reads a fixed size")
        for owner in out.view(groups, -1):
            walk.units.unite(owner[:1].expand(len(owner)), owner)
    else:
        assert isinstance(inside, Tensor)
        walk.units.join(channels, inside.repeat(groups), "it reads a fixed size")
        walk.read(a["weight"], 1)
        first = out.view(groups, -1)[0]
        walk.units.unite(first.repeat(groups), out)
    _bias(walk, a.get("bias"), out)
    walk.produce(a["weight"], 0, "conv")
    return [*axes[: 1 if batched else 0], out, *([None] * len(kernel))]


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """weight[in, out / groups, kernel…]. In groups, the same position is cut in every group; depthwise it is fixed."""
    axes, (inside, out, *kernel) = walk.axes(a["input"]), walk.axes(a["weight"])
    groups = a["groups"]
    if not isinstance(inside, Tensor) or not isinstance(out, Tensor) or (groups > 1 and 1 in (len(out), len(inside) // groups)):
        return None
    if groups > 1:
        walk.units.unite(inside.view(groups, -1)[0].repeat(groups), inside)
        out = out.repeat(groups)
    for extent in kernel:
        walk.units.pin(extent, "it is a kernel's extent")
    walk.units.join(axes[-len(kernel) - 1], inside, "it reads a fixed size")
    walk.read(a["weight"], 0)
    _bias(walk, a.get("bias"), out)
    walk.produce(a["weight"], 1, "conv")
    return [*axes[: -len(kernel) - 1], out, *([None] * len(kernel))]


@rule("batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "native_batch_norm", "instance_norm")
def batch_norm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """Weight, bias and running statistics belong to axis 1."""
    axes = walk.axes(a["input"])
    states = [a[k] for k in ("weight", "bias", "running_mean", "running_var") if isinstance(a.get(k), fx.Node)]
    if not states:
        walk.numbers = True
    for state in states:
        axes[1] = walk.units.join(axes[1], walk.axes(state)[0])
    return axes if isinstance(node.meta["val"], Tensor) else None


@rule("prelu")
def prelu(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """One slope, or one a channel."""
    axes, slope = walk.axes(a["self"]), walk.axes(a["weight"])
    if walk.shape(a["weight"])[0] > 1:
        axes[1] = walk.units.join(axes[1], slope[0])
    return axes


@rule("layer_norm", "rms_norm", "native_layer_norm")
def layer_norm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes | None:
    """Weight and bias belong to the last axes; without them a module still keeps a number, which has to follow."""
    axes, count = walk.axes(a["input"]), len(a["normalized_shape"])
    states = [a[k] for k in ("weight", "bias") if isinstance(a.get(k), fx.Node)]
    walk.numbers = walk.numbers or not states
    for state in states:
        for k, dim in enumerate(walk.axes(state), -count):
            axes[k] = walk.units.join(axes[k], dim)
    return axes if isinstance(node.meta["val"], Tensor) else None


@rule("group_norm")
def group_norm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """Every group loses the same positions, so that the number of groups stays."""
    axes = walk.axes(a["input"])
    for state in (a["weight"], a["bias"]):
        if isinstance(state, fx.Node):
            axes[1] = walk.units.join(axes[1], walk.axes(state)[0])
    if isinstance(axes[1], Tensor):
        groups = axes[1].view(a["num_groups"], -1)
        walk.numbers = walk.numbers or not isinstance(a["weight"], fx.Node)
        if groups.shape[1] == 1:
            walk.units.pin(axes[1], f"{walk.where(node)} has a fixed number of groups")
        for one, other in pairwise(groups):
            walk.units.unite(one, other)
    return axes


@rule("embedding")
def embedding(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """weight[rows, features]; rows are what the indices name."""
    rows, features = walk.axes(a["weight"])
    walk.units.pin(rows, "indices name its rows")
    walk.produce(a["weight"], 1, "embedding")
    return [*walk.axes(a["indices"]), features]


GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*GATES)
def recurrent(walk: Walk, node: fx.Node, a: dict[str, Any]) -> list[Axes] | None:
    """One set of cells over gates, layers and directions, and the next layer's input, unless a projection lies between."""
    gates, params = GATES[op_name(node)], a["params"]
    directions, step = 2 if a["bidirectional"] else 1, 4 if a["has_biases"] else 2
    stacks = a["num_layers"] * directions
    projected = len(params) == (step + 1) * stacks
    step += projected
    first = walk.axes(params[0])[0]
    if len(params) != step * stacks or not isinstance(first, Tensor):
        return None
    cells = first[: len(first) // gates]
    given = walk.axes(params[step - 1])[0] if projected else cells  # what the layer hands on, and reads of itself
    assert isinstance(given, Tensor)
    below: Dim = walk.axes(a["input"])[-1]
    for start in range(0, len(params), step):
        w_ih, w_hh, *rest = params[start : start + step]
        walk.units.join(below, walk.axes(w_ih)[1], "it reads a fixed size")
        walk.read(w_ih, 1)
        if projected:
            walk.read(rest[-1], 1)
            walk.units.join(given, walk.axes(rest[-1])[0])
            walk.units.join(cells, walk.axes(rest[-1])[1])
        _cell(walk, gates, cells, given, [w_ih, w_hh, *rest[: len(rest) - projected]])
        if projected:
            walk.produce(rest[-1], 0, "recurrent")
        if (start // step + 1) % directions == 0:
            below = given.repeat(directions)
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    for state, width in zip(states, (given, cells), strict=False):
        walk.units.join(walk.axes(state)[-1], width)
    ends: list[Axes] = [[None, None, width] for _, width in zip(states, (given, cells), strict=False)]
    return [[*walk.axes(a["input"])[:-1], below], *ends]


def _cell(walk: Walk, gates: int, cells: Tensor, given: Dim, weights: Sequence[fx.Node]) -> None:
    """One set of cells over all gates: w_ih [gates · cells, in], w_hh [gates · cells, given], biases [gates · cells]."""
    walk.units.join(given, walk.axes(weights[1])[1])
    walk.read(weights[1], 1)
    for weight in weights:
        walk.units.join(cells.repeat(gates), walk.axes(weight)[0])
    walk.produce(weights[0], 0, "recurrent")


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """One step of a recurrent layer; its states have the width of its cells."""
    gates, rows = GATES[op_name(node).removesuffix("_cell")], walk.axes(a["w_ih"])[0]
    if not isinstance(rows, Tensor):
        return None
    cells = rows[: len(rows) // gates]
    walk.units.join(walk.axes(a["input"])[-1], walk.axes(a["w_ih"])[1], "it reads a fixed size")
    walk.read(a["w_ih"], 1)
    _cell(walk, gates, cells, cells, [a[k] for k in ("w_ih", "w_hh", "b_ih", "b_hh") if isinstance(a.get(k), fx.Node)])
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    for state in states:
        walk.units.join(walk.axes(state)[-1], cells)
    axes: Axes = [*walk.axes(a["input"])[:-1], cells]
    return [list(axes) for _ in states] if isinstance(node.meta["val"], tuple | list) else axes


@rule("scaled_dot_product_attention")
def attention(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """query[..., q, e] · key[..., k, e], then value[..., k, v]; heads are joined, and fixed where groups share keys."""
    q, k, v = (walk.axes(a[n]) for n in ("query", "key", "value"))
    walk.units.join(q[-1], k[-1])
    walk.units.join(k[-2], v[-2])
    if walk.shape(a["query"])[:-2] != walk.shape(a["key"])[:-2]:
        for dim in (*q[:-2], *k[:-2], *v[:-2]):
            walk.units.pin(dim, f"query heads share keys at {walk.where(node)}")
        return [*q[:-1], v[-1]]
    batch = [walk.units.join(walk.units.join(x, y), z) for x, y, z in zip(q[:-2], k[:-2], v[:-2], strict=True)]
    mask = a.get("attn_mask")
    if isinstance(mask, fx.Node):
        sizes, scores = walk.shape(mask), [*batch, q[-2], k[-2]]
        for size, dim, mine in zip(reversed(sizes), reversed(walk.axes(mask)), reversed(scores), strict=False):
            if size > 1:
                walk.units.join(mine, dim)
    return [*batch, q[-2], v[-1]]
