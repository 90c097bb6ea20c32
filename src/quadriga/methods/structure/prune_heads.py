"""Head pruning: take out the least important heads of attentions, with all that reads them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from quadriga.core.axes import AxisGraph, Group
from quadriga.core.axes.importance import Score, best
from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.method import Family, Method, Numerics
from quadriga.core.setup import Setup
from quadriga.methods.structure._scores import score_of

log = logging.getLogger(__name__)


def heads_kept(importance: Tensor, ratio: float) -> Tensor:
    """The heads of one attention that stay: the most important ones, at least one, in their order.

    Args:
        importance: [heads], higher matters more.
        ratio: share of heads that go.

    Example:
        >>> import torch
        >>> heads_kept(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5)
        tensor([0, 3])
    """
    return best(importance, max(1, round(len(importance) * (1 - ratio))))


@dataclass(frozen=True, kw_only=True)
class PruneHeads(Method):
    """Remove the least important heads of every attention, whole: queries, keys, values and what reads them.

    In grouped-query attention a key-value head goes with all query heads that use it. An attention whose number of heads
    stands in the code, or whose projections are one tensor, is left; if every one is, the method refuses.

    Args:
        ratio: share of the heads of each attention that go, in (0, 1); at least one stays.
        importance: "magnitude" (L2 norm over all weights of the head), "taylor" (squared gradient times weight) or "hessian"
            (curvature times squared weight), both from calibration data.
        only: layers to act on: globs of names, comma-separated.

    Example:
        >>> from quadriga.core.setup import Setup
        >>> from quadriga.testing.workloads import tiny_attention
        >>> setup = PruneHeads(ratio=0.5)(Setup.of(tiny_attention()))
        >>> setup.model.query.out_features, setup.model.key.out_features, setup.model.out.in_features
        (8, 4, 8)

    Source: Michel et al. 2019, Are sixteen heads really better than one?, arXiv:1905.10650; Molchanov et al. 2019,
    arXiv:1906.10771 (taylor).
    """

    family = Family.STRUCTURE
    numerics = Numerics.CHANGED
    source = "arXiv:1905.10650"
    requires = frozenset({"FLOAT_WEIGHTS"})
    search: ClassVar = {"ratio": (0.5, 0.25), "importance": ("magnitude", "taylor", "hessian")}

    ratio: float = 0.5
    importance: Literal["magnitude", "taylor", "hessian"] = "magnitude"
    only: str = "*"

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise BadInput(f"prune_heads.ratio is {self.ratio!r}", "it is the share that goes, between 0 and 1")

    def apply(self, setup: Setup) -> Setup:
        graph = AxisGraph.trace(setup.model, setup.context.example)
        choices = self._choices(graph, score_of(self.importance, graph, setup))
        for reason in graph.cut_each(choices)[1]:
            log.info("prune_heads leaves %s", reason)
        return replace(setup, model=graph.model)

    def _choices(self, graph: AxisGraph, score: Score) -> dict[Group, Tensor]:
        heads = [g for g in graph.groups() if g.split and g.matches(self.only)]
        if not heads:
            raise NotApplicable("no layer that matches is cut into heads that can be told apart")
        scores = {g: s for g in heads if not g.fixed and (s := score(g)) is not None}
        detail = "; ".join(f"{g.name}: {g.fixed or f'{g.size} heads'}" for g in heads[:3])
        if not scores:
            raise NotApplicable(f"no head can be taken out ({detail})")
        choices = {g: keep for g, s in scores.items() if len(keep := heads_kept(s, self.ratio)) < g.size}
        if not choices:
            raise NotApplicable(f"at ratio {self.ratio} no attention loses a head ({detail})", "raise ratio")
        return choices
