"""Groups of coupled axes: read off a walk, one for each width of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from quadriga.core.axes.trace import Traced
from quadriga.core.axes.walk import Walk


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one weight or state that belongs to a group.

    Args:
        names: all names of the tensor; several when it is tied.
        tensor: the live parameter or buffer.
        dim: which of its dimensions.
        units: int64 [size of that dimension], the unit of the group at each position, −1 for another group's.
        producer: whether this dimension decides the width (a layer's outputs) rather than follows it.
        reader: whether it is summed over (a layer's inputs).
    """

    names: tuple[str, ...]
    tensor: Tensor
    dim: int
    units: Tensor
    producer: bool
    reader: bool = False


@dataclass(frozen=True, eq=False)
class Group:
    """A width: units that are cut in all members at once.

    Args:
        name: the first layer that produces it, such as "conv1"; the weight, for further widths of a layer.
        kind: "conv", "linear", "recurrent", "embedding", or "other"; embedding and conv win where layers are joined.
        size: number of units.
        members: where the units are.
        layers: every layer that produces it, in the order of execution.
        fixed: why it may not be cut; "" if it may.
        split: where it is cut into heads; "" if nowhere.
    """

    name: str
    kind: str
    size: int
    members: tuple[Member, ...]
    layers: tuple[str, ...]
    fixed: str = ""
    split: str = ""

    def matches(self, patterns: str) -> bool:
        """Whether one of its layers matches one of the comma-separated globs."""
        return any(fnmatchcase(layer, p.strip()) for layer in self.layers for p in patterns.split(","))


def find_groups(walk: Walk, traced: Traced) -> list[Group]:
    """Producers that share a unit make one group; every dimension that holds one of its units is a member."""
    sets: list[tuple[set[int], list[tuple[int, int, str]]]] = []
    producers = [*walk.producers, *_orphans(walk)]
    for producer in producers:
        merged: tuple[set[int], list[tuple[int, int, str]]] = (_roots(walk, *producer[:2]), [producer])
        apart = []
        for other in sets:
            if other[0] & merged[0]:
                merged = (other[0] | merged[0], other[1] + merged[1])
            else:
                apart.append(other)
        sets = [*apart, merged]
    order = {producer: k for k, producer in enumerate(producers)}
    sets.sort(key=lambda s: min(order[p] for p in s[1]))
    members = _members(walk, traced, [s[0] for s in sets], {p[:2] for p in producers})
    return _named_apart([_group(walk, traced, roots, made, found) for (roots, made), found in zip(sets, members, strict=True)])


def _named_apart(groups: list[Group]) -> list[Group]:
    """Widths of one layer that share its name get those of the weights that decide them, with the dimension where need be."""
    taken: set[str] = set()
    found = []
    for group in groups:
        made = next((m for m in group.members if m.producer), None)
        weight = made.names[0] if made else group.name
        name = next(n for n in (group.name, weight, f"{weight}[{made.dim if made else 0}]") if n not in taken or made is None)
        taken.add(name)
        found.append(replace(group, name=name))
    return found


def _roots(walk: Walk, state: int, dim: int) -> set[int]:
    axis = walk.states[state][dim]
    assert isinstance(axis, Tensor)
    return set(walk.units.roots(axis))


def _orphans(walk: Walk) -> list[tuple[int, int, str]]:
    """Dimensions of bare parameters whose units no layer produces."""
    covered: set[int] = set()
    for state, dim, _ in walk.producers:
        covered |= _roots(walk, state, dim)
    found = []
    for state, axes in walk.states.items():
        for dim in range(len(axes)):
            roots = _roots(walk, state, dim)
            if not roots & covered and not roots <= set(walk.units.fixed):
                found.append((state, dim, "other"))
                covered |= roots
    return found


def _members(walk: Walk, traced: Traced, sets: list[set[int]], producers: set[tuple[int, int]]) -> list[list[Member]]:
    place = {root: (g, u) for g, roots in enumerate(sets) for u, root in enumerate(sorted(roots))}
    tensors = {id(t): t for t in traced.states.values()}
    found: list[list[Member]] = [[] for _ in sets]
    for state, axes in walk.states.items():
        for dim, axis in enumerate(axes):
            assert isinstance(axis, Tensor)
            spots = [place.get(root, (-1, -1)) for root in walk.units.roots(axis)]
            for g in {s[0] for s in spots} - {-1}:
                units = torch.tensor([u if owner == g else -1 for owner, u in spots])
                made, read = (state, dim) in producers, (state, dim) in walk.readers
                found[g].append(Member(traced.names[state], tensors[state], dim, units, made, read))
    return found


def _group(walk: Walk, traced: Traced, roots: set[int], made: list[tuple[int, int, str]], members: list[Member]) -> Group:
    layers = list(dict.fromkeys(_layer(name) for state, _, _ in made for name in traced.names[state]))
    kinds = {kind for _, _, kind in made}
    kind = next(k for k in ("embedding", "conv", "recurrent", "linear", "other") if k in kinds)
    fixed = [walk.units.fixed[r] for r in sorted(roots) if r in walk.units.fixed]
    split = [walk.units.split[r] for r in sorted(roots) if r in walk.units.split]
    reason = fixed[0] if fixed else "it has one unit" if len(roots) == 1 else ""
    return Group(layers[0], kind, len(roots), tuple(members), tuple(layers), reason, split[0] if split else "")


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def select(groups: Iterable[Group], patterns: str, kinds: Iterable[str]) -> list[Group]:
    """The groups of these kinds that may be cut and match the globs; heads of attentions are left alone."""
    kinds = set(kinds)
    return [g for g in groups if g.kind in kinds and not g.fixed and not g.split and g.matches(patterns)]
