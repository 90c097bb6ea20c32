"""Groups of coupled axes, and cutting one of them out of every weight, state and field that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from quadriga.core.axes import rules_layers, rules_shape  # noqa: F401  (they register the rules)
from quadriga.core.axes.fields import refresh
from quadriga.core.axes.interface import Reference, check_interface
from quadriga.core.axes.patch import Patch
from quadriga.core.axes.rewrite import settle
from quadriga.core.axes.trace import Traced, trace
from quadriga.core.axes.walk import Walk
from quadriga.core.batch import Tree
from quadriga.core.errors import NotApplicable


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one weight or state that belongs to a group.

    Args:
        names: all names of the tensor; several when it is tied.
        tensor: the live parameter or buffer.
        dim: which of its dimensions.
        units: int64 [size of that dimension], the unit of the group at each position, −1 for another group's.
        producer: whether this dimension decides the width (a layer's outputs) rather than follows it.
    """

    names: tuple[str, ...]
    tensor: Tensor
    dim: int
    units: Tensor
    producer: bool


@dataclass(frozen=True, eq=False)
class Group:
    """A width: units that are cut in all members at once.

    Args:
        name: the first layer that produces it, such as "conv1".
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


class AxisGraph:
    """The coupled axes of one model as it is now. After other changes of the structure, trace again.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = AxisGraph.trace(net, torch.randn(2, 4))
        >>> [(g.name, g.size, g.fixed) for g in graph.groups()]
        [('0', 8, ''), ('2', 2, "it is the model's output")]
        >>> _ = graph.cut("0", torch.arange(5))
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=5, bias=True)
          (1): ReLU()
          (2): Linear(in_features=5, out_features=2, bias=True)
        )
    """

    def __init__(self, traced: Traced, example: Tree, reference: Reference) -> None:
        self.traced, self.example, self.reference = traced, example, reference
        self.model: nn.Module = traced.model
        self.walk = Walk(traced)
        self._groups = _groups(self.walk, traced)

    @classmethod
    def trace(cls, model: nn.Module, example: Tree) -> AxisGraph:
        """Trace a model and couple its axes.

        Raises:
            NotApplicable: it cannot be traced (the reason names layer and line), or does not run at batch 1, 2 and 25.
        """
        reference = Reference.of(model, example)
        return cls(trace(model, example), example, reference)

    def groups(self) -> list[Group]:
        """All widths, fixed ones too, in the order of execution."""
        return list(self._groups)

    def group(self, name: str) -> Group:
        """The group that a layer produces.

        Raises:
            KeyError: no group has that layer.
        """
        for group in self._groups:
            if name in group.layers or name == group.name:
                return group
        raise KeyError(name)

    def cut(self, group: Group | str, keep: Tensor) -> Patch:
        """Keep only these units of a group; see `cut_all`."""
        return self.cut_all({self.group(group) if isinstance(group, str) else group: keep})

    def cut_all(self, choices: Mapping[Group, Tensor]) -> Patch:
        """Cut several groups at once, in place, and check the interface.

        Args:
            choices: group → int64 units to keep, in any order.

        Returns:
            What was changed, so that it can be undone.

        Raises:
            NotApplicable: a group is fixed, nothing would be left, or the user's forward does not stand the
                change; then the model is as it was.
        """
        patch = Patch()
        try:
            self._cut(choices, patch)
            settle(self, patch)
        except NotApplicable:
            patch.undo()
            raise
        return patch

    def cut_each(self, choices: Mapping[Group, Tensor]) -> tuple[list[Group], list[str]]:
        """Cut all groups that can be cut: all at once, and if that fails, one after the other.

        Returns:
            the groups that were cut, and the reasons for the others.

        Raises:
            NotApplicable: none could be cut.
        """
        try:
            self.cut_all(choices)
            return list(choices), []
        except NotApplicable as error:
            if len(choices) == 1:
                raise
            failure = error
        good: dict[Group, Tensor] = {}
        reasons: list[str] = []
        for group, keep in choices.items():
            try:
                self.cut_all({**good, group: keep}).undo()
                good[group] = keep
            except NotApplicable as error:
                reasons.append(f"{group.name}: {error.reason}")
        if not good:
            raise NotApplicable("; ".join(reasons) or failure.reason)
        self.cut_all(good)
        return list(good), reasons

    def check(self) -> None:
        """Raise NotApplicable unless outputs have the shapes that they had when this graph was traced."""
        check_interface(self.model, self.example, self.reference)

    def _cut(self, choices: Mapping[Group, Tensor], patch: Patch) -> None:
        rows: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        for group, keep in choices.items():
            if group.fixed:
                raise NotApplicable(f"{group.name} has a fixed width: {group.fixed}")
            stays = torch.zeros(group.size, dtype=torch.bool)
            stays[keep.cpu()] = True
            for member in group.members:
                kept = (member.units < 0) | stays[member.units]
                if not kept.any():
                    raise NotApplicable(f"nothing of {member.names[0]} would be left")
                dims = rows.setdefault(id(member.tensor), (member.tensor, {}))[1]
                dims[member.dim] = kept & dims[member.dim] if member.dim in dims else kept
        before = {key: tuple(tensor.shape) for key, (tensor, _) in rows.items()}
        for tensor, dims in rows.values():
            value = tensor.data
            for dim, kept in dims.items():
                value = value.index_select(dim, kept.nonzero().flatten().to(value.device))
            patch.data(tensor, value)
        refresh(self.model, before, patch)


def _groups(walk: Walk, traced: Traced) -> list[Group]:
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
    return [_group(walk, traced, roots, made, found) for (roots, made), found in zip(sets, members, strict=True)]


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
                made = (state, dim) in producers
                found[g].append(Member(traced.names[state], tensors[state], dim, units, made))
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
