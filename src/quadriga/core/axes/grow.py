"""Wider layers: units copied in every weight and state that holds them, so that the function stays and more can be learned."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor

from quadriga.core.axes.fields import refresh
from quadriga.core.axes.graph import AxisGraph
from quadriga.core.axes.groups import Group, Member
from quadriga.core.axes.patch import Patch
from quadriga.core.axes.rewrite import settle
from quadriga.core.errors import NotApplicable


def grow(graph: AxisGraph, copies: Mapping[Group, Tensor], generator: torch.Generator) -> Patch:
    """Add copies of units, in place, and check the interface.

    A layer that sums over a unit reads the unit and its copies with random shares that add up to what it read before, so the
    outputs stay, and the copies learn different things from the first step on. Where a norm averages over the units, that holds
    only if all of them get equally many copies; where one weight both makes and reads them (a tied head), it does not.

    Args:
        graph: traced from the model as it is; trace again afterwards.
        copies: group → int64, the unit that each new unit copies.
        generator: of the shares.

    Raises:
        NotApplicable: a group is fixed or counts parts, or the user's forward does not stand the change; then the model is as
            it was.

    Source: Chen et al. 2016, Net2Net, arXiv:1511.05641 (there with equal shares and noise).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
        >>> x = torch.randn(4, 3)
        >>> before, graph = net(x), AxisGraph.trace(net, x)
        >>> _ = grow(graph, {graph.group("0"): torch.tensor([0, 1, 1])}, torch.Generator().manual_seed(0))
        >>> net[0].out_features, torch.allclose(net(x), before, atol=1e-6)
        (5, True)
    """
    if fixed := [f"{g.name} has a fixed width: {g.fixed or g.split}" for g in copies if g.fixed or g.split]:
        raise NotApplicable("; ".join(fixed))
    if computed := [(g, m) for g in copies for m in g.members if (id(m.tensor), m.dim) in graph.walk.computed]:
        group, member = computed[0]
        raise NotApplicable(f"{group.name} is read through {member.names[0]}, from which a layer computes its weight")
    shares = {group: _shares(group.size, sources, generator) for group, sources in copies.items()}
    patch, before = Patch(), dict[int, tuple[int, ...]]()
    try:
        for (_, dim), members in _places(copies).items():
            tensor = members[0][0].tensor
            before.setdefault(id(tensor), tuple(tensor.shape))
            patch.data(tensor, _grown(tensor.data, dim, members, copies, shares))
        refresh(graph.model, before, patch)
        settle(graph, patch)
    except NotApplicable:
        patch.undo()
        raise
    return patch


def _places(copies: Mapping[Group, Tensor]) -> dict[tuple[int, int], list[tuple[Member, Group]]]:
    """(id of a tensor, dimension) → what of which groups lies there; of a concatenation there are several."""
    found: dict[tuple[int, int], list[tuple[Member, Group]]] = {}
    for group in copies:
        for member in group.members:
            found.setdefault((id(member.tensor), member.dim), []).append((member, group))
    return found


def _grown(
    value: Tensor, dim: int, members: list[tuple[Member, Group]], copies: Mapping[Group, Tensor], shares: Mapping[Group, Tensor]
) -> Tensor:
    """The tensor with the copies of all groups along one dimension, and what is read shared out among them."""
    factor = torch.ones(len(members[0][0].units), dtype=torch.float64)
    behind: dict[int, list[tuple[int, float]]] = {}
    for member, group in members:
        read = member.reader and not member.producer
        here = member.units >= 0
        if read:
            factor[here] = shares[group][member.units[here]]
        for anchor, source, unit in added(member.units, copies[group]):
            behind.setdefault(anchor, []).append((source, float(shares[group][unit]) if read else 1.0))
    rows = [row for k, f in enumerate(factor.tolist()) for row in ((k, f), *behind.get(k, ()))]
    places, factors = torch.tensor([k for k, _ in rows]), torch.tensor([f for _, f in rows])
    shape = [-1 if d == dim else 1 for d in range(value.dim())]
    taken = value.index_select(dim, places.to(value.device))
    return taken * factors.view(shape).to(taken) if bool((factors != 1).any()) else taken


def _shares(size: int, sources: Tensor, generator: torch.Generator) -> Tensor:
    """For each old and new unit its share of what is read; those of a unit and its copies add up to 1. float64 [old + new]"""
    origin = torch.cat([torch.arange(size), sources])
    raw = 0.5 + torch.rand(len(origin), generator=generator, dtype=torch.float64)
    return raw / torch.zeros(size, dtype=torch.float64).index_add_(0, origin, raw)[origin]


def added(units: Tensor, sources: Tensor) -> list[tuple[int, int, int]]:
    """The copies of a dimension's positions, each right behind what it copies, so that parts of a concatenation stay in step.

    Args:
        units: int64 [size], as in `Member`.
        sources: int64, the unit that each new unit copies; new units are numbered after the old ones.

    Returns:
        (position behind which it stands, position that it copies, its unit) for each copy, in order.

    Example:
        >>> added(torch.tensor([0, 0, 1, 1, -1]), torch.tensor([1]))
        [(3, 2, 2), (3, 3, 2)]
    """
    numbers: dict[int, list[int]] = {}
    for number, source in enumerate(sources.tolist(), int(units.max()) + 1):
        numbers.setdefault(source, []).append(number)
    found, start = [], 0
    for unit, run in groupby(units.tolist()):
        end = start + len(list(run))
        found += [(end - 1, k, number) for number in numbers.get(unit, ()) for k in range(start, end)]
        start = end
    return found
