"""Importance by name, and how many units of each width stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Tensor

from quadriga.core.axes import AxisGraph
from quadriga.core.axes.importance import Score, bn_scale, hessian, magnitude, rounded, taylor
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.structure._granules import Grain

Importance = Literal["magnitude", "taylor", "hessian", "bn_scale"]
K = TypeVar("K")
LEAST = 0.1  # of each group stays, so that a global ranking does not empty a layer


def score_of(importance: str, graph: AxisGraph, setup: Setup) -> Score:
    """The score of that name for the units of the graph's groups.

    Raises:
        NotApplicable: it reads gradients of the loss, and none are supplied.
    """
    if importance == "bn_scale":
        return bn_scale(graph)
    if importance == "magnitude":
        return magnitude(graph)
    service = setup.context.gradients if importance == "taylor" else setup.context.curvature
    if service is None:
        reason = f"{importance} importance needs gradients, which are not supplied here"
        raise NotApplicable(reason, 'use importance = "magnitude"')
    return (taylor if importance == "taylor" else hessian)(graph, service(setup.model))


def widths(scores: Mapping[K, Tensor], ratio: float, scope: str, grain: Mapping[K, Grain] | int = 1) -> dict[K, int]:
    """How many units of each group stay.

    Units go in granules: those of a group, ascending by importance, cut so that what stays is one of the widths that it may
    have. The least of these stays; a group that is no wider stays as it is, and others do not make up for it. As many go as
    come nearest to the share of the units of groups that can change.

    Args:
        scores: group → importance of its units.
        ratio: share of units to remove.
        scope: "layer" lets all groups become narrower alike, and where not all can take a step, the least important granules
            go; "global" ranks all granules together, each group's importance divided by its mean, and leaves at least a tenth
            of each group.
        grain: units of a granule, or for each group the widths that it may have.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 1.0, 1.0, 9.0]), "b": torch.tensor([3.0, 3.0])}
        >>> widths(scores, 0.5, "global"), widths(scores, 0.5, "layer")
        ({'a': 1, 'b': 2}, {'a': 2, 'b': 1})
        >>> widths({"a": torch.ones(24), "b": torch.ones(16), "c": torch.ones(6)}, 0.4, "layer", 8)
        {'a': 16, 'b': 8, 'c': 6}
    """
    grains = {g: Grain(grain, grain) if isinstance(grain, int) else grain.get(g, Grain()) for g in scores}
    if all(g.step == 1 for g in grains.values()):
        return _units(scores, ratio, scope)
    order = sorted((key, n, size) for n, g in enumerate(scores) for key, size in _granules(scores[g], grains[g], scope))
    kept, gone = [len(s) for s in scores.values()], 0
    free = [sum(size for _, n, size in order if n == k) for k in range(len(kept))]  # units that may go
    budget = sum(min(ratio * n, most) if scope == "layer" else ratio * n for n, most in zip(kept, free, strict=True) if most)
    for _, n, size in order:
        if gone + size / 2 >= budget:
            break
        kept[n] -= size
        gone += size
    return dict(zip(scores, kept, strict=True))


def _granules(scores: Tensor, grain: Grain, scope: str) -> Iterator[tuple[tuple[float, float], int]]:
    """The granules of a group that may go: what they are ordered by, and their units. The first makes the rest a multiple.

    For "layer" that is the share of the group that has gone when half of the granule has. So the order is one for all
    ratios: with a larger one more goes, and nothing comes back.
    """
    ascending, size = (scores / scores.mean().clamp_min(1e-30)).sort().values, len(scores)
    least = LEAST * size if scope == "global" else 0
    allowed = [w for w in grain.widths(size) if w >= least]
    for narrower, wider in reversed(list(pairwise(allowed))):
        worth = float(ascending[size - wider : size - narrower].mean())
        key = (worth, 0.0) if scope == "global" else (1 - (narrower + wider) / (2 * size), worth)
        yield key, wider - narrower


def _units(scores: Mapping[K, Tensor], ratio: float, scope: str) -> dict[K, int]:
    """`widths` unit by unit."""
    if scope == "layer":
        return {g: rounded(len(s) * (1 - ratio), len(s)) for g, s in scores.items()}
    relative = torch.cat([s / s.mean().clamp_min(1e-30) for s in scores.values()])
    stays = torch.ones(len(relative), dtype=torch.bool)
    stays[relative.argsort(stable=True)[: round(ratio * len(relative))]] = False
    kept = dict(zip(scores, stays.split([len(s) for s in scores.values()]), strict=True))
    return {g: rounded(max(int(k.sum()), LEAST * len(k)), len(k)) for g, k in kept.items()}


def nonzero(scores: Mapping[K, Tensor], grain: Mapping[K, Grain] | int = 1) -> dict[K, int]:
    """How many units of each group stay when those go whose importance is 0: at least one, rounded up to whole granules.

    Raises:
        NotApplicable: there are none.

    Example:
        >>> nonzero({"a": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), "b": torch.zeros(3)}, 2)
        {'a': 4, 'b': 2}
    """
    grains = {g: Grain(grain, grain) if isinstance(grain, int) else grain.get(g, Grain()) for g in scores}
    kept = {g: min(len(s), grains[g].up(max(int((s > 0).sum()), 1))) for g, s in scores.items()}
    if all(count == len(scores[g]) for g, count in kept.items()):
        raise NotApplicable("no channel is zero in all its weights", "train with group_lasso before it, or with more of it")
    return kept
