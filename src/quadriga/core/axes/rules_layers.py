"""Rules of layers: products, convolutions, norms, embeddings, recurrent layers, attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, fx

from quadriga.core.axes.units import Axes, Dim
from quadriga.core.axes.walk import Walk, rule


@rule("linear")
def linear(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Axes:
    """input[..., in] · weight[out, in]."""
    axes, (out, inside) = walk.axes(a["input"]), walk.axes(a["weight"])
    walk.units.join(axes[-1], inside, "it reads a fixed size")
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
        for k in [k for k, letter in enumerate(term) if letter in outside]:
            walk.produce(tensor, k, "linear")
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
    if not isinstance(out, Tensor) or not isinstance(inside, Tensor):
        return None  # a weight that is computed in a way that is not understood
    if groups == 1:
        walk.units.join(channels, inside, "it reads a fixed size")
    elif len(inside) == 1:
        walk.units.join(channels, out[:: len(out) // groups], "it reads a fixed size")
        for owner in out.view(groups, -1):
            walk.units.unite(owner[:1].expand(len(owner)), owner)
    else:
        walk.units.join(channels, inside.repeat(groups), "it reads a fixed size")
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
    _bias(walk, a.get("bias"), out)
    walk.produce(a["weight"], 1, "conv")
    return [*axes[: -len(kernel) - 1], out, *([None] * len(kernel))]


@rule("batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "native_batch_norm", "instance_norm")
def batch_norm(walk: Walk, node: fx.Node, a: dict[str, Any]) -> Any:
    """Weight, bias and running statistics belong to axis 1."""
    axes = walk.axes(a["input"])
    states = [a[k] for k in ("weight", "bias", "running_mean", "running_var") if isinstance(a.get(k), fx.Node)]
    if not states:
        return None
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
    """Weight and bias belong to the last axes. Without them a module's `normalized_shape` would stay: then it is fixed."""
    axes, count = walk.axes(a["input"]), len(a["normalized_shape"])
    states = [a[k] for k in ("weight", "bias") if isinstance(a.get(k), fx.Node)]
    owner = walk.traced.model.get_submodule(walk.traced.layer(node))
    if not states and hasattr(owner, "normalized_shape"):
        return None
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
        if groups.shape[1] == 1 or not isinstance(a["weight"], fx.Node):
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
    """One set of hidden units over the gates, every layer and direction, and the next layer's input."""
    name = node.target._schema.name.split("::")[-1]  # type: ignore[union-attr]
    if "data" in a or not isinstance(a["input"], fx.Node):
        return None  # packed sequences
    params, step = a["params"], 4 if a["has_biases"] else 2
    hidden_size = walk.shape(params[1])[1]
    directions = 2 if a["bidirectional"] else 1
    if len(params) != step * a["num_layers"] * directions or walk.shape(params[1])[0] != GATES[name] * hidden_size:
        return None  # a projected LSTM
    hidden = walk.axes(params[1])[1]
    if not isinstance(hidden, Tensor):
        return None
    below: Dim = walk.axes(a["input"])[-1]
    for layer in range(a["num_layers"]):
        for direction in range(directions):
            start = (layer * directions + direction) * step
            w_ih, w_hh, *biases = params[start : start + step]
            walk.units.join(below, walk.axes(w_ih)[1], "it reads a fixed size")
            walk.units.join(hidden, walk.axes(w_hh)[1])
            for gates in (w_ih, w_hh, *biases):
                walk.units.join(hidden.repeat(GATES[name]), walk.axes(gates)[0])
            walk.produce(w_ih, 0, "recurrent")
        below = hidden.repeat(directions)
    states = a["hx"] if isinstance(a["hx"], list | tuple) else [a["hx"]]
    for state in states:
        walk.units.join(walk.axes(state)[-1], hidden)
    ends: list[Axes] = [[None, None, hidden] for _ in states]
    return [[*walk.axes(a["input"])[:-1], below], *ends]


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
