"""Importance by name, and how many units of each width stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from quadriga.core.axes import AxisGraph
from quadriga.core.axes.importance import Score, bn_scale, hessian, magnitude, rounded, taylor
from quadriga.core.errors import NotApplicable
from quadriga.core.setup import Setup

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


def widths(scores: Mapping[K, Tensor], ratio: float, scope: str, round_to: int = 1) -> dict[K, int]:
    """How many units of each group stay.

    Args:
        scores: group → importance of its units.
        ratio: share of units to remove.
        scope: "layer" removes it from every group; "global" ranks all units together, each group's importance divided
            by its mean, and leaves at least a tenth of each group.
        round_to: widths are rounded to the nearest multiple.

    Example:
        >>> scores = {"a": torch.tensor([1.0, 1.0, 1.0, 9.0]), "b": torch.tensor([3.0, 3.0])}
        >>> widths(scores, 0.5, "global"), widths(scores, 0.5, "layer")
        ({'a': 1, 'b': 2}, {'a': 2, 'b': 1})
    """
    if scope == "layer":
        return {g: rounded(len(s) * (1 - ratio), len(s), round_to) for g, s in scores.items()}
    relative = torch.cat([s / s.mean().clamp_min(1e-30) for s in scores.values()])
    stays = torch.ones(len(relative), dtype=torch.bool)
    stays[relative.argsort(stable=True)[: round(ratio * len(relative))]] = False
    kept = dict(zip(scores, stays.split([len(s) for s in scores.values()]), strict=True))
    return {g: rounded(max(int(k.sum()), LEAST * len(k)), len(k), round_to) for g, k in kept.items()}


def nonzero(scores: Mapping[K, Tensor], round_to: int = 1) -> dict[K, int]:
    """How many units of each group stay when those go whose importance is 0: at least one, rounded up.

    Raises:
        NotApplicable: there are none.

    Example:
        >>> nonzero({"a": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]), "b": torch.zeros(3)}, 2)
        {'a': 4, 'b': 2}
    """
    kept = {g: min(len(s), -(-max(int((s > 0).sum()), 1) // round_to) * round_to) for g, s in scores.items()}
    if all(count == len(scores[g]) for g, count in kept.items()):
        raise NotApplicable("no channel is zero in all its weights", "train with group_lasso before it, or with more of it")
    return kept
