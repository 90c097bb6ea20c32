"""Pruning of units (channels, hidden units, heads), at once or in the course of a train step: the part that methods share."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quadriga.core.axes import AxisGraph, Group, Patch, opened
from quadriga.core.axes.importance import Score, best, bn_scale, hessian, magnitude, taylor
from quadriga.core.batch import Tree
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure._gradual import Thinning
from quadriga.methods.structure._granules import Grain
from quadriga.methods.structure._scores import score_of

log = logging.getLogger(__name__)


Grains = Mapping[str, Grain]  # by the name of a width


class Pruner(Protocol):
    """What a method says of its units. Fields as in `PruneChannels`."""

    @property
    def name(self) -> str: ...
    @property
    def ratio(self) -> float: ...
    @property
    def importance(self) -> str: ...
    @property
    def gradual(self) -> float: ...

    def grain(self, model: nn.Module, groups: Collection[Group], setup: Setup) -> Grains:
        """For each width, by its name, in what granules it may be cut."""

    def groups(self, graph: AxisGraph) -> list[Group]:
        """The widths that it acts on. Raises NotApplicable with the reason if there is none."""

    def kept(self, scores: Mapping[Group, Tensor], ratio: float, grain: Mapping[Group, Grain]) -> dict[Group, int]:
        """How many units of each width stay when this share of them goes."""


def prune(pruner: Pruner, setup: Setup) -> Setup:
    """Cut the least important units, or let them fade in the train step that follows and cut them at its end.

    Raises:
        NotApplicable: nothing can be cut, now or, as a trial shows, then.
    """
    example = setup.context.example
    with opened(setup.model):
        graph = AxisGraph.trace(setup.model, example)
        grain = pruner.grain(graph.model, pruner.groups(graph), setup)
        if not pruner.gradual:
            cut(pruner, graph, score_of(pruner.importance, graph, setup), grain)
            return replace(setup, model=graph.model)
        patch, names = cut(pruner, graph, (bn_scale if pruner.importance == "bn_scale" else magnitude)(graph), grain)
        patch.undo()
    training = replace(
        setup.training,
        make_hooks=(*setup.training.make_hooks, lambda model: UnitFade(model, pruner, names, example, grain)),
        finish=(*setup.training.finish, partial(take_zeros, pruner, names, example, grain)),
    )
    return replace(setup, training=training)


def cut(pruner: Pruner, graph: AxisGraph, score: Score, grain: Grains) -> tuple[Patch, set[str]]:
    """Cut by a score; returns what was changed and the names of the widths.

    Raises:
        NotApplicable: no width changes, or the model stands none of the cuts.
    """
    scores = {g: s for g in pruner.groups(graph) if (s := score(g)) is not None}
    if not scores:
        raise NotApplicable("no width that matches has a batch normalization", 'use importance = "magnitude"')
    kept = pruner.kept(scores, pruner.ratio, _by_group(scores, grain))
    choices = {g: best(s, kept[g]) for g, s in scores.items() if kept[g] < g.size}
    if not choices:
        raise NotApplicable(f"at ratio {pruner.ratio} no width changes ({why_not(scores, grain)})", _remedy(grain))
    patch, reasons = graph.cut_each(choices)
    for reason in reasons:
        log.info("%s leaves %s", pruner.name, reason)
    return patch, {g.name for g in choices if not any(r.startswith(f"{g.name}: ") for r in reasons)}


def _by_group(groups: Collection[Group], grain: Grains) -> dict[Group, Grain]:
    return {g: grain.get(g.name, Grain()) for g in groups}


def why_not(groups: Collection[Group], grain: Grains | None = None) -> str:
    """The first three groups, and why each is left, for a refusal."""
    steps = {name: f" in steps of {one.step}" for name, one in (grain or {}).items() if one.step > 1}
    told = (g.fixed or g.split or f"{g.size} {g.kind}{steps.get(g.name, '')}" for g in groups)
    return "; ".join([f"{g.name}: {why}" for g, why in zip(groups, told, strict=True)][:3])


def _remedy(grain: Grains) -> str:
    return "raise ratio, or set round_to = 1" if any(one.step > 1 for one in grain.values()) else "raise ratio"


def take_zeros(pruner: Pruner, names: Collection[str], example: Tree, grain: Grains, model: nn.Module) -> nn.Module:
    """Cut the units that are zero in every weight. Where none is, as in a network that was not trained, cut by magnitude."""
    graph = AxisGraph.trace(model, example)
    score = magnitude(graph)
    norms = {g: score(g) for g in pruner.groups(graph)}
    found: dict[Group, Tensor] = {g: n for g, n in norms.items() if n is not None}
    faded = [(g, n) for g, n in found.items() if g.name in names]
    choices = {g: n.nonzero().flatten() for g, n in faded if bool(n.any()) and not bool(n.all())}
    if not choices:
        kept = pruner.kept(found, pruner.ratio, _by_group(found, grain))
        choices = {g: best(n, kept[g]) for g, n in faded if kept[g] < g.size}
    if choices:
        graph.cut_each(choices)
    return graph.model


class UnitFade(Thinning):
    """Zeroes ever more units in all their weights; importance is that of the training gradients since the last choice.

    Args:
        model: traced anew, as it is when training begins.
        pruner: says which widths, how many and by what.
        names: of the widths that a trial could cut.
        example: inputs to trace with.
        grain: for each width its granules.
    """

    def __init__(self, model: nn.Module, pruner: Pruner, names: Collection[str], example: Tree, grain: Grains) -> None:
        super().__init__(pruner.gradual)
        self.pruner, self.graph, self.grain = pruner, AxisGraph.trace(model, example), grain
        self.every = pruner.groups(self.graph)  # of all of them a share goes; those that cannot be cut stay
        self.groups = {g.name: g for g in self.every if g.name in names}
        self.alive = {name: torch.ones(g.size, dtype=torch.bool) for name, g in self.groups.items()}
        members = [m for g in self.groups.values() for m in g.members if isinstance(m.tensor, nn.Parameter)]
        self.read = {m.names[0]: m.tensor for m in members} if pruner.importance in ("taylor", "hessian") else {}
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def after_backward(self, model: nn.Module, progress: float) -> None:
        """Add up gradients, or their squares."""
        self.steps += 1
        for name, parameter in self.read.items():
            if parameter.grad is None:
                continue
            one = parameter.grad if self.pruner.importance == "taylor" else parameter.grad.square()
            self.sums[name] = self.sums[name].add_(one) if name in self.sums else one.clone()

    def choose(self, share: float) -> None:
        """The least important units go; what is gone stays gone."""
        score = self._score()
        scores = {g: s * self.alive.get(g.name, 1) for g in self.every if (s := score(g)) is not None}
        kept = self.pruner.kept(scores, self.pruner.ratio * share, _by_group(scores, self.grain))
        for name, group in self.groups.items():
            if group in scores and kept[group] < int(self.alive[name].sum()):
                order = scores[group].masked_fill(~self.alive[name], -1)
                self.alive[name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, best(order, kept[group]), True)
        self.sums, self.steps = {}, 0
        self._mask()

    def _score(self) -> Score:
        if not self.read:
            return (bn_scale if self.pruner.importance == "bn_scale" else magnitude)(self.graph)
        means = {name: total / self.steps for name, total in self.sums.items()}
        return (taylor if self.pruner.importance == "taylor" else hessian)(self.graph, means)

    def _mask(self) -> None:
        self.masks = []
        for name, group in self.groups.items():
            for member in group.members if not bool(self.alive[name].all()) else ():
                if isinstance(member.tensor, nn.Parameter):
                    stays = (member.units < 0) | self.alive[name][member.units]
                    shape = [-1 if d == member.dim else 1 for d in range(member.tensor.dim())]
                    self.masks.append((member.tensor, stays.view(shape).to(member.tensor)))

    def state_dict(self) -> dict[str, Any]:
        """What is alive, and the gradients since."""
        return {"alive": dict(self.alive), "sums": dict(self.sums), "steps": self.steps, "times": self.times}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.alive = {name: state["alive"][name].clone() for name in self.alive}
        self.sums = {name: total.clone().to(self.read[name]) for name, total in state["sums"].items()}
        self.steps, self.times = state["steps"], state["times"]
        self._mask()
