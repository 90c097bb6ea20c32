"""Derive every later shape again after weights changed: which constants in the user's code must follow, which layers grow."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd

from quadriga.core.axes.reshape import blocks
from quadriga.core.axes.trace import Traced
from quadriga.core.axes.walk import Walk, bind, flat, op_name
from quadriga.core.errors import NotApplicable
from quadriga.core.quiet import quiet

VIEWS = ("view", "reshape", "unflatten")
ELIDED = ("contiguous", "to", "clone", "detach", "alias")  # a trace leaves them out where they do nothing
SPLITS = ("split", "split_with_sizes")
KEPT = {"instance_norm": "num_features", "batch_norm": "num_features", "group_norm": "num_channels"}
Factors = tuple[tuple[int, ...], tuple[int, ...]]  # the sizes flattened into an axis, before and after


@dataclass
class Derived:
    """What has to follow.

    Args:
        constants: reshape node → {position in its sizes: (constant, new constant)}.
        carried: reshape node → {position of an axis that weights decide: (traced size, its size now)}, changed or not; and
            of the axes that were cut out of one width with it.
        inputs: id of a Linear's weight → sizes flattened into its inputs, before and after.
        parts: whether the size of parts that a `split` names is another one.
        fields: (module, name, value) of numbers that modules without weights keep.
        shapes: output shape of each step that returns one tensor, in order.
    """

    constants: dict[fx.Node, dict[int, tuple[int, int]]] = field(default_factory=dict)
    carried: dict[fx.Node, dict[int, tuple[int, int]]] = field(default_factory=dict)
    inputs: dict[int, Factors] = field(default_factory=dict)
    parts: bool = False
    fields: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)


class _Run:
    """Runs the traced graph on fake tensors of the present sizes, mending sizes on the way."""

    def __init__(self, traced: Traced, walk: Walk) -> None:
        self.traced, self.walk, self.found = traced, walk, Derived()
        self.env: dict[fx.Node, Any] = {}
        self.factors: dict[fx.Node, list[Factors]] = {}

    def run(self) -> Derived:
        with quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for node in self.traced.graph.nodes:
                if node.op == "placeholder":
                    self.env[node] = self._placeholder(node)
                elif node.op == "get_attr":
                    self.env[node] = getattr(self.traced.module, str(node.target))
                elif node.op == "call_function":
                    value = self.env[node] = self._guarded(node)
                    if isinstance(value, Tensor) and op_name(node) not in ELIDED:
                        self.found.shapes.append(tuple(value.shape))
        return self.found

    def _placeholder(self, node: fx.Node) -> Any:
        like = self.traced.states.get(node.name, node.meta.get("val"))
        return torch.empty(tuple(like.shape), dtype=like.dtype, device=like.device) if isinstance(like, Tensor) else like

    def _guarded(self, node: fx.Node) -> Any:
        try:
            return self._call(node)
        except NotApplicable:
            raise
        except Exception as error:  # whatever an operator raises on sizes that do not fit
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NotApplicable(f"{self.traced.where(node)} does not fit the new sizes: {reason}") from error

    def _call(self, node: fx.Node) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda n: self.env[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: self.env[n])
        name = op_name(node)
        if node.target is operator.getitem:
            return args[0][args[1]]
        if name in VIEWS or name in ("_unsafe_view", "flatten", "expand"):
            return self._view(node, args[0], name)
        if name in SPLITS:
            args = self._parts(node, args)
        elif name == "linear":
            args = (args[0], self._input(node, args[0], args[1]), *args[2:])
        elif name.startswith("conv") and "transpose" not in name:
            args, kwargs = (), self._conv(node)
        elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
            args = (args[0], _resized(args[1], args[2]), *args[2:])
        elif name in ("layer_norm", "rms_norm"):
            args = (args[0], self._normalized(node, args[0]), *args[2:])
        elif name in KEPT and bind(node).get("weight") is None:
            self._keep(node, KEPT[name], args[0].shape[1])
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        self._inherit(node, value)
        return value

    def _conv(self, node: fx.Node) -> dict[str, Any]:
        """Padding and groups come from the module, which was changed, not from the trace."""
        a = {k: fx.node.map_arg(v, lambda n: self.env[n]) for k, v in bind(node).items()}
        owner = self.traced.model.get_submodule(self.traced.layer(node))
        if isinstance(owner, _ConvNd):
            if owner.padding_mode == "zeros":  # other modes pad before, with an operator of its own
                a["padding"] = owner.padding if isinstance(owner.padding, str) else list(owner.padding)
            a["groups"] = owner.groups
        return a

    def _normalized(self, node: fx.Node, value: Tensor) -> list[int]:
        """As many of the last sizes as before; a module without weights keeps them as a number."""
        sizes = tuple(value.shape[-len(bind(node)["normalized_shape"]) :])
        if bind(node).get("weight") is None:
            self._keep(node, "normalized_shape", sizes)
        return list(sizes)

    def _keep(self, node: fx.Node, name: str, value: Any) -> None:
        owner = self.traced.model.get_submodule(self.traced.layer(node))
        if hasattr(owner, name):
            self.found.fields.append((owner, name, value))

    def _view(self, node: fx.Node, value: Tensor, name: str) -> Tensor:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if name == "expand":
            given, old = list(cast("list[int]", node.args[1])), self.walk.shape(source)
            shift = len(given) - len(old)
            return value.expand(
                [value.shape[k - shift] if k >= shift and n == old[k - shift] else n for k, n in enumerate(given)]
            )
        old, new = self.walk.shape(source), self.walk.shape(node)
        sizes = self._sizes(node, old, new, tuple(value.shape))
        if name in VIEWS:
            self._constants(node, sizes)
        return value.reshape(sizes)

    def _constants(self, node: fx.Node, sizes: Sequence[int]) -> None:
        """Of the sizes that the code names, those that are others now."""
        source = cast(fx.Node, node.args[0])
        first = bind(node)["dim"] % len(self.walk.shape(source)) if op_name(node) == "unflatten" else 0
        given = list(cast("list[int]", node.args[-1]))
        new, decided = sizes[first:], self._decided(source, node)
        changed = {k: (n, new[k]) for k, n in enumerate(given) if n not in (-1, new[k])}
        owner = self.traced.model.get_submodule(self.traced.layer(node))
        if isinstance(owner, nn.Unflatten):
            self._keep(node, "unflattened_size", tuple(n if n == -1 else new[k] for k, n in enumerate(given)))
        elif changed:
            self.found.constants[node] = changed
        self.found.carried[node] = {k: (n, new[k]) for k, n in enumerate(given) if n != -1 and first + k in decided}

    def _decided(self, source: fx.Node, node: fx.Node) -> set[int]:
        """Axes that weights decide, and those that they were cut out of one width with."""
        axes, free = self.walk.axes(node), self.walk.units.free
        parts = [outs for _, outs in blocks(self.walk.shape(source), self.walk.shape(node)) or []]
        return {out for outs in parts if any(free(axes[o]) for o in outs) for out in outs}

    def _parts(self, node: fx.Node, args: Any) -> Any:
        """Equal parts of a changed width stay equal."""
        dim = bind(node)["dim"]
        total, parts = args[0].shape[dim], [v.shape[dim] for v in node.meta["val"]]
        if total == sum(parts) or total % len(parts):
            return args
        size = total // len(parts)
        named = [args[1]] if isinstance(args[1], int) else list(args[1])
        self.found.constants[node] = {k: (n, size) for k, n in enumerate(named)}
        self.found.parts = True
        return (args[0], size if isinstance(args[1], int) else [size] * len(parts), *args[2:])

    def _sizes(self, node: fx.Node, old: Sequence[int], new: Sequence[int], now: Sequence[int]) -> list[int]:
        source = node.args[0]
        plain: list[Factors] = [((o,), (n,)) for o, n in zip(old, now, strict=True)]
        before = self.factors.get(cast(fx.Node, source), plain)
        sizes = list(new)
        factors: list[Factors] = [((n,), (n,)) for n in new]
        for ins, outs in blocks(old, new) or [(list(range(len(old))), list(range(len(new))))]:
            total = prod(now[i] for i in ins)
            if len(outs) == 1:
                sizes[outs[0]] = total
                flat = [before[i] for i in ins]
                factors[outs[0]] = (sum((f[0] for f in flat), ()), sum((f[1] for f in flat), ()))
            elif total != prod(new[o] for o in outs):
                carry = [o for o in outs if isinstance(self.walk.axes(node)[o], Tensor)]
                rest = prod(new[o] for o in outs if o not in carry)
                if len(carry) != 1 or total % rest:
                    raise NotApplicable(f"{self.traced.where(node)} splits a changed width, {list(old)} → {list(now)}")
                sizes[carry[0]] = total // rest
                factors[carry[0]] = ((new[carry[0]],), (sizes[carry[0]],))
        self.factors[node] = factors
        return sizes

    def _input(self, node: fx.Node, value: Tensor, weight: Tensor) -> Tensor:
        """A Linear that reads another number of features than it did has to be rebuilt."""
        if value.shape[-1] == weight.shape[1]:
            return weight
        source, holder = node.args[0], node.args[1]
        assert isinstance(source, fx.Node) and isinstance(holder, fx.Node)
        state, factors = self.traced.states.get(holder.name), self.factors.get(source)
        was, now = weight.shape[1], value.shape[-1]
        if state is None or factors is None or (prod(factors[-1][0]), prod(factors[-1][1])) != (was, now):
            raise NotApplicable(f"{self.traced.where(node)} reads {was} features and would get {now}, not a flattened map")
        known = self.found.inputs.setdefault(id(state), factors[-1])
        if known != factors[-1]:
            raise NotApplicable(f"{self.traced.where(node)} is shared and would need two sizes")
        return weight.new_empty(weight.shape[0], now)

    def _inherit(self, node: fx.Node, value: Any) -> None:
        sources = [n for n in flat([node.args, node.kwargs]) if n in self.factors]
        for source in sources:
            if isinstance(node.meta.get("val"), Tensor) and self.walk.shape(source) == self.walk.shape(node):
                self.factors[node] = self.factors[source]
                return


def _resized(states: Any, params: Sequence[Tensor]) -> Any:
    """Recurrent start states of the width that the weights have now: what a layer hands on, and for an LSTM its cells."""
    if isinstance(states, Tensor):
        return states.new_empty((*states.shape[:-1], params[1].shape[1]))
    widths = (params[1].shape[1], params[0].shape[0] // 4)
    return [s.new_empty((*s.shape[:-1], n)) for s, n in zip(states, widths, strict=True)]


def derive(traced: Traced, walk: Walk) -> Derived:
    """Run the trace of the *unchanged* model on the weights and fields as they are now.

    Raises:
        NotApplicable: some operator cannot take the new sizes; the reason names the layer and line.
    """
    return _Run(traced, walk).run()
