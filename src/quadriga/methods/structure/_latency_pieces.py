"""Pieces of a traced network: one costly operator with what is fused to it, as a small model of any width."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from quadriga.core.axes import AxisGraph, Group
from quadriga.core.axes.trace import BATCH
from quadriga.core.axes.walk import bind, op_name

RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
PRODUCTS = ("linear", "addmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
COSTLY = (
    *PRODUCTS, *RECURRENT, "mm", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention", "softmax",
    "layer_norm", "rms_norm", "group_norm", "gelu", "silu",
)  # fmt: skip
FUSED = ("batch_norm", "dropout", "dropout_", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d")

Kept = Mapping[int, int]  # group's number → units kept


@dataclass(frozen=True)
class Size:
    """One dimension: positions that stay, and positions that belong to groups."""

    fixed: int
    parts: tuple[tuple[int, int], ...]  # (group, positions at full width)

    def at(self, kept: Kept, full: Sequence[int]) -> int:
        """The size with these units kept."""
        return self.fixed + sum(round(n * kept[g] / full[g]) for g, n in self.parts)


@dataclass(frozen=True)
class Piece:
    """An operator and the element-wise ones behind it.

    Args:
        name: the layer, for people.
        key: equal for pieces of equal geometry, which are measured once.
        groups: numbers of the widths that it depends on, in the order of the key.
        quantized: whether quantization acts on it.
    """

    name: str
    key: str
    groups: tuple[int, ...]
    quantized: bool
    nodes: tuple[fx.Node, ...]
    shapes: Shapes

    def build(self, kept: Kept, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """A model of this piece alone with these units of its groups kept, and inputs for so many examples."""
        return _Assembly(self.nodes, self.shapes, kept, batch).done()


class Shapes:
    """Sizes of everything in a traced graph as functions of how many units of each group are kept."""

    def __init__(self, graph: AxisGraph, groups: Sequence[Group]) -> None:
        self.traced, self.walk = graph.traced, graph.walk
        self.full = [g.size for g in groups]
        self.owner: dict[int, int] = {}
        for number, group in enumerate(groups):
            for member in group.members:
                axis = self.walk.states[id(member.tensor)][member.dim]
                assert isinstance(axis, Tensor)
                for root, unit in zip(self.walk.units.roots(axis), member.units.tolist(), strict=True):
                    if unit >= 0:
                        self.owner[root] = number

    def state(self, node: fx.Node) -> Tensor | None:
        """The parameter or buffer that a node stands for."""
        return self.traced.states.get(node.name) if node.op == "placeholder" else None

    def sizes(self, node: fx.Node) -> list[Size]:
        """The dimensions of a node's (first) output."""
        axes, value = self.walk.values[node], node.meta["val"]
        if isinstance(value, tuple | list):
            axes, value = axes[0], value[0]
        return [self._size(axis, int(n)) for axis, n in zip(axes, value.shape, strict=True)]

    def _size(self, axis: Any, size: int) -> Size:
        if not isinstance(axis, Tensor):
            return Size(size, ())
        parts: dict[int, int] = {}
        for root in self.walk.units.roots(axis):
            if root in self.owner:
                parts[self.owner[root]] = parts.get(self.owner[root], 0) + 1
        return Size(size - sum(parts.values()), tuple(parts.items()))

    def batch(self, node: fx.Node) -> tuple[int, int] | None:
        """(the dimension that holds the examples, how many rows an example has there), or None."""
        sizes = [s.fixed if not s.parts else 0 for s in self.sizes(node)]
        if sizes and sizes[0] and sizes[0] % BATCH == 0:
            return 0, sizes[0] // BATCH
        found = [d for d, n in enumerate(sizes) if n == BATCH]
        return (found[0], 1) if found else None

    def at(self, node: fx.Node, kept: Kept) -> list[int]:
        """The shape of a node's output."""
        return [s.at(kept, self.full) for s in self.sizes(node)]


