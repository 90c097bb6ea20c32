"""Walk the traced graph once, operator by operator, and unite the units that each operator couples."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from quadriga.core.axes.trace import Traced
from quadriga.core.axes.units import Axes, Mismatch, Units

Rule = Callable[["Walk", fx.Node, dict[str, Any]], Any]  # → Axes, or a list of Axes for several outputs
RULES: dict[str, Rule] = {}
TURNED = ("t", "transpose", "permute", "numpy_T", "mT")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how ATen operators of these names couple axes; in-place forms share the rule."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


class Walk:
    """The result of a walk.

    Attributes:
        units: every unit of every weight and state that the graph uses.
        states: id of a state → its axes.
        values: node → axes of its output; nodes with several outputs have a list of them.
        producers: (id of a weight, dimension, kind) in the order of execution: where widths come from.
        readers: (id of a weight, dimension): where widths are summed over.
        computed: (id of a weight, dimension): where they are summed over in what is computed from the weight, not linearly.
        numbers: whether sizes stand where no check of the outputs finds them: in a norm without weights, in `split(8)`.
    """

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.units = Units()
        self.states: dict[int, Axes] = {}
        self.values: dict[fx.Node, Any] = {}
        self.producers: list[tuple[int, int, str]] = []
        self.readers: set[tuple[int, int]] = set()
        self.computed: set[tuple[int, int]] = set()
        self.numbers = False
        self._state_of: dict[fx.Node, int] = {}
        for node in traced.graph.nodes:
            self._visit(node)

    def axes(self, node: Any) -> Axes:
        """The axes of a tensor argument."""
        return list(self.values[node])

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The traced shape of a node's output."""
        return tuple(node.meta["val"].shape)

    def where(self, node: fx.Node) -> str:
        """Layer and line of a node, for reasons."""
        return self.traced.where(node)

    def produce(self, node: Any, dim: int, kind: str) -> None:
        """A weight whose dimension `dim` decides a width; `kind` is conv, linear, recurrent or embedding.

        A matrix may come transposed, as in `x @ weight.T`, or be computed from the weight (scaled, standardized).
        """
        for state, own in self._origins(node, dim):
            entry = (state, own, kind)
            if entry not in self.producers:
                self.producers.append(entry)

    def read(self, node: Any, dim: int) -> None:
        """A weight whose dimension `dim` is summed over: what it holds of a unit says how much of the unit is read."""
        linear = self._unscaled(node)
        (self.readers if linear else self.computed).update(self._origins(linear or node, dim))

    def _origins(self, node: Any, dim: int) -> list[tuple[int, int]]:
        """(id of a weight, its dimension) that a dimension of what an operator gets is; [] of what inputs decide."""
        if not isinstance(node, fx.Node):
            return []
        if node in self._state_of:
            return [(self._state_of[node], dim)]
        if op_name(node) in TURNED and len(self.shape(node)) == 2:
            return self._origins(node.args[0], 1 - dim)
        axis = self.axes(node)[dim]
        if not isinstance(axis, Tensor) or not (states := self._sources(node)):
            return []
        roots, size = self.units.roots(axis), len(axis)
        matrices = [(s, d, own) for s in states if len(self.states[s]) > 1 for d, own in enumerate(self.states[s])]
        return [
            (s, d) for s, d, own in matrices if isinstance(own, Tensor) and len(own) == size and self.units.roots(own) == roots
        ]

    def _sources(self, node: fx.Node) -> list[int]:
        """The states that a value is computed from; [] if inputs have a part in it."""
        found, seen, waiting = list[int](), {node}, [node]
        while waiting:
            one = waiting.pop()
            if one in self._state_of:
                found.append(self._state_of[one])
            elif one.op == "placeholder" and self.traced.states.get(one.name) is None:
                return []
            new = [n for n in flat([one.args, one.kwargs]) if n not in seen]
            seen.update(new)
            waiting += new
        return found

    def _unscaled(self, node: Any) -> fx.Node | None:
        """The weight itself, behind factors that are no weights of its shape; None where it is computed in another way.

        A factor that is computed from the weight, as a spectral norm is, makes it another way.
        """
        others = list[fx.Node]()
        while isinstance(node, fx.Node) and node not in self._state_of:
            name, first = op_name(node), node.args[0] if node.args else None
            if name in TURNED and len(self.shape(node)) == 2 and isinstance(first, fx.Node) and first in self._state_of:
                break
            factors = [n for n in flat(node.args) if isinstance(n.meta.get("val"), Tensor)] if name in ("mul", "div") else []
            shaped = [n for n in factors if self.shape(n) == self.shape(node)]
            others += [n for n in factors if n not in shaped]
            node = shaped[0] if len(shaped) == 1 and (name == "mul" or shaped[0] is first) else None
        if not isinstance(node, fx.Node) or any({*self._sources(node)} & {*self._sources(n)} for n in others):
            return None
        return node

    def pin(self, node: Any, reason: str) -> None:
        """Fix all axes of a tensor (or list of tensors)."""
        for part in flat(node):
            if part in self.values:
                for axes in _each(self.values[part]):
                    for dim in axes:
                        self.units.pin(dim, reason)

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.values[node] = self._placeholder(node)
        elif node.op == "output":
            self.pin(list(node.args), "it is the model's output")
        elif node.op == "call_function":
            self.values[node] = self._call(node)
        else:
            self.values[node] = _neutral(node)

    def _placeholder(self, node: fx.Node) -> Any:
        state = self.traced.states.get(node.name)
        if state is None or not node.users:
            return _neutral(node)
        self._state_of[node] = id(state)
        if id(state) not in self.states:
            self.states[id(state)] = [self.units.fresh(n) for n in state.shape]
        return self.states[id(state)]

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = cast("tuple[fx.Node, int]", node.args)
            value = self.values[source]
            return value[index] if value and isinstance(value[0], list) else value
        function, bound = _lookup(node), bind(node)
        if function is not None:
            try:
                found = function(self, node, bound)
            except (Mismatch, IndexError, KeyError, ValueError, AttributeError, TypeError):
                found = None  # a call that the rule was not written for: everything that it touches is fixed below
            if found is not None and _agrees(found, node):
                return found
        self.pin([node.args, node.kwargs], f"{op_name(node)} at {self.where(node)} is not understood")
        return _neutral(node)


def _lookup(node: fx.Node) -> Rule | None:
    name = op_name(node)
    found = RULES.get(name) or RULES.get(name.rstrip("_"))
    if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return RULES["pointwise"]
    return found


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


def _each(value: Any) -> list[Axes]:
    return value if value and isinstance(value[0], list) else [value]


def _neutral(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return [None] * value.dim()
    if isinstance(value, tuple | list):
        return [[None] * v.dim() if isinstance(v, Tensor) else [] for v in value]
    return []


def _agrees(found: Any, node: fx.Node) -> bool:
    """A rule's answer has to have the traced ranks and sizes; else the rule does not fit this call."""
    value = node.meta.get("val")
    values = list(value) if isinstance(value, tuple | list) else [value]
    given = found if isinstance(value, tuple | list) else [found]
    for axes, tensor in zip(given, values, strict=False):
        if not isinstance(tensor, Tensor):
            continue
        if len(axes) != tensor.dim() or any(
            isinstance(d, Tensor) and len(d) != n for d, n in zip(axes, tensor.shape, strict=True)
        ):
            return False
    return True
