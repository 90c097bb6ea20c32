"""Walk the traced graph once, operator by operator, and unite the units that each operator couples."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx

from quadriga.core.axes.nodes import bind as bind
from quadriga.core.axes.nodes import flat as flat
from quadriga.core.axes.nodes import op_name as op_name
from quadriga.core.axes.origins import origins, unscaled
from quadriga.core.axes.trace import Traced
from quadriga.core.axes.units import Axes, Mismatch, Units

Rule = Callable[["Walk", fx.Node, dict[str, Any]], Any]  # → Axes, or a list of Axes for several outputs
RULES: dict[str, Rule] = {}


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
        for state, own in origins(self, node, dim):
            entry = (state, own, kind)
            if entry not in self.producers:
                self.producers.append(entry)

    def read(self, node: Any, dim: int) -> None:
        """A weight whose dimension `dim` is summed over: what it holds of a unit says how much of the unit is read."""
        linear = unscaled(self, node)
        (self.readers if linear else self.computed).update(origins(self, linear or node, dim))

    def state(self, node: fx.Node) -> int | None:
        """The id of the state that a placeholder stands for; None for other nodes."""
        return self._state_of.get(node)

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