def pieces(graph: AxisGraph, groups: Sequence[Group], keep_float: Sequence[str] = ()) -> list[Piece]:
    """All pieces whose cost depends on one of these groups, in the order of execution.

    Args:
        graph: of the model at full width.
        groups: the widths that may change; all others are taken as fixed.
        keep_float: layers that quantization leaves alone.
    """
    shapes = Shapes(graph, groups)
    found, seen = [], set[fx.Node]()
    for node in graph.traced.graph.nodes:
        if node.op != "call_function" or node in seen or op_name(node) not in COSTLY or not _timeable(node, shapes):
            continue
        nodes = tuple(_chain(node, shapes))
        seen.update(nodes)
        numbers = list(dict.fromkeys(g for n in _all(nodes) for s in shapes.sizes(n) for g, _ in s.parts))
        if numbers:
            layer = graph.traced.layer(node)
            float_ = any(layer == k or layer.startswith(f"{k}.") for k in keep_float)
            quantized = op_name(node) in PRODUCTS and not float_
            found.append(Piece(layer, _key(nodes, shapes, numbers), tuple(numbers), quantized, nodes, shapes))
    return found


def _timeable(node: fx.Node, shapes: Shapes) -> bool:
    sources = [n for n in node.all_input_nodes if shapes.state(n) is None]
    return any(shapes.batch(n) for n in sources) and all("val" in n.meta for n in node.all_input_nodes)


def _chain(node: fx.Node, shapes: Shapes) -> Iterator[fx.Node]:
    """The node, and as long as one other alone reads it, what a runtime fuses to it or does right behind it."""
    yield node
    while len(node.users) == 1 and not isinstance(node.meta["val"], tuple | list):
        user = next(iter(node.users))
        if user.op != "call_function" or user.target is operator.getitem or isinstance(user.meta.get("val"), tuple | list):
            return
        pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ()) or op_name(user) in FUSED
        if not pointwise or any(n is not node and shapes.state(n) is None for n in user.all_input_nodes):
            return
        yield (node := user)


