"""A lighter head: an FC block becomes global pooling, Dropout and one Linear, or Dropout takes an FC layer's place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from quadriga.core.axes import AxisGraph, Patch, keep_frozen
from quadriga.core.axes.chain import linear_chain
from quadriga.core.axes.walk import op_name
from quadriga.core.batch import Batch, call, device_of, evaluating
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup

RESHAPES = ("view", "reshape", "flatten", "_unsafe_view")


class GlobalPool(nn.Module):
    """Flattened maps [batch, channels · positions] → their means [batch, channels].

    Example:
        >>> GlobalPool(2)(torch.tensor([[1.0, 3.0, 10.0, 20.0]]))
        tensor([[ 2., 15.]])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels · positions] → [batch, channels]."""
        return x.unflatten(1, (self.channels, -1)).mean(2)


def least_squares(x: Tensor, y: Tensor, bias: bool = True, ridge: float = 1e-4) -> nn.Linear:
    """The Linear that maps x nearest to y in the mean square.

    Args:
        x: [many, in].
        y: [many, out].
        ridge: share of the mean square of x that is added to each variance, for directions that x hardly has.

    Example:
        >>> x = torch.randn(50, 3)
        >>> layer = least_squares(x, x @ torch.ones(3, 2) + 5, ridge=0.0)
        >>> torch.allclose(layer.bias, torch.full((2,), 5.0), atol=1e-4)
        True
    """
    a, b = x.double(), y.double()
    shift, centre = (b.mean(0), a.mean(0)) if bias else (b.new_zeros(b.shape[1]), a.new_zeros(a.shape[1]))
    a, b = a - centre, b - shift
    square = a.T @ a
    square.diagonal().add_(ridge * square.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(square, a.T @ b).T
    layer = nn.Linear(x.shape[1], y.shape[1], bias=bias, device=y.device, dtype=y.dtype)
    layer.weight.data.copy_(weight)
    if bias:
        layer.bias.data.copy_(shift - weight @ centre)
    return layer


@dataclass(frozen=True, kw_only=True)
class ReplaceHead(Method):
    """Replace the FC block before the output by something with fewer weights.

    The new last layer starts as the one nearest to the old logits over calibration data; training, best with `distill`,
    repairs the rest. Activations between the old layers stay.

    Args:
        kind: "pool" averages each map over its positions, where the block reads flattened maps, then Dropout and one Linear;
            "dropout" puts Dropout in the place of the first FC layer, and the second reads what the first did.
        dropout: probability, in [0, 1).

    Source: Lin et al. 2014, Network in Network, arXiv:1312.4400 (pool); Srivastava et al. 2014, Dropout, JMLR 15.
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1312.4400"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"kind": ("pool", "dropout"), "dropout": (0.2, 0.0, 0.5)}

    kind: Literal["pool", "dropout"] = "pool"
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise BadInput(f"replace_head.dropout is {self.dropout!r}", "it is a probability, below 1")

    def apply(self, setup: Setup) -> Setup:
        graph = AxisGraph.trace(setup.model, setup.context.example)
        chain, before = linear_chain(graph).layers, sum(p.numel() for p in setup.model.parameters())
        if not chain:
            raise NotApplicable("the model does not end in a Linear layer of its own")
        patch = Patch()
        try:
            (self._pool if self.kind == "pool" else self._drop)(graph, setup, chain, patch)
            graph.check()
            after = sum(p.numel() for p in setup.model.parameters())
            if after >= before:
                raise NotApplicable(f"{' and '.join(chain)} would give way to a head with {after - before:+} weights")
        except NotApplicable:
            patch.undo()
            raise
        return replace(setup, model=setup.model)

    def _pool(self, graph: AxisGraph, setup: Setup, chain: list[str], patch: Patch) -> None:
        channels, head = maps_before(graph, chain[0]), setup.model.get_submodule(chain[-1])
        batches = setup.context.calibration
        wanted = seen(setup.model, {chain[-1]: head}, batches, outputs=True)[chain[-1]]
        front = [GlobalPool(channels), nn.Dropout(self.dropout)]
        if len(chain) == 1:
            probe = nn.Sequential(*front, stub_of(channels, head))
            patch.module(setup.model, chain[0], probe)
            found = seen(setup.model, {"": probe[2]}, batches)[""]
            probe[2] = _like(head, least_squares(found, wanted, head.bias is not None))
            probe.train(head.training)
            return
        patch.module(setup.model, chain[0], nn.Sequential(*front))
        for path in chain[1:-1]:
            patch.module(setup.model, path, nn.Identity())
        stub = stub_of(channels, head)
        patch.module(setup.model, chain[-1], stub)
        found = seen(setup.model, {"": stub}, batches)[""]
        patch.module(setup.model, chain[-1], _like(head, least_squares(found, wanted, head.bias is not None)))

    def _drop(self, graph: AxisGraph, setup: Setup, chain: list[str], patch: Patch) -> None:
        if len(chain) < 2:
            raise NotApplicable(f"{chain[0]} is the only Linear layer before the output", 'use kind = "pool"')
        model, batches = setup.model, setup.context.calibration
        first, second = (model.get_submodule(path) for path in chain[:2])
        wanted = seen(model, {"": second}, batches, outputs=True)[""]
        patch.module(model, chain[0], nn.Dropout(self.dropout))
        stub = stub_of(first.in_features, second)  # type: ignore[arg-type]
        patch.module(model, chain[1], stub)
        found = seen(model, {"": stub}, batches)[""]
        patch.module(model, chain[1], _like(second, least_squares(found, wanted, second.bias is not None)))


def maps_before(graph: AxisGraph, path: str) -> int:
    """Channels of the maps whose flattening the Linear at that path reads.

    Raises:
        NotApplicable: it reads something else, or maps of one position.
    """
    node = next(n for n in graph.traced.graph.nodes if op_name(n) == "linear" and graph.traced.layer(n) == path)
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and op_name(source) in ("dropout", "relu", "clone", "contiguous", "hardtanh", "relu_"):
        source = source.args[0]
    inner = source.args[0] if isinstance(source, fx.Node) and op_name(source) in RESHAPES else None
    shape = graph.walk.shape(inner) if isinstance(inner, fx.Node) else ()
    if len(shape) < 3 or prod(shape[1:]) != graph.walk.shape(source)[-1] or prod(shape[2:]) == 1:
        raise NotApplicable(f"{path} does not read flattened maps", 'use kind = "dropout"')
    return shape[1]


def seen(model: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Batch], outputs: bool = False) -> dict[str, Tensor]:
    """What each layer reads, or gives, over the batches: [many, features], in eval mode."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        return lambda module, args, out: found[name].append((out if outputs else args[0]).detach().flatten(0, -2))

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                _called(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _called(model: nn.Module, batch: Batch) -> None:
    try:
        call(model, batch.to(device_of(model)).inputs)
    except Exception as error:  # whatever the user's forward raises on another width
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotApplicable(f"the model does not run with the new head: {reason}") from error


def stub_of(inside: int, head: nn.Module) -> nn.Linear:
    """A Linear of the new size in the head's place, until what it reads is known."""
    assert isinstance(head, nn.Linear)
    return nn.Linear(inside, head.out_features, device=head.weight.device, dtype=head.weight.dtype)


def _like(old: nn.Module, new: nn.Linear) -> nn.Linear:
    keep_frozen(old, new)
    return new.train(old.training)
