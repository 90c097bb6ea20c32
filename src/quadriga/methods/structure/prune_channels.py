"""Channel pruning: take out the least important channels of all coupled layers, in one shot."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from quadriga.core.axes import AxisGraph, select
from quadriga.core.axes.importance import Score, best, bn_scale, magnitude, rounded, taylor
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup

log = logging.getLogger(__name__)
KINDS = ("conv", "linear", "recurrent")
K = TypeVar("K")
LEAST = 0.1  # of each group stays, so that a global ranking does not empty a layer


def widths(scores: Mapping[K, Tensor], ratio: float, scope: str, round_to: int = 1) -> dict[K, int]:
    """How many units of each group stay.

    Args:
        scores: group → importance of its units.
        ratio: share of units to remove.
        scope: "layer" removes it from every group; "global" ranks all units together, each group's importance divided
            by its mean, and leaves at least a tenth of each group.
        round_to: widths are rounded to the nearest multiple.
    """
    if scope == "layer":
        return {g: rounded(len(s) * (1 - ratio), len(s), round_to) for g, s in scores.items()}
    relative = torch.cat([s / s.mean().clamp_min(1e-30) for s in scores.values()])
    stays = torch.ones(len(relative), dtype=torch.bool)
    stays[relative.argsort(stable=True)[: round(ratio * len(relative))]] = False
    kept = dict(zip(scores, stays.split([len(s) for s in scores.values()]), strict=True))
    return {g: rounded(max(int(k.sum()), LEAST * len(k)), len(k), round_to) for g, k in kept.items()}


@dataclass(frozen=True, kw_only=True)
class PruneChannels(Method):
    """Remove the least important output channels of convolutional, Linear and recurrent layers, with all that reads them.

    Heads of attentions, embeddings and the model's outputs stay.

    Args:
        ratio: share of channels that go, in (0, 1).
        importance: "magnitude" (L2 norm over all coupled weights), "taylor" (squared gradient times weight, from
            calibration data) or "bn_scale" (scale of the batch normalization; layers without one stay).
        scope: "global" ranks the channels of all layers together, "layer" takes the same share of each.
        round_to: widths are rounded to the nearest multiple.
        only: layers to act on: globs of names, comma-separated.

    Source: Fang et al. 2023, DepGraph, arXiv:2301.12900; Molchanov et al. 2019, arXiv:1906.10771 (taylor);
    Liu et al. 2017, arXiv:1708.06519 (bn_scale).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:2301.12900"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {
        "ratio": (0.5, 0.3, 0.7),
        "importance": ("magnitude", "taylor", "bn_scale"),
        "scope": ("global", "layer"),
    }

    ratio: float = 0.5
    importance: Literal["magnitude", "taylor", "bn_scale"] = "magnitude"
    scope: Literal["global", "layer"] = "global"
    round_to: int = 1
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_channels.ratio is {self.ratio!r}", "it is the share that goes, between 0 and 1")
        if self.round_to < 1:
            raise BadInput(f"prune_channels.round_to is {self.round_to!r}", "give at least 1")

    def apply(self, setup: Setup) -> Setup:
        graph = AxisGraph.trace(setup.model, setup.context.example)
        score = self._score(graph, setup)
        scores = {g: s for g in select(graph.groups(), self.only, KINDS) if (s := score(g)) is not None}
        if not scores:
            reasons = [f"{g.name}: {g.fixed or g.split or g.kind}" for g in graph.groups() if g.matches(self.only)]
            detail = "no width has a batch normalization" if self.importance == "bn_scale" else "; ".join(reasons[:3])
            raise NotApplicable(f"no channels can be pruned ({detail or 'no layer matches'})")
        kept = widths(scores, self.ratio, self.scope, self.round_to)
        choices = {g: best(s, kept[g]) for g, s in scores.items() if kept[g] < g.size}
        if not choices:
            raise NotApplicable(f"at ratio {self.ratio} and round_to {self.round_to} no width changes")
        for reason in graph.cut_each(choices)[1]:
            log.info("prune_channels leaves %s", reason)
        return replace(setup, model=graph.model)

    def _score(self, graph: AxisGraph, setup: Setup) -> Score:
        if self.importance == "bn_scale":
            return bn_scale(graph)
        if self.importance == "magnitude":
            return magnitude(graph)
        if setup.context.gradients is None:
            raise NotApplicable(
                "taylor importance needs gradients, which are not supplied here", 'use importance = "magnitude"'
            )
        return taylor(graph, setup.context.gradients(setup.model))
