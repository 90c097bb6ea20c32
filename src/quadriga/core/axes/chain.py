"""The chain of Linear layers before the output, and taking hidden ones out of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from quadriga.core.axes.fields import refresh
from quadriga.core.axes.graph import AxisGraph
from quadriga.core.axes.patch import Patch
from quadriga.core.axes.walk import flat, op_name
from quadriga.core.errors import NotApplicable
from quadriga.core.plain import is_plain

IDEMPOTENT = ("relu", "relu6", "hardtanh", "clamp_min", "relu_", "relu6_", "hardtanh_")  # f(f(x)) = f(x)
NO_EFFECT = ("dropout", "dropout_", "contiguous", "clone", "detach")


@dataclass
class Chain:
    """Linear layers that follow each other, with element-wise operators between.

    Args:
        layers: paths of the layers, first to last; the last one makes the output.
        between: names of the operators after each layer but the last.
    """

    layers: list[str]
    between: list[list[str]]


def linear_chain(graph: AxisGraph) -> Chain:
    """Walk back from the model's first output as far as there are only Linear layers and element-wise operators."""
    output = next(n for n in graph.traced.graph.nodes if n.op == "output")
    node, layers, between = flat(output.args)[0], [], [[]]  # type: ignore[var-annotated]
    while node.op == "call_function" and (len(node.users) == 1 or not layers):
        sources = [n for n in flat([node.args, node.kwargs]) if n.name not in graph.traced.states]
        if len(sources) != 1 or not isinstance(sources[0].meta["val"], Tensor):  # a recurrent cell returns a tuple
            break
        if op_name(node) == "linear" and _plain(graph, node):
            layers.insert(0, graph.traced.layer(node))
            between.insert(0, [])
        elif graph.walk.shape(sources[0]) == graph.walk.shape(node) and op_name(node) not in ("linear", "view", "reshape"):
            between[0].insert(0, op_name(node))
        else:
            break
        node = sources[0]
    return Chain(layers, between[1:-1])


def _plain(graph: AxisGraph, node: fx.Node) -> bool:
    """A Linear of its own, neither tied nor called twice."""
    module = graph.model.get_submodule(graph.traced.layer(node))
    path, traced = graph.traced.layer(node), graph.traced
    uses = [n for n in traced.graph.nodes if n.op == "call_function" and traced.layer(n) == path]
    return is_plain(module, nn.Linear) and len(uses) == 1 and all(len(traced.names[id(p)]) == 1 for p in module.parameters())


def fewer_hidden(graph: AxisGraph, hidden: int) -> Patch:
    """Keep the first `hidden` hidden layers of the chain before the output; take the later ones out, in place.

    A removed layer becomes `nn.Identity`. The output layer inherits the product of the removed matrices, which is the same
    function as far as the activation between them let values pass unchanged.

    Args:
        graph: traced from the model as it is; trace again afterwards.
        hidden: how many hidden Linear layers to keep, from 0.

    Raises:
        NotApplicable: there are no more than that, or the activation would act twice and is not idempotent.
    """
    chain = linear_chain(graph)
    gone, last = chain.layers[hidden:-1], chain.layers[-1:]
    if not gone:
        count = max(0, len(chain.layers) - 1)
        raise NotApplicable(f"the Linear chain before the output has {count} hidden layers, not more than {hidden}")
    acts = {name.rstrip("_") for names in chain.between[max(0, hidden - 1) :] for name in names if name not in NO_EFFECT}
    if len(acts) > 1 or not acts <= {name.rstrip("_") for name in IDEMPOTENT}:
        raise NotApplicable(f"without {gone[0]} its activation ({', '.join(sorted(acts))}) would act twice")
    final = graph.model.get_submodule(last[0])
    assert isinstance(final, nn.Linear)
    weight, bias = final.weight.data, final.bias.data if final.bias is not None else None
    for path in reversed(gone):
        layer = graph.model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        if bias is not None and layer.bias is not None:
            bias = bias + weight @ layer.bias.data
        weight = weight @ layer.weight.data
    patch = Patch()
    try:
        before = {id(final.weight): tuple(final.weight.shape)}
        patch.data(final.weight, weight)
        if bias is not None:
            patch.data(final.bias, bias)
        for path in gone:
            patch.module(graph.model, path, nn.Identity())
        refresh(graph.model, before, patch)
        graph.check()
    except NotApplicable:
        patch.undo()
        raise
    return patch