def _all(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes and all that they read, in order."""
    return list(dict.fromkeys(m for n in nodes for m in (*n.all_input_nodes, n)))


def _key(nodes: Sequence[fx.Node], shapes: Shapes, numbers: list[int]) -> str:
    """Operators, their plain arguments, and every shape with its groups numbered in the order in which they come."""
    place = {n: f"%{k}" for k, n in enumerate(_all(nodes))}
    rows = []
    for node in _all(nodes):
        sizes = [(s.fixed, [(numbers.index(g), n) for g, n in s.parts]) for s in shapes.sizes(node)]
        called = ""
        if node in nodes:
            arguments = {k: v for k, v in bind(node).items() if k not in ("normalized_shape", "groups")}
            grouped = "depthwise" if _depthwise(node) else bind(node).get("groups")
            called = f"{node.target} {fx.node.map_arg(arguments, lambda n: place[n])} {grouped}"
        value = node.meta["val"]
        kind = value.dtype if isinstance(value, Tensor) else ""
        rows.append(f"{place[node]} {sizes} {kind} {shapes.state(node) is not None} {called}")
    return "\n".join([*rows, str([shapes.full[g] for g in numbers])])


def _depthwise(node: fx.Node) -> bool:
    bound = bind(node)
    return int(bound.get("groups") or 1) > 1 and bound["weight"].meta["val"].shape[1] == 1


class _Assembly:
    """A small fx graph of copied nodes; tensors that the piece reads become its inputs, states its own parameters."""

    def __init__(self, nodes: Sequence[fx.Node], shapes: Shapes, kept: Kept, batch: int) -> None:
        self.nodes, self.shapes, self.kept, self.batch = nodes, shapes, kept, batch
        self.graph, self.root = fx.Graph(), nn.Module()
        self.env: dict[fx.Node, fx.Node] = {}
        self.inputs: list[Tensor] = []

    def done(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        outer = [n for n in _all(self.nodes) if n not in self.nodes]
        if (first := self.nodes[0]) and op_name(first) in RECURRENT:
            states = first.args[1] if isinstance(first.args[1], tuple | list) else [first.args[1]]
            outer = [n for n in outer if n not in states]
        fed = [n for n in outer if self.shapes.state(n) is None and self.shapes.batch(n)]
        entries = [(n, self.graph.placeholder(f"x{k}")) for k, n in enumerate(fed)]
        for node, entry in entries:
            self.env[node] = self._feed(node, entry)
        for node in outer:
            if node not in self.env:
                self.env[node] = self._own(node)
        for node in self.nodes:
            self.env[node] = self._copy(node)
        last = self.env[self.nodes[-1]]
        if isinstance(self.nodes[-1].meta["val"], tuple | list):
            last = self.graph.call_function(operator.getitem, (last, 0))
        self.graph.output(last)
        return fx.GraphModule(self.root, self.graph).eval(), tuple(self.inputs)

    def _feed(self, node: fx.Node, entry: fx.Node) -> fx.Node:
        """An input with its examples in front, and the calls that put them where the operator has them."""
        found = self.shapes.batch(node)
        assert found is not None
        dim, rows = found
        shape = self.shapes.at(node, self.kept)
        rest = shape[:dim] + shape[dim + 1 :]
        self.inputs.append(_filled([self.batch, *([rows] if rows > 1 else []), *rest], node.meta["val"].dtype))
        if rows > 1:
            entry = self.graph.call_method("flatten", (entry, 0, 1))
        return self.graph.call_method("movedim", (entry, 0, dim)) if dim else entry

    def _own(self, node: fx.Node) -> fx.Node:
        """A parameter with the first values of the model's own, or a constant."""
        shape, state, name = self.shapes.at(node, self.kept), self.shapes.state(node), f"s{len(self.env)}"
        if state is None:
            self.root.register_buffer(name, _filled(shape, node.meta["val"].dtype))
            return self.graph.get_attr(name)
        value = state.detach()[tuple(slice(n) for n in shape)].clone() if shape else state.detach().clone()
        if isinstance(state, nn.Parameter):
            self.root.register_parameter(name, nn.Parameter(value, requires_grad=False))
        else:
            self.root.register_buffer(name, value)
        return self.graph.get_attr(name)

    def _copy(self, node: fx.Node) -> fx.Node:
        """The node with arguments that name sizes made to fit."""
        bound = bind(node)
        if op_name(node) in RECURRENT:
            bound["hx"] = self._zeros(node, bound)
        if "normalized_shape" in bound:
            bound["normalized_shape"] = self.shapes.at(node, self.kept)[-len(bound["normalized_shape"]) :]
        if _depthwise(node):
            bound["groups"] = self.shapes.at(bound["input"], self.kept)[1]
        target: Any = node.target
        moved = fx.node.map_arg(bound, lambda n: self.env.get(n, n))
        given = [(a.name, a.kwarg_only) for a in target._schema.arguments]
        arguments = tuple(moved[name] for name, keyword in given if not keyword)
        return self.graph.call_function(target, arguments, {name: moved[name] for name, keyword in given if keyword})

    def _zeros(self, node: fx.Node, bound: dict[str, Any]) -> Any:
        """Initial states of a recurrent layer: their width is that of the weights."""
        source = bound["input"]
        dim, _ = self.shapes.batch(source) or (0, 1)
        many = isinstance(bound["hx"], tuple | list)
        layers = (bound["hx"][0] if many else bound["hx"]).meta["val"].shape[0]
        given, cells = self.shapes.at(bound["params"][1], self.kept)[1], self.shapes.at(bound["params"][0], self.kept)[0] // 4
        x = self.env[source]
        size = self.graph.call_method("size", (x, dim))
        widths = (given, cells) if many else (given,)  # an LSTM has both; they differ where it is projected
        made = [self.graph.call_method("new_zeros", (x, (layers, size, width))) for width in widths]
        return made if many else made[0]


def _filled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Values whose timing is ordinary: normal numbers, ones for masks, zeros for indices."""
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.ones(*shape, dtype=dtype) if dtype == torch.bool else torch.zeros(*shape, dtype=dtype)
